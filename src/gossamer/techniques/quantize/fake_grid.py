"""Train weights through their rounding: the network computes with what its files will hold, at every step.

Quantization-aware training (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, section 3) with learned step sizes (Esser et al., "Learned Step Size
Quantization", 2020, section 2). For a weight with codes q, zero points z and scales s:

    w' = (round(clamp(u)) - z) store(s f)        u [O, I] and f [O, G] are trained; u = q and f = 1 at first

`store` gives the numbers that files hold (float16). Both roundings are straight-through, and with D = dL/dw'

    dL/du = D s f inside the grid, 0 beyond its ends          dL/df = sum over g of D w' / f

so a weight's code changes once gradients that agree have pushed u half a step off, and the first forward pass is that
of the rounded model as it came. From where the float weight lies in its cell some codes would change at once, whatever
their gradients say; what a solver has balanced is then lost faster than anything is learned (MiniLM at 3 bits behind
GPTQ: loss on rows held back 0.036 before, up to 0.25 after; from the middle 0.028).

Different from the papers: u is counted in steps of the grid instead of being the float weight, so that a change of
scale takes the weights along, and one learning rate fits layers of any size. Adam moves every number by about its
rate: u is held as p = u / reach, so that it moves `reach` times as far as f. Zero points stay (integers in every file).

Shape suffixes: O rows, I inputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from gossamer.models.levels import tensor_scale
from gossamer.models.parametrized import parametrized
from gossamer.models.quantized import Quantized, rows_of
from gossamer.models.straight_through import straight_through
from gossamer.techniques.quantize.grid import storable
from gossamer.techniques.quantize.scale_descent import LARGEST_FACTOR, SMALLEST_FACTOR, scaled


class FakeGrid(nn.Module):
    """Compute a weight from its trained position in the grid, and the trained factors of its scales."""

    codes: Tensor
    scale_OG: Tensor
    zero_OG1: Tensor
    stays: Tensor | None

    def __init__(self, codes: Quantized, *, reach: float, masked: bool = False) -> None:
        """`masked`: weights that are zero stay zero."""
        super().__init__()
        assert codes.spec.number_format is None, "the codes are not integers"
        self.start, self.reach = codes, reach
        zero = torch.zeros_like(codes.scale) if codes.zero_point is None else codes.zero_point
        self.register_buffer("scale_OG", codes.scale.float(), persistent=False)
        self.register_buffer("zero_OG1", zero.float().unsqueeze(-1), persistent=False)
        self.register_buffer("stays", codes.dequantize() != 0 if masked else None, persistent=False)
        self.factor_OG = nn.Parameter(torch.ones_like(self.scale_OG))

    def position(self) -> Tensor:
        """Return where training starts: p = q / reach, in the shape of the parameter."""
        return self._shaped(self.start.codes.float() / self.reach).contiguous()

    def forward(self, position: Tensor) -> Tensor:
        """Return the weight that the files will hold, with a graph to position and factors."""
        if self.stays is not None:
            position = torch.where(self.stays, position, position.detach())
        spec = self.start.spec
        inside = (position * self.reach).clamp(spec.low, spec.high)
        codes = straight_through(inside, inside.detach().round())
        rows_OI = rows_of(codes, self.start.transposed).reshape(self.start.codes.shape)
        codes_OGg = rows_OI.reshape(-1, self.start.num_groups, self.start.group_size)
        return self._shaped(((codes_OGg - self.zero_OG1) * self._scale().unsqueeze(-1)).flatten(1))

    def rounded(self, position: Tensor) -> Quantized:
        """Return codes and scales by now: those whose values `forward` returns."""
        spec = self.start.spec
        inside = (position.detach() * self.reach).clamp(spec.low, spec.high).round()
        codes = rows_of(inside, self.start.transposed).reshape(self.start.codes.shape)
        return scaled(replace(self.start, codes=codes.to(torch.int8)), self._factor().detach())

    def _factor(self) -> Tensor:
        return self.factor_OG.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)

    def _scale(self) -> Tensor:
        found_OG = self.scale_OG * self._factor()
        unit = tensor_scale(float(self.scale_OG.max()))
        return straight_through(found_OG, storable(found_OG.detach(), self.start.spec, unit))

    def _shaped(self, values_OI: Tensor) -> Tensor:
        return (values_OI.t() if self.start.transposed else values_OI).reshape(self.start.shape)


@contextmanager
def fake_grids(
    network: nn.Module, codes: Mapping[str, Quantized], *, reach: float, masked: bool = False
) -> Iterator[Mapping[str, tuple[nn.Parameter, FakeGrid]]]:
    """Put the weights of a network behind their grids while the `with` lasts; yield (position, grid) by name.

    Tied weights stay one. Afterwards the network has plain weights again, with the values of `codes`.

    >>> with fake_grids(network, {"fc.weight": codes}, reach=20) as grids:  # doctest: +SKIP
    ...     train(network)
    ...     position, grid = grids["fc.weight"]
    ...     found = grid.rounded(position)
    """
    grids = {}
    for name, held in codes.items():
        grids[name] = FakeGrid(held, reach=reach, masked=masked)
        with torch.no_grad():
            network.get_parameter(name).copy_(grids[name].position())
    try:
        with parametrized(network, grids) as positions:
            yield {name: (position, grids[name]) for name, position in positions.items()}
    finally:
        with torch.no_grad():
            for name, held in codes.items():
                network.get_parameter(name).copy_(held.dequantize())
