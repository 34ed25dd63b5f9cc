"""The technique `cast`: store what is left in floating point as bfloat16 or float16.

bfloat16 keeps float32's range and 8 bits of precision (relative step 2^-8); float16 keeps 11 bits but overflows above
65504 and underflows below 6e-8: values outside are counted and refused rather than turned into infinities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique, searched

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Cast(Technique):
    """Store every remaining floating-point tensor in 16 bits. In a recipe: `- cast: {dtype: bf16}`."""

    name: ClassVar[str] = "cast"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(after=("quantize",))

    dtype: Literal["bf16", "fp16"] = searched("bf16", ["bf16", "fp16"], "the 16-bit format")

    def label(self) -> str:
        """Return the format: `cast bf16`."""
        return f"cast {self.dtype}"

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each layer that owns its weight."""
        return [
            Decision(parameter=f"{layer.name}.weight", layer=layer, dtype=self.dtype)
            for layer in model.layers
            if layer.tied_to is None
        ]

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with its float tensors rounded to 16 bits; they stay float32 in memory.

        Raises TechniqueError when a finite value would become infinite in float16.
        """
        dtype = DTYPES[self.dtype]

        def rounded(name: str, values: Tensor) -> Tensor:
            found = values.to(dtype).to(values.dtype)
            overflown = int((torch.isfinite(values) & ~torch.isfinite(found)).sum())
            if overflown:
                largest = float(values.abs().max())
                raise TechniqueError(
                    f"{overflown} values of {name} overflow {self.dtype}: the largest is {largest:.3g}, "
                    f"the format ends at {torch.finfo(dtype).max:.3g}",
                    "use cast: {dtype: bf16}",
                )
            return found

        candidate.replace_floats(rounded)
        candidate.dtype = dtype
        candidate.applied.append(self.entry())
        return candidate

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Cast, ...]]:
        """Yield each 16-bit format alone."""
        for dtype in cls.domain("dtype"):
            yield (cls(dtype=dtype),)
