"""Rotate a model's residual stream, so that no channel stands out before weights are rounded; the function stays.

Ashkboos et al., "SliceGPT", 2024, section 3 (computational invariance), and "QuaRot", 2024, section 4, stage 1. In a
pre-norm model whose norms are RMSNorms, with a rotation Q (a Hadamard matrix with random signs, `hadamard.py`):

    norms       their weights go into the layers that read them; what is left commutes with Q
    writers     embeddings, o and down write y Q
    readers     q, k, v, up, gate and the head read x Q as they read x before

The artifact is an ordinary model of the same architecture. What reads and what writes the stream is seen in one pass
(`dataflow.py`), and afterwards the model must give the same outputs on the example as before, else it is put back and
refused: a LayerNorm, a norm behind the sum, or anything else that touches the stream channel by channel.

A head that shares the embedding's weight: both become E Q, but only an untied head can take the last norm's weight.
So a tied model is rotated only where that norm has one factor for all channels, which then stays in the norm.

Shape suffixes: H channels of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.dataflow import evaluating, follow
from gossamer.models.quantized import rows_of
from gossamer.models.roles import ModelMap
from gossamer.models.structure import layer_kind
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.quantize.hadamard import fold_norm, random_hadamard, rotate_inputs, rotate_outputs

SAME = 1e-3  # root mean square change of the outputs, relative to theirs, that rounding explains
LEAVE_OUT = "leave `rotate` out: this model's stream cannot be rotated"


@dataclass(frozen=True)
class Residual:
    """Name what touches the residual stream: `norms` with the layers that read each, `writers`, `tables`."""

    width: int
    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    tables: tuple[str, ...]
    turned: frozenset[str]


class Rotate(Technique):
    """Rotate the residual stream by a random Hadamard matrix, fused into the weights; the function stays the same.

    In a recipe it stands before the step that rounds: `- rotate: {}` and `- gptq: {bits: 4}`. For pre-norm models with
    RMSNorms (Llama and its kin) whose head has a weight of its own. Ashkboos et al., "QuaRot", 2024, stage 1.
    """

    name: ClassVar[str] = "rotate"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(
        roles=("linear",), before=("quantize", "gptq", "learned_rounding", "awq", "smooth", "cast")
    )

    seed: int = Field(0, ge=0, description="of the random signs")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return the embeddings and linear layers, some of which touch the stream; one pass of `apply` tells which."""
        decisions = [
            Decision(parameter=layer.tied_to or f"{layer.name}.weight", layer=layer)
            for layer in model.layers
            if layer.kind in ("linear", "embedding")
        ]
        routers = [layer.name for layer in model.layers if layer.role == "router"]
        if routers:
            raise TechniqueError(
                f"{routers[0]} chooses experts by the residual stream and would not be turned", LEAVE_OUT
            )
        if not any(decision.layer.kind == "embedding" for decision in decisions):
            raise RecipeError("rotate finds no embedding that a residual stream could begin with", LEAVE_OUT)
        return decisions

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with its stream rotated. Raises TechniqueError where that would change its outputs."""
        if candidate.quantized:
            raise TechniqueError(
                f"{len(candidate.quantized)} parameters were rounded by an earlier step", "let `rotate` come first"
            )
        if candidate.weights is not None:
            raise TechniqueError(
                "`rotate` changes every matrix of the model by one rotation and wants it whole in memory",
                "raise --memory, or leave `rotate` out",
            )
        example = {name: torch.from_numpy(values) for name, values in context.example.items()}
        source, output = candidate.source, context.task.output

        def forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return source.forward(module, inputs, output)

        residual = find_residual(candidate.module, example, forward)
        rotate_residual(candidate.module, residual, self.seed, lambda: forward(candidate.module, example))
        context.progress.say(
            f"rotated {residual.width} channels: {len(residual.norms)} norms, {len(residual.writers)} writers"
        )
        candidate.applied.append(self.entry())
        return candidate

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it is carried out where a recipe asks for it."""
        yield from ()


