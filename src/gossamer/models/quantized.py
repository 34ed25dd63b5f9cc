"""What a quantized tensor is: integer codes, their scales and zero points, and the rule that made them.

A weight row w is cut into groups of `group_size` neighbouring inputs (one group per row when it is None). Each
group holds one scale s > 0 and, where the grid is asymmetric, one zero point z:

    code = clamp(round(w / s) + z, low, high)          w' = (code - z) * s          low, high = -2^(b-1), 2^(b-1) - 1

In the formats that are no integers (FP8, FP4, NF4; `levels.py`) a code is the place of a level, and there is no z:

    code = place of the level nearest to w / s         w' = level(code) * s

In the blocks of GGUF files (`gguf_blocks.py`) integers, scales and minima lie together, and codes are those bytes.

Codes are signed for every width, as compressed-tensors stores them; a runtime that wants unsigned codes adds 2^(b-1)
to both code and zero point, which changes nothing. Decided once here, lowered by every runtime, never rounded again.

Shape suffixes: O output channels (rows), I inputs of one row (all other dimensions, flattened), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from gossamer.models import gguf_blocks
from gossamer.models.gguf_blocks import BlockFormat, BlockName
from gossamer.models.levels import FORMATS, Format, NumberFormat
from gossamer.models.straight_through import straight_through

_BY_NAME: dict[str, NumberFormat] = {name: form for name, form in FORMATS.items()}  # noqa: C416 (other keys' type)


class QuantSpec(BaseModel):
    """Describe a weight grid: `bits` 2 to 8, symmetric or not, one scale per row or per `group_size` inputs.

    `format` says what codes stand for: integers, the levels of a format of `levels.py`, or the blocks of GGUF files.

    7 bits live in 8-bit containers: processors without int8 dot products add two products in 16 bits, and only
    7-bit weights cannot overflow there.

    >>> QuantSpec(bits=4, group_size=64).low
    -8
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8)
    symmetric: bool = True
    group_size: int | None = Field(default=None, gt=0)
    format: Format | BlockName = "int"

    @model_validator(mode="after")
    def _has_what_its_format_has(self) -> Self:
        form, block = self.number_format, self.block_format
        if form is not None and (why := form.disagreement(self.bits, self.symmetric, self.group_size)):
            raise ValueError(f"format {self.format} {why}")
        if block is not None and (self.bits, self.symmetric, self.group_size) != _grid_of(block):
            raise ValueError(f"{self.format} has {_grid_of(block)} as bits, symmetric and group_size")
        return self

    @classmethod
    def of_block(cls, form: BlockFormat) -> Self:
        """Return the grid of a GGUF block.

        >>> str(QuantSpec.of_block(gguf_blocks.FORMATS["Q4_K"]))
        'q4_k group 32'
        """
        bits, symmetric, group_size = _grid_of(form)
        return cls.model_validate(
            {"bits": bits, "symmetric": symmetric, "group_size": group_size, "format": form.name.lower()}
        )

    @model_serializer(mode="wrap")
    def _without_the_usual_format(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # integer grids are written as they were before there were others: files and steps stay the same
        data: dict[str, Any] = handler(self)
        if data.get("format") == "int":
            del data["format"]
        return data

    @property
    def number_format(self) -> NumberFormat | None:
        """Return the format of the codes, None for integers."""
        return _BY_NAME.get(self.format)

    @property
    def block_format(self) -> BlockFormat | None:
        """Return the GGUF block that codes are the bytes of, None for all others."""
        return gguf_blocks.FORMATS.get(self.format.upper())

    @property
    def scale_dtype(self) -> torch.dtype:
        """Return what scales are kept as: float16, or bfloat16 where they are powers of two or E4M3 times one."""
        form = self.number_format
        return torch.float16 if form is None or form.scales == "float16" else torch.bfloat16

    @property
    def low(self) -> int:
        """Return the smallest code."""
        form = self.number_format
        return -(1 << (self.bits - 1)) if form is None else form.codebook.low

    @property
    def high(self) -> int:
        """Return the largest code."""
        form = self.number_format
        return (1 << (self.bits - 1)) - 1 if form is None else form.codebook.low + len(form.codebook.levels_K) - 1

    @property
    def ends(self) -> tuple[float, float]:
        """Return what the smallest and the largest code stand for, in units of the scale (no zero point)."""
        form = self.number_format
        if form is None:
            return float(self.low), float(self.high)
        return float(form.codebook.levels_K[0]), float(form.codebook.levels_K[-1])

    def nearest(self, position: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return the codes, as floats, nearest to positions w / s; `position` may be overwritten.

        `zero` is the zero point of integers. Other formats have none: theirs is ignored, being zero.
        """
        form = self.number_format
        if form is not None:
            return form.codebook.nearest(position)
        codes = position.round_()
        return (codes if zero is None else codes.add_(zero)).clamp_(self.low, self.high)

    def steps(self, codes: Tensor) -> Tensor:
        """Return what codes stand for in units of the scale, float32; the zero point of integers is still in."""
        form = self.number_format
        return codes.float() if form is None else form.codebook.values(codes)

    def __str__(self) -> str:
        scope = f"group {self.group_size}" if self.group_size else "per channel"
        if self.format != "int":
            return f"{self.format} {scope}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {scope}"


def _grid_of(form: BlockFormat) -> tuple[int, bool, int]:
    return form.bits, not form.has_minimum, form.group_size


class ActivationSpec(BaseModel):
    """Describe how the input of a layer is rounded to 8 bits before the layer sees it.

    `dynamic`: range taken from each tensor as it comes (one scale for the whole tensor, or one per token);
    `static`: `low` and `high` were calibrated and are part of the artifact. Asymmetric grids are uint8 whose range
    always includes zero, as ONNX DynamicQuantizeLinear defines it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dynamic", "static"]
    scope: Literal["tensor", "token"] = "tensor"
    symmetric: bool = False
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        grid = "int8" if self.symmetric else "uint8"
        return f"{grid} {self.kind} per {self.scope}"

    def static_grid(self) -> tuple[float, int]:
        """Return (scale, zero point) of a static grid: unsigned 0..255, or signed -128..127 when symmetric."""
        assert self.kind == "static" and self.low is not None and self.high is not None
        if self.symmetric:
            scale = max(abs(self.low), abs(self.high)) / 127.0 or 1.0
            return scale, 0
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / 255.0 or 1.0
        return scale, int(min(255, max(0, round(-low / scale))))

    def fake_quantize(self, values: Tensor) -> Tensor:
        """Return `values` [..., I] rounded to this grid and back, same shape and dtype.

        Gradients pass as if nothing were rounded, but for values beyond a static range.
        """
        rounded = self._rounded(values.detach())
        if not (torch.is_grad_enabled() and values.requires_grad):
            return rounded
        return straight_through(values.clamp(*self._ends()) if self.kind == "static" else values, rounded)

    def _ends(self) -> tuple[float, float]:
        """Return between which numbers a static grid rounds to nearest: half a step beyond its ends."""
        step, zero = self.static_grid()
        low, high = (-128, 127) if self.symmetric else (0, 255)
        return (low - zero - 0.5) * step, (high - zero + 0.5) * step

    def _rounded(self, values: Tensor) -> Tensor:
        x = values.float()
        if self.kind == "static":
            step, zero = self.static_grid()
            bounds = (-128, 127) if self.symmetric else (0, 255)
            fixed: Tensor = (torch.clamp(torch.round(x / step) + zero, *bounds) - zero) * step
            return fixed.to(values.dtype)
        dims = (-1,) if self.scope == "token" else tuple(range(x.dim()))
        if self.symmetric:
            scale: Tensor = x.abs().amax(dims, keepdim=True) / 127.0
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            around_zero: Tensor = torch.clamp(torch.round(x / scale), -128, 127) * scale
            return around_zero.to(values.dtype)
        low = x.amin(dims, keepdim=True).clamp(max=0.0)
        high = x.amax(dims, keepdim=True).clamp(min=0.0)
        scale = (high - low) / 255.0
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero_point = torch.clamp(torch.round(-low / scale), 0, 255)
        rounded: Tensor = (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale
        return rounded.to(values.dtype)


@dataclass(frozen=True)
class Quantized:
    """Hold one quantized weight: `codes` int8 [O, I], `scale` 16 or 32 bits [O, G], `zero_point` int8 or None.

    `shape` is the shape of the parameter itself, `transposed` says that it is stored [I, O] (GPT-2's Conv1D). Codes of
    GGUF blocks are their bytes, uint8 [O, y], with scales and minima inside; `scale` is [O, 0] then.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def num_groups(self) -> int:
        """Return G, the number of groups in a row."""
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """Return the number of inputs that share a scale."""
        return self.codes.shape[1] // self.num_groups

    def to(self, device: torch.device) -> Quantized:
        """Return the codes on a device; themselves where they lie there."""
        if self.codes.device == device:
            return self
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero_point=zero_point)

    def dequantize(self) -> Tensor:
        """Return the float32 values in the parameter's own shape."""
        block = self.spec.block_format
        values_OI = gguf_blocks.decode(self.codes, block) if block is not None else self._scaled()
        values: Tensor = (values_OI.t() if self.transposed else values_OI).reshape(self.shape).contiguous()
        return values

    @classmethod
    def of_blocks(cls, rows_Oy: Tensor, form: BlockFormat, shape: tuple[int, ...], *, transposed: bool) -> Quantized:
        """Return the rows of bytes of GGUF blocks as codes."""
        nothing = torch.empty(len(rows_Oy), 0, dtype=torch.float16)
        return cls(rows_Oy, nothing, None, QuantSpec.of_block(form), shape, transposed)

    def _scaled(self) -> Tensor:
        codes_OGg = self.spec.steps(self.codes).reshape(-1, self.num_groups, self.group_size)
        if self.zero_point is not None:
            codes_OGg = codes_OGg - self.zero_point.float().unsqueeze(-1)
        return (codes_OGg * self.scale.float().unsqueeze(-1)).flatten(1)

    def rows(self, first: int, last: int, shape: tuple[int, ...], *, transposed: bool = False) -> Quantized:
        """Return the codes of some rows, as those of a parameter of its own."""
        zero_point = None if self.zero_point is None else self.zero_point[first:last]
        return Quantized(self.codes[first:last], self.scale[first:last], zero_point, self.spec, shape, transposed)


def rows_of(weight: Tensor, transposed: bool = False) -> Tensor:
    """Return a parameter of any rank as a matrix [O, I]: one row per output channel."""
    return (weight.t() if transposed else weight.flatten(1)).contiguous()
