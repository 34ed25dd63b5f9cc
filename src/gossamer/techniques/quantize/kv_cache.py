"""The technique `kv_cache`: scales with which a server keeps keys and values in 8 bits.

The rule and the scales are those of `models/caches.py`. The largest key and value of the calibration samples decide: a
key that is cut off is wrong for every later token, while a scale twice as large costs fp8 nothing (its steps are
relative) and int8 one bit.

Left out: zero points (vLLM has none), other widths, and caches of encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.caches import Cache, CacheSpec, cache_argument, intercept
from gossamer.models.candidate import Candidate
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.models.walker import Walker
from gossamer.tasks.base import spread
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique

MIN_SAMPLES = 4
KEY_ROLES = ("k", "qkv")
DECODERS = "AutoModelForCausalLM"
PARTS = ("k_scale", "v_scale")  # the names that vLLM and compressed-tensors read


class KvCache(Technique):
    """Find the scales with which attention's keys and values are kept in 8 bits, and judge the model that way.

    In a recipe behind the steps that change weights: `- kv_cache: {format: fp8}`. Weights stay as they are; a server
    that reads `kv_cache_scheme` (vLLM) keeps half of the cache's bytes. Hooper et al., "KVQuant", 2024, sections 2 and
    3.1, is the source for keys being harder to round than values.
    """

    name: ClassVar[str] = "kv_cache"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        roles=KEY_ROLES,
        after=(
            *("quantize", "gptq", "learned_rounding", "awq", "smooth", "rotate", "sparsify", "tune_scales", "qat"),
            "cast",
        ),
    )

    format: Literal["fp8", "int8"] = Field("fp8", description="what keys and values are kept as")
    scope: Literal["tensor", "head"] = Field("tensor", description="one scale for an attention, or one for each head")
    samples: int = Field(64, ge=MIN_SAMPLES, description="calibration samples that are used, evenly spread")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return two decisions for each attention of a stack: its keys and its values."""
        return [
            Decision(parameter=f"{name}.{part}", layer=layer, cache=self._spec())
            for name, layer in self._attentions(model).items()
            for part in PARTS
        ]

    def label(self) -> str:
        """Return the format: `kv_cache fp8 per tensor`."""
        return f"kv_cache {self._spec()}"

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the samples in front of a block and behind it."""
        return super().working_bytes(model, num_samples, sample_bytes) + 2 * self._count(num_samples) * sample_bytes

    def model_passes(self, num_samples: int, left: float = 1.0) -> float:
        """Return one pass of the candidate a sample."""
        return left * self._count(num_samples)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with scales for the keys and values of every attention."""
        names = list(self._attentions(model))
        for name in names:
            self._check(candidate, context, name)
        if len(context.calibration) < self.rows_needed():
            raise TechniqueError(
                f"kv_cache needs {self.rows_needed()} calibration samples, {len(context.calibration)} were given",
                "give more rows with --data",
            )
        scales = self._observed(candidate, model, context, names)
        if unseen := [name for name in names if name not in scales]:
            raise TechniqueError(
                f"{len(unseen)} attentions put nothing into a cache, {unseen[0]} first",
                "kv_cache is for decoder-only language models: leave the step out",
            )
        candidate.caches.update({name: Cache(self._spec(), *scales[name]) for name in names})
        candidate.applied.append(self.entry())
        return candidate

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it changes neither the bytes of files nor a single pass, only what a server keeps."""
        yield from ()

    def _spec(self) -> CacheSpec:
        return CacheSpec(format=self.format, scope=self.scope)

    def _count(self, num_samples: int) -> int:
        return min(self.samples, num_samples)

    def _attentions(self, model: ModelMap) -> dict[str, LayerInfo]:
        """Return the layer that makes the keys, by the name of its attention."""
        makers = [layer for layer in model.layers if layer.role in KEY_ROLES and layer.stack is not None]
        if not makers:
            raise RecipeError(
                f"kv_cache finds no attention: none of {len(model.layers)} layers makes keys",
                "leave the step out; `gossamer inspect` lists the roles",
            )
        return {layer.name.rpartition(".")[0]: layer for layer in makers}

    def _check(self, candidate: Candidate, context: Context, name: str) -> None:
        """Raise TechniqueError for an attention whose cache is not reached, or is rounded already."""
        if name in candidate.caches:
            raise TechniqueError(f"the cache of {name} has scales already", "keep one `kv_cache` step of the recipe")
        attention = candidate.module.get_submodule(name)
        if cache_argument(attention) is None or context.task.auto_class != DECODERS:
            raise TechniqueError(
                f"{name} ({type(attention).__name__}, {context.task.name}) keeps no keys and values for later tokens",
                "kv_cache is for decoder-only language models: leave the step out",
            )

    def _observed(
        self, candidate: Candidate, model: ModelMap, context: Context, names: list[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the scales of keys and of values that hold all samples, by attention."""
        spec, found = self._spec(), dict[str, tuple[Tensor, Tensor]]()

        def note(keys: Tensor, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
            if not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
                raise TechniqueError(
                    f"keys or values of {name} are NaN or infinite on a calibration row", "check the rows and the model"
                )
            seen = spec.scale(keys), spec.scale(values)
            before = found.get(name, seen)
            found[name] = torch.maximum(before[0], seen[0]), torch.maximum(before[1], seen[1])
            return keys, values

        picked = spread(context.calibration, self._count(len(context.calibration)))
        samples = [{name: torch.from_numpy(values) for name, values in batch.inputs.items()} for batch in picked]
        source, output = candidate.source, context.task.output
        walker = Walker(candidate.module, lambda module, inputs: source.forward(module, inputs, output), samples)
        stacks = [stack for stack in model.stacks if any(name.startswith(f"{stack.name}.") for name in names)]
        with (
            candidate.simulated(),
            torch.no_grad(),
            ExitStack() as hooks,
            context.progress.stage("kv_cache: samples", len(samples)) as advance,
        ):
            for name in names:
                handle = intercept(candidate.module.get_submodule(name), partial(note, name=name))
                hooks.callback(handle.remove)
            for _ in walker.outputs(stacks, candidate.held):
                advance(1)
        return found
