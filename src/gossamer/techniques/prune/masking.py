"""The sweep of `prune`: units go to zero in the weights that read them, block after block, and the others make up.

Which go is known beforehand (a choice that holds for several blocks, or from gradients), or found here by `obs` from
what the blocks before have become. A bias takes the mean error of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch

from gossamer.models.quantized import rows_of
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import CHANGED_BYTES, BlockTechnique
from gossamer.techniques.prune.units import made_up_for, magnitude_scores, obs_order
from gossamer.techniques.quantize.bias import corrected_bias

MIN_SAMPLES = 8


class Masking(BlockTechnique):
    """Sweep over the blocks, set units to zero in the weights that read them, and let the other weights make up."""

    name: ClassVar[str] = "prune"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(calibration_rows=MIN_SAMPLES)

    value_bytes: ClassVar[int] = CHANGED_BYTES

    step: dict[str, Any]  # the recipe's entry that it is a part of
    readers: dict[str, tuple[int, int]]  # weight -> (columns of a unit, units that go)
    chosen: dict[str, tuple[int, ...]]  # weight -> the units that go, where they are known before the sweep
    refit: bool
    damping: float

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each weight that reads a dimension."""
        layers = {f"{layer.name}.weight": layer for layer in model.layers}
        return [Decision(parameter=name, layer=layer) for name, layer in layers.items() if name in self.readers]

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it is a part of `prune`."""
        yield from ()

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def solve(self, block: Block) -> None:
        """Take units out of each weight that reads them; one that no sample reaches loses them by magnitude.

        Layers outside of blocks are solved in order, from what those before have become.
        """
        if not block.calls and len(block.inside) > 1 and block.team.size == 1:
            for parameter, decision in block.decisions.items():
                alone = {parameter: decision}
                self.solve(replace(block, decisions=alone, inside=alone))
            return
        moments = block.moments()
        for parameter, decision in block.decisions.items():
            seen, transposed = moments.pop(parameter, None), decision.layer.transposed
            weight = block.weight(parameter)
            before_OI = rows_of(weight.float(), transposed)
            unit, count = self.readers[parameter]
            enough = block.enough(parameter, seen, "cut by magnitude")
            bias = self._bias_of(block, parameter)
            second_II = None
            if enough:
                assert seen is not None
                second_II = seen.covariance_II if bias else seen.second_II
            gone = list(self.chosen.get(parameter, ()))
            if not gone and second_II is None:
                gone = torch.argsort(magnitude_scores(before_OI, unit), stable=True)[:count].tolist()
            elif not gone:
                assert second_II is not None
                gone = obs_order(before_OI, second_II, unit, count, damping=self.damping)
            stays_I = torch.ones(before_OI.shape[1] // unit, unit, dtype=torch.bool, device=before_OI.device)
            stays_I[torch.tensor(gone, dtype=torch.long, device=stays_I.device)] = False
            after_OI = before_OI * stays_I.flatten()
            if self.refit and second_II is not None:
                after_OI = made_up_for(before_OI, second_II, stays_I.flatten(), damping=self.damping)
            if bias and enough and seen is not None:
                block.set_weight(bias, corrected_bias(block.weight(bias), before_OI, after_OI, seen.mean_I))
            block.set_weight(parameter, (after_OI.t() if transposed else after_OI).reshape(weight.shape).contiguous())

    def _bias_of(self, block: Block, parameter: str) -> str | None:
        owner = block.candidate.module.get_submodule(parameter.rpartition(".")[0])
        name = f"{parameter.rpartition('.')[0]}.bias"
        return name if self.refit and getattr(owner, "bias", None) is not None else None

    def entry(self) -> dict[str, Any]:
        """Return the recipe's entry, and what was chosen beforehand."""
        return {**self.step, "chosen": {name: list(units) for name, units in self.chosen.items()}}
