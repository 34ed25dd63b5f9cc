"""The technique `lora`: thin layers are trained beside weights that stand still, then kept there or added to them.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; over rounded weights, Dettmers et al., "QLoRA",
2023. The thin layers are `peft`'s while they are trained (kinds: `train/adapters.py`). They begin at nothing, or where
`compensate` left them.

    keep     they stay beside the weight: an adapter that `peft` reads beside a Hugging Face folder, two more products
             in a graph. 16 R (O + I) bits.
    merge    W' = W + U D takes their place, in float32. Where W had codes, the step that rounded it rounds W' with the
             same settings and calibration rows. Whatever of U D is smaller than a step of the grid may be lost there:
             the loss is measured again, and where nothing of the gain is left the codes stay as they were.

Weights that an earlier step made zero are zero after merging too.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.adapters import adapted_map, put_adapter, taken_out
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.recipe import Step
from gossamer.techniques.adapt.layers import ThinLayers
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.prune.masks import has_masks
from gossamer.techniques.training import FLOAT_BYTES, TrainingTechnique
from gossamer.train.lesson import Lesson
from gossamer.train.objectives import Objective

RANKS_BYTES = 1.5 * 1.5  # of adalora, beside lora's: more ranks at the beginning, two averages of each number
PROJECTIONS = "projections."  # before their names among what was learned
KEPT = ("lora", "rslora")  # kinds that can stay beside a weight
SCALED = {"k": False, "v": False, "down": True}  # roles of layers that ia3 gives lengths, True: to their inputs


_WHY_MERGED = {
    "dora": "changes the lengths of a weight's rows, which no thin layer beside it can",
    "adalora": "finds the rank of each layer while it trains, and files are planned before",
    "ia3": "has no thin layers: its lengths are the weight's own",
}


class Lora(ThinLayers, TrainingTechnique):
    """Train thin layers beside the linear layers inside blocks, whose own weights stand still.

    In a recipe: `- lora: {rank: 16, epochs: 3}`, before or behind steps that round; with `merge: true` the change ends
    in the weights, else beside them. Hu et al., "LoRA", 2021.
    """

    name: ClassVar[str] = "lora"
    family: ClassVar[str] = "adapt"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        roles=("linear",),
        after=("vocabulary", "prune", "sparsify", "low_rank", "distill", "compensate"),
        before=("kv_cache", "cast"),
    )

    alpha: int = Field(32, ge=1, description="the change is scaled by alpha / rank")
    kind: Literal["lora", "rslora", "dora", "adalora", "ia3"] = Field(
        "lora",
        description="lora; rslora: with alpha / sqrt rank; dora: with trained lengths of outputs; adalora: ranks that "
        "go where they do most, `rank` in the mean; ia3: lengths of keys, values and inner channels alone",
    )
    merge: bool = Field(False, description="add the change to the weights at the end, instead of keeping it beside")
    rate: float = Field(2e-4, gt=0, lt=0.1, description="the highest learning rate; it falls along half a cosine")

    def chosen(self, model: ModelMap) -> list[LayerInfo]:
        """Return the layers that get thin ones, or lengths."""
        found = super().chosen(model)
        if self.kind != "ia3":
            return found
        scaled = [layer for layer in found if layer.role in SCALED]
        if not scaled:
            raise RecipeError(
                f"lora matches {len(found)} layers, and none of them makes keys or values or reads a feed-forward "
                "layer's inner channels: ia3 has nothing to scale",
                "loosen `targets`, or choose another kind",
            )
        return scaled

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: what weights hold is other steps' matter. Raises RecipeError as `ThinLayers.resolve`."""
        if self.kind != "ia3":
            return super().resolve(model)
        self.chosen(model)
        return []

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model with the thin layers, or without any where they are merged."""
        return adapted_map(model, {layer.name: 0 if self.merge else self.rank for layer in self.chosen(model)})

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the original, and of what is trained with gradients and two moments."""
        sides = sum(sum(layer.shape) for layer in self.chosen(model))
        trained = {"ia3": 1, "adalora": RANKS_BYTES * self.rank}.get(self.kind, self.rank) * sides
        return FLOAT_BYTES * (model.num_parameters + 4 * math.ceil(trained))

    def label(self) -> str:
        """Return kind and rank: `lora rank 16`."""
        rank = "" if self.kind == "ia3" else f" rank {self.rank}"
        return f"{self.kind}{rank}{', merged' if self.merge else ''}"

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate after training, or as it was where rows held back say that it is not better."""
        self._check(candidate, context)
        layers = self.chosen(model)
        names = [layer.name for layer in layers]
        begun = self._begun(candidate, names)
        found, values = self._learned(candidate, context, partial(self._trained, candidate, context, layers, begun))
        if not self.merge:
            for name in names:
                put_adapter(candidate.module, name, values[f"{name}.up"], values[f"{name}.down"])
        elif found["kept"]:
            leads = {name: value for name, value in values.items() if name.startswith(PROJECTIONS)}
            merged = {name: value for name, value in values.items() if name not in leads}
            leads = {name.removeprefix(PROJECTIONS): value for name, value in leads.items()}
            self._merge(candidate, model, context, merged, leads, found)
        candidate.applied.append(self.entry())
        return candidate

    def _check(self, candidate: Candidate, context: Context) -> None:
        super()._check(candidate, context)
        if self.kind not in KEPT and not self.merge:
            raise TechniqueError(
                f"{self.kind} {_WHY_MERGED[self.kind]}",
                "set merge: true, or kind: lora",
            )

    def _begun(self, candidate: Candidate, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Take out the thin layers that an earlier step left; raise where this one does not go on from them."""
        begun = taken_out(candidate.module)
        if begun and self.merge:
            raise TechniqueError(
                f"compensate corrects what rounding did to {len(begun)} weights, and merging would round them again",
                "leave compensate out, or set merge: false",
            )
        ranks = {down_RI.shape[0] for _, down_RI in begun.values()}
        if begun and (set(begun) != set(names) or ranks != {self.rank} or self.kind not in KEPT):
            raise TechniqueError(
                f"compensate left layers of rank {max(ranks)} beside {len(begun)} weights, and this step trains "
                f"{self.kind} of rank {self.rank} beside {len(names)}",
                "give both steps the same rank, targets and ignore, and kind: lora or rslora",
            )
        return begun

    def _trained(
        self,
        candidate: Candidate,
        context: Context,
        chosen: Sequence[LayerInfo],
        begun: Mapping[str, tuple[Tensor, Tensor]],
        checkpoints: Path,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train, leave the candidate without thin layers, and return what came of it: the loss, and the values.

        Values are what weights and biases become, by their names, where they are merged; else the thin layers.
        """
        from gossamer.train.adapters import adapters, read_adapter  # peft takes seconds to import
        from gossamer.train.loop import train

        lesson = self._lesson(candidate, context)
        names = [layer.name for layer in chosen]
        of_inputs = [layer.name for layer in chosen if SCALED.get(layer.role)]
        put = adapters(
            candidate.module, names, rank=self.rank, alpha=self.alpha, kind=self.kind, of_inputs=of_inputs,
            start=begun, seed=context.seed,
        )  # fmt: skip
        with put as layers:
            if self.kind == "adalora":
                lesson = _with_moving_ranks(lesson, layers, self.rank, self.alpha)
            only = frozenset(name for name, part in candidate.module.named_parameters() if part.requires_grad)
            plan = replace(self._plan(context), only=only)
            outcome = train(lesson, plan, checkpoints, context.progress, label=self.name, team=context.team)
            values = {}
            for name, layer in layers.items():
                adapter = read_adapter(layer)
                if self.merge:
                    values[f"{name}.weight"] = adapter.merged
                    if adapter.merged_bias is not None:
                        values[f"{name}.bias"] = adapter.merged_bias
                else:
                    assert adapter.thin is not None
                    values |= {f"{name}.up": adapter.thin[0], f"{name}.down": adapter.thin[1]}
        if self.merge and lesson.projections is not None:  # what is merged is judged by the same
            values |= {PROJECTIONS + name: value.detach() for name, value in lesson.projections.state_dict().items()}
        return self._told(outcome, lesson, context, otherwise="nothing is changed"), values

    def _merge(
        self,
        candidate: Candidate,
        model: ModelMap,
        context: Context,
        values: Mapping[str, Tensor],
        leads: Mapping[str, Tensor],
        found: Mapping[str, Any],
    ) -> None:
        """Put other weights and biases in place: zero where masks were, rounded again where there were codes."""
        codes = {name: candidate.quantized[name] for name in values if name in candidate.quantized}
        parameters = {name for name, _ in candidate.module.named_parameters()}
        biases = {name.removesuffix("weight") + "bias" for name in codes} & parameters  # rounding corrects them
        plain = {name: candidate.values(name).clone() for name in {*values, *biases} if name not in codes}
        masked = has_masks(candidate.applied)
        for name, merged in values.items():
            holes = masked and merged.ndim > 1
            now = torch.where(candidate.values(name) == 0, 0.0, merged) if holes else merged
            if name in codes:
                candidate.unset_quantized(name, now)
            else:
                candidate.put_weight(name, partial(_itself, now))
        if not codes:
            return
        identity = {**context.identity, "merged": [*candidate.applied, self.entry()], "rows": context.training_print}
        _round_again(candidate, model, replace(context, identity=identity), codes)
        moved = sum(int((candidate.quantized[name].codes != before.codes).sum()) for name, before in codes.items())
        share = moved / sum(before.codes.numel() for before in codes.values())
        after = self._loss(candidate, context, leads)
        stays = "" if after < found["before"] else ": nothing is left of the gain, so the codes stay as they were"
        context.progress.say(
            f"{self.name}: merged and rounded again, {share:.1%} of the codes moved: loss {after:.3e} where it was "
            f"{found['before']:.3e} before and {found['after']:.3e} with the change beside{stays}"
        )
        if stays:
            for name, before in codes.items():
                candidate.set_quantized(name, before)
            for name, value in plain.items():
                candidate.put_weight(name, partial(_itself, value))

    def _loss(self, candidate: Candidate, context: Context, leads: Mapping[str, Tensor]) -> float:
        """Return the loss on the rows held back, `leads` being the values of projections that were trained with."""
        from gossamer.train.loop import judge

        lesson = self._lesson(candidate, context)
        if lesson.projections is not None:
            lesson.projections.load_state_dict(dict(leads))
        return judge(lesson, self._plan(context), context.team)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it is carried out where a recipe asks for it."""
        yield from ()


def _with_moving_ranks(lesson: Lesson, layers: Mapping[str, Any], rank: int, alpha: int) -> Lesson:
    """Return a lesson in which ranks go from layer to layer."""
    from gossamer.train import ranks  # peft takes seconds to import

    moving = ranks.MovingRanks(layers, ranks.settings(rank, alpha, list(layers)))
    orthogonal: Objective = ranks.Orthogonal(moving.layers)
    return replace(lesson, schedule=moving, objectives=[*lesson.objectives, (ranks.ORTHOGONAL, orthogonal)])


def _itself(values: Tensor) -> Tensor:
    return values


def _round_again(candidate: Candidate, model: ModelMap, context: Context, codes: Mapping[str, Quantized]) -> None:
    """Round weights that had codes by the steps that made these, with the same settings."""
    from gossamer.techniques.registry import build  # which imports every technique

    entries, left = list(candidate.applied), set(codes)
    for name, settings in (item for entry in entries for item in entry.items()):
        step = build(Step(technique=name, settings=settings))
        decided = step.resolve(model) if step.family == "quantize" else []
        names = [one.layer.name for one in decided if one.weight is not None and one.parameter in left]
        if names:
            step.model_copy(update={"targets": tuple(names), "ignore": ()}).apply(candidate, model, context)
            left -= {f"{name}.weight" for name in names}
    assert not left, f"no step that was applied rounds {sorted(left)[0]}"
    candidate.applied[:] = entries