def find_residual(
    module: nn.Module, example: Mapping[str, Tensor], forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
) -> Residual:
    """Return what touches the residual stream. Raises TechniqueError for a stream that cannot be rotated."""
    leaves = {name: part for name, part in module.named_modules() if isinstance(part._parameters.get("weight"), Tensor)}
    kinds = {name: layer_kind(part) for name, part in leaves.items()}
    flow = follow(module, leaves, example, forward)
    linears, embeddings, normal = (
        {name for name in leaves if kinds[name][0] == kind} for kind in ("linear", "embedding", "norm")
    )
    if idle := sorted(name for name in linears if name not in flow.feeds):
        raise TechniqueError(f"the example does not reach {len(idle)} linear layers: {', '.join(idle[:3])}", LEAVE_OUT)
    reached = [name for name in leaves if name in normal and name in flow.feeds]
    norms = [name for name in reached if flow.feeds[name].layers & embeddings]
    feeders = frozenset().union(*(flow.feeds[name].layers for name in norms))
    if not norms:
        raise TechniqueError("no norm reads a sum that an embedding begins", LEAVE_OUT)
    if others := sorted(feeders - linears - embeddings):
        raise TechniqueError(f"{others[0]} writes the residual stream and is no linear layer or embedding", LEAVE_OUT)
    if raw := sorted(name for name in linears if flow.feeds[name].layers & feeders):
        raise TechniqueError(f"{raw[0]} reads the residual stream without a norm in front", LEAVE_OUT)
    for name in norms:
        _check_rms(name, leaves[name])
    return Residual(
        width=leaves[norms[0]].get_parameter("weight").numel(),
        norms={norm: tuple(n for n in leaves if n in linears and norm in flow.feeds[n].layers) for norm in norms},
        writers=tuple(name for name in leaves if name in feeders & linears),
        tables=tuple(name for name in leaves if name in feeders & embeddings),
        turned=frozenset(name for name in linears if kinds[name][1]),
    )


def rotate_residual(module: nn.Module, residual: Residual, seed: int, run: Callable[[], Tensor]) -> None:
    """Rotate the stream in place; `run` gives the outputs, which must stay as they are, or all is put back."""
    rotation_HH = random_hadamard(residual.width, seed)
    with evaluating(module):
        changed = _rotated(module, residual, rotation_HH)
        kept = {name: module.get_parameter(name).detach().clone() for name in changed}
        before = run().double()
        _put(module, changed)
        after = run().double()
        difference = float((after - before).square().mean().sqrt() / before.square().mean().sqrt())
        if not difference <= SAME:
            _put(module, kept)
            raise TechniqueError(
                f"with its stream rotated the model's outputs change by {difference:.1e} of their size; "
                f"up to {SAME:.0e} is rounding",
                LEAVE_OUT,
            )


def norm_offset(norm: nn.Module) -> float:
    """Return 1 for a norm that multiplies by 1 + weight (Gemma's), else 0."""
    weight = norm.get_parameter("weight")
    probe = torch.ones(1, weight.numel(), dtype=weight.dtype)
    zero = functional_call(norm, {"weight": torch.zeros_like(weight)}, (probe,))
    return float(bool(zero.abs().max() > 0))


def _rotated(module: nn.Module, residual: Residual, rotation_HH: Tensor) -> dict[str, Tensor]:
    """Return new values for every parameter that touches the stream."""
    values: dict[str, Tensor] = {}
    tables = {id(module.get_parameter(f"{name}.weight")) for name in residual.tables}
    for norm, readers in residual.norms.items():
        owner = module.get_submodule(norm)
        offset = norm_offset(owner)
        factors_H = owner.get_parameter("weight").detach() + offset
        weights = {name: module.get_parameter(f"{name}.weight") for name in readers}
        rows = [rows_of(weight.detach(), name in residual.turned) for name, weight in weights.items()]
        if any(id(weight) in tables for weight in weights.values()):
            if bool((factors_H != factors_H[0]).any()):
                raise TechniqueError(
                    f"the head shares the embedding's weight, and {norm} in front of it has factors from "
                    f"{float(factors_H.min()):.3g} to {float(factors_H.max()):.3g}: only one of the two can take them",
                    "untie the head, or leave `rotate` out",
                )
        else:
            ones_H, rows = fold_norm(factors_H, rows)
            values[f"{norm}.weight"] = ones_H - offset
        for name, rows_OH in zip(readers, rows, strict=True):
            if id(weights[name]) not in tables:
                values[f"{name}.weight"] = _turned(rotate_inputs(rows_OH, rotation_HH), name, residual)
    for name in residual.tables:
        values[f"{name}.weight"] = rotate_inputs(module.get_parameter(f"{name}.weight").detach(), rotation_HH)
    for name in residual.writers:
        owner = module.get_submodule(name)
        bias = owner._parameters.get("bias")
        rows_HI = rows_of(owner.get_parameter("weight").detach(), name in residual.turned)
        weight, rotated_bias = rotate_outputs(rows_HI, rotation_HH, None if bias is None else bias.detach())
        values[f"{name}.weight"] = _turned(weight, name, residual)
        if rotated_bias is not None:
            values[f"{name}.bias"] = rotated_bias
    return values


def _turned(rows_OI: Tensor, name: str, residual: Residual) -> Tensor:
    return rows_OI.t() if name in residual.turned else rows_OI


def _put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        module.get_parameter(name).copy_(tensor)


def _check_rms(name: str, norm: nn.Module) -> None:
    """Raise TechniqueError for a norm that takes the mean away: it does not commute with a rotation."""
    weight = norm.get_parameter("weight")
    probe = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype).unsqueeze(0)
    with evaluating(norm):
        if torch.allclose(norm(probe), norm(probe + 1), rtol=1e-3, atol=1e-4):
            raise TechniqueError(f"{name} takes the mean away, so it does not commute with a rotation", LEAVE_OUT)
