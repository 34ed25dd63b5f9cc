"""GPTQModel's own solver on single layers, on the given grid and as it is by default.

Its class for one module is given inputs with the place's second moments. For the given grid, scales are rounded to the
float16 numbers that ours are, and zero points stay those of the unrounded ones, as in ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from gptqmodel.quantization.quantizer import Quantizer
from places import BLOCK, DAMPING, GRIDS, Place, Solve, run
from torch import Tensor, nn


class Float16Scales(Quantizer):
    """Take the same grids with the scales that a file holds."""

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Find the grid of a group of weights."""
        super().find_params(x, weight=weight)
        self.scale = self.scale.half().float()


class OnFloat16Scales(GPTQ):
    """Solve with these."""

    def create_quantizer(self, name: str) -> Quantizer:
        """Return what finds grids."""
        return Float16Scales(qcfg=self.qcfg, name=name)


def gptq(place: Place, solver: type[GPTQ], grid: str, **settings: Any) -> dict[str, Tensor]:
    """Solve each layer."""
    inputs = place.inputs()
    found = {}
    for name, weight in place.weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        bits, symmetric, group_size = GRIDS[grid]["bits"], GRIDS[grid]["symmetric"], GRIDS[grid]["group_size"]
        config = QuantizeConfig(bits=bits, sym=symmetric, group_size=group_size, damp_percent=DAMPING, **settings)
        config.static_groups = bool(settings.get("desc_act"))
        task = solver(layer, config)
        task.quantizer.configure(perchannel=True)
        task.add_batch(inputs[None], torch.empty(0))
        found[name] = task.quantize(blocksize=BLOCK)[0].detach().clone()
    return found


SOLVERS: Mapping[str, Solve] = {
    "gptq int4-g64 static": partial(gptq, solver=OnFloat16Scales, grid="int4-g64", desc_act=True),
    "gptq int4-g64 own": partial(gptq, solver=GPTQ, grid="int4-g64"),
}

if __name__ == "__main__":
    sys.exit(run(SOLVERS, ("gptqmodel",)))
