"""The technique `compensate`: thin layers beside rounded weights that take most of the rounding error off the outputs.

Liu et al., "EoRA", 2024; the solver and its equation are in `techniques/quantize/low_rank.py`. Blocks are taken in
order, with the codes that earlier steps decided; the error of a weight is what it was in the original less those codes.
The layers stay in the artifact (as an adapter that `peft` reads beside a Hugging Face folder, as two more products in a
graph), where they take 16 R (O + I) bits. `lora` goes on from them.

Where the layer has a bias the moments are taken around the mean, and the bias takes what is left of the mean error.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.adapters import adapted_map, put_adapter
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import ModelMap
from gossamer.techniques.adapt.layers import ThinLayers
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.quantize.bias import corrected_bias
from gossamer.techniques.quantize.low_rank import low_rank
from gossamer.techniques.sweep import Sweep

MIN_SAMPLES = 8
# what leaves a weight's error to be told by the original: all else changes the weights that are rounded
ROUNDING = ("quantize", "gptq", "learned_rounding", "tune_scales", "sparsify")


class Compensate(ThinLayers, BlockTechnique):
    """Put two thin layers beside each rounded linear layer, the nearest to its rounding error on calibration rows.

    In a recipe behind the step that rounds: `- compensate: {rank: 16}`. Liu et al., "EoRA", 2024, section 3.2.
    """

    name: ClassVar[str] = "compensate"
    family: ClassVar[str] = "adapt"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        roles=("linear",),
        after=ROUNDING,
        before=("lora", "kv_cache", "cast"),
        excludes=("vocabulary", "prune", "low_rank", "distill", "rotate", "smooth", "awq"),
    )

    damping: float = Field(0.01, gt=0, description="share of the mean second moment that is added to the diagonal")

    _codes: Mapping[str, Quantized] = PrivateAttr(default_factory=dict)  # while it is carried out: those that stay
    _whole: nn.Module | None = PrivateAttr(default=None)  # and the original

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model with the thin layers."""
        return adapted_map(model, {layer.name: self.rank for layer in self.chosen(model)})

    def label(self) -> str:
        """Return the rank: `compensate rank 16`."""
        return f"{self.name} rank {self.rank}"

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with a correction beside each matched weight that has codes."""
        if candidate.weights is not None:
            raise TechniqueError(
                "compensate needs the model whole, and this one is read piece by piece",
                "raise --memory, or leave the step out",
            )
        others = [name for entry in candidate.applied for name in entry if name not in ROUNDING]
        if others:
            raise TechniqueError(
                f"{others[0]} changed weights before they were rounded: what rounding lost of them is not known",
                "leave one of the two steps out",
            )
        layers = {f"{one.name}.weight": one for one in self.chosen(model)}
        plain = [name for name in layers if name not in candidate.quantized]
        if plain:
            raise TechniqueError(
                f"{len(plain)} of {len(layers)} layers were not rounded before, {plain[0]} first: there is no error",
                "name them under `ignore`, or round them in a step before this one",
            )
        codes = {name: candidate.quantized[name] for name in layers}
        decisions = [Decision(parameter=name, layer=layer, weight=codes[name].spec) for name, layer in layers.items()]
        whole = candidate.source.module(context.task)
        for name, layer in layers.items():
            rank, (outputs, inputs) = self.rank, layer.shape
            put_adapter(candidate.module, layer.name, torch.zeros(outputs, rank), torch.zeros(rank, inputs))
            candidate.unset_quantized(name, whole.get_parameter(name).detach())
        # the sweep runs beside the weights as they were: it tells errors with the correction and without (biases are as
        # rounding left them on both sides, and are found anew from the original's)
        carried_out = self.model_copy()
        carried_out._codes, carried_out._whole = codes, whole
        Sweep(carried_out, candidate, model, context, decisions).run()
        candidate.applied.append(self.entry())
        return candidate

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def plain_codes(self, block: Block, parameters: Iterable[str] | None = None) -> dict[str, Quantized]:
        """Return the codes as they are: what a correction is compared with."""
        return {name: self._codes[name] for name in (block.decisions if parameters is None else parameters)}

    def solve(self, block: Block) -> None:
        """Put the codes back, with what corrects them beside; a layer that no sample reaches gets the nearest."""
        moments = block.moments()
        for parameter, decision in block.decisions.items():
            seen, codes, layer = moments.pop(parameter, None), self._codes[parameter], decision.layer.name
            known = block.enough(parameter, seen, "corrected without")
            before_OI, rounded_OI = block.weight(parameter).float().clone(), codes.to(block.device).dequantize()
            second_II = torch.eye(before_OI.shape[1], device=before_OI.device)
            bias = self._bias(layer)
            if known:
                assert seen is not None
                second_II = seen.second_II if bias is None else seen.covariance_II
            up_OR, down_RI = low_rank(before_OI - rounded_OI, second_II, self.rank, damping=self.damping)
            if bias is not None and known:
                assert seen is not None
                left = corrected_bias(bias.to(block.device), before_OI, rounded_OI + up_OR @ down_RI, seen.mean_I)
                block.set_weight(f"{layer}.bias", left)
            block.set_quantized(parameter, codes)
            block.set_weight(f"{layer}.lora_A.weight", down_RI.half())
            block.set_weight(f"{layer}.lora_B.weight", up_OR.half())

    def _bias(self, layer: str) -> Tensor | None:
        """Return the original's bias of a layer, or None."""
        assert self._whole is not None
        found: dict[str, Any] = dict(self._whole.get_submodule(layer).named_parameters())
        return found["bias"].detach() if "bias" in found else None

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: one bit more costs as many bytes (docs/concepts/adapters.md)."""
        yield from ()
