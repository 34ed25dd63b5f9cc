"""Gates of a sweep: what must hold in front of a block, inside and behind it, and the next safer option where it fails.

    in front   the model as it was gives finite outputs; where it does not, an error names the layer that begins it
    inside     second moments of a layer's inputs are finite and have a factor: else ten times the damping, up to
               MORE_DAMPING; else that layer alone is treated without samples
    behind     the error is finite, at most GATE_SLACK times plain rounding's and JUMP times what was expected: else the
               solver again with ten times the damping; else plain rounding; else, where plain rounding itself is
               beyond JUMP times what was expected, the next width of the grid that the runtime's files can hold

What is expected behind a block is what came in, and what its grids do to its weights alone:

    expected = error in front + sum over its layers of |w - plain(w)|^2 / |w|^2        (no sum where nothing is rounded)

Where no channel of an input is larger than the others a layer's output errs by just its term, and the residual stream
makes less of it; where a few channels carry most of what is read, and their weights are the small ones of their groups,
it errs by more. Rounded plainly, blocks of SmolLM2-135M (mixed widths around 4 bits) lay at 0.05 to 0.3 times what was
expected, of MiniLM (4 and 3 bits) at 0.1 to 0.8 (both with 0.05 for the sum), of a tiny random Llama at 0.7 to 1.1;
with two large inputs whose weights cancel in that Llama it was 860 times.

Layers outside of blocks have no output of their own to look at: each is compared with plain rounding by its own output
on NUM_GATED samples (`layer_error`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError, TechniqueError
from gossamer.models.quantized import Quantized, QuantSpec, rows_of
from gossamer.models.roles import LayerInfo
from gossamer.models.spilled import tensors_in
from gossamer.models.walker import Call, Output, hidden_states
from gossamer.techniques.quantize.inverse_factor import Degenerate
from gossamer.techniques.quantize.moments import Moments, has_moments, layer_inputs

if TYPE_CHECKING:
    from gossamer.run.team import Team
    from gossamer.techniques.block import Block

NUM_GATED = 4  # samples on which the error behind each block is measured
GATE_SLACK = 1.05  # a solved block may be so much worse than plain rounding, by the noise of few samples
JUMP = 10.0  # times what was expected
NOISE = 1e-4  # an error below it jumps freely: nothing downstream sees it
MORE_DAMPING = (1.0, 10.0, 100.0, 1000.0)  # times the damping that was asked for
WIDTHS = (2, 3, 4, 5, 6, 8)
ROWS_AT_A_TIME = 4096  # of a layer's output: memory stays flat for large vocabularies
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """Hold what a block came to: its error, that of plain rounding, and what was expected; None: not known."""

    error: float
    plain: float | None
    expected: float | None

    @property
    def beyond_plain(self) -> bool:
        """Say whether plain rounding is better than what was found, or the only one that is finite."""
        if self.plain is None:
            return not math.isfinite(self.error)
        return not (math.isfinite(self.error) and self.error <= GATE_SLACK * self.plain)

    @property
    def beyond_expected(self) -> bool:
        """Say whether the error is so large that something must be wrong with these grids here."""
        if not math.isfinite(self.error):
            return True
        return self.expected is not None and self.error > max(NOISE, JUMP * self.expected)

    @property
    def in_words(self) -> str:
        """Return both numbers."""
        return f"error {self.error:.2e}" + (f" where {self.expected:.2e} was expected" if self.expected else "")


def check_inputs(block: str, layer: str, seen: Moments) -> None:
    """Raise ModelError for a layer whose inputs are not finite: nothing in its block has been changed yet."""
    wrong = int((~torch.isfinite(seen.max_abs_I)).sum())
    if wrong:
        raise ModelError(
            f"{wrong} of {len(seen.max_abs_I)} inputs of {layer} are NaN or infinite on calibration rows: "
            f"the model itself computes them in {block}",
            "repair the model, or leave out the rows that do this",
        )


def overflow(seen: Moments) -> str:
    """Return what is wrong with the second moments of inputs that are finite themselves; empty: nothing."""
    second_II = seen.second_II
    if bool(torch.isfinite(second_II.sum())) or bool(torch.isfinite(second_II).all()):
        return ""
    return f"the squares of its inputs overflow (the largest is {float(seen.max_abs_I.max()):.1e})"


def guarded(
    block: Block, parameters: Sequence[str], solve: Callable[[float], T], damping: float, otherwise: str
) -> T | None:
    """Return what a solver finds for some layers, with more damping where their moments have no factor.

    None where no damping of MORE_DAMPING helps: they are to be treated `otherwise`. What was done is noted.
    """
    names = ", ".join(parameters)
    for factor in MORE_DAMPING:
        try:
            found = solve(factor * damping)
        except Degenerate:
            continue
        if factor > 1:
            block.notes.append(f"the moments of {names} had no factor, so damping {factor * damping:g} was taken")
        return found
    tried = f"with damping {damping:g}, nor {MORE_DAMPING[-1]:g} times as much"
    block.notes.append(f"the moments of {names} have no factor {tried}: {otherwise}")
    return None


def weight_error(weight: Tensor, codes: Quantized) -> float:
    """Return |w - w'|^2 / |w|^2 of a weight and its codes."""
    rows_OI = rows_of(weight, codes.transposed).float()
    error = torch.dist(rows_OI, rows_of(codes.to(rows_OI.device).dequantize(), codes.transposed))
    return float((error / rows_OI.norm().clamp(min=torch.finfo(torch.float32).tiny)).square())


def expected_error(front: float, weights: Iterable[float]) -> float | None:
    """Return what is expected behind a block, from the error in front and those of its weights; None: from nothing.

    >>> expected_error(0.01, [0.005, 0.005])
    0.02
    """
    terms = list(weights)
    found = front + sum(terms)
    known = bool(terms) or front > NOISE  # what is not rounded has no grid to tell by, only what came in
    return found if known and found > 0 and math.isfinite(found) else None


def is_finite(output: Output) -> bool:
    """Say whether a block's hidden states hold neither NaN nor infinities."""
    values = hidden_states(output)
    # a sum is finite only when all terms are (or when it overflows: then look at each)
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def original_is_broken(name: str, block: nn.Module, call: Call) -> ModelError:
    """Return the error for a block that gives NaN or infinities as it was: it names the layer that begins it."""
    layer = _first_not_finite(block, call)
    where = f"{name}.{layer} is the first in {name}" if layer else f"{name} is the first"
    wrong = sum(int((~torch.isfinite(part)).sum()) for part in block.get_submodule(layer).parameters())
    held = f"; {wrong} of its own weights are" if wrong else ""
    given = [part for part in tensors_in([call.args, call.kwargs]) if part.is_floating_point()]
    if any(bool(part.isnan().any() | part.isposinf().any()) for part in given):  # masks hold -inf
        where, held = f"what comes into {name} is so already", ""
    return ModelError(
        f"the model itself gives NaN or infinities on calibration rows: {where}{held}",
        "repair the model, or leave out the rows that do this",
    )


def _first_not_finite(block: nn.Module, call: Call) -> str:
    """Return the name of the first part of a block whose output is not finite; empty: that of the block itself."""
    found: list[str] = []

    def look(_: nn.Module, inputs: tuple[Any, ...], output: Any, name: str) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    with ExitStack() as hooks:
        for name, part in block.named_modules():
            if name and next(part.children(), None) is None:
                hooks.callback(part.register_forward_hook(partial(look, name=name)).remove)
        call(block)
    return found[0] if found else ""


def solved_is_broken(name: str, technique: str, sample: int) -> TechniqueError:
    """Return the error for a solved block that gives NaN or infinities on a sample that its gate did not look at."""
    return TechniqueError(
        f"the outputs of {name} are NaN or infinite on calibration sample {sample} after {technique}",
        "leave that row out, raise `damping`, or name the block under `ignore`",
    )


def wider(spec: QuantSpec, layer: LayerInfo, holds: Callable[[LayerInfo, QuantSpec], bool]) -> QuantSpec | None:
    """Return the next width of an integer grid that a file can hold beside others; None where there is none."""
    if spec.format != "int" or layer.experts is not None:  # all experts of a model have one grid
        return None
    options = (spec.model_copy(update={"bits": bits}) for bits in WIDTHS if bits > spec.bits)
    return next((option for option in options if holds(layer, option)), None)


def layer_inputs_of(block: Block, count: int) -> dict[str, list[Tensor]]:
    """Return the inputs [t, I] of a block's layers, by parameter, on this process's share of the first samples.

    They lie in main memory, as do the layers outside of blocks.
    """
    found: dict[str, list[Tensor]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], parameter: str) -> None:
        rows_tI = layer_inputs(layer, inputs[0].detach().float())
        found.setdefault(parameter, []).append(rows_tI.reshape(-1, rows_tI.shape[-1]))

    with ExitStack() as hooks:
        for parameter in block.inside:
            layer = block.candidate.module.get_submodule(parameter.rpartition(".")[0])
            if has_moments(layer):
                hooks.callback(layer.register_forward_pre_hook(partial(note, parameter=parameter)).remove)
        for run in block.passes(range(block.share.first(count))):
            run()
    return found


def layer_error(
    team: Team, inputs: Sequence[Tensor], weight: Tensor, codes: Quantized, shift_O: Tensor | None = None
) -> float:
    """Return a layer's squared output error as a share of its outputs' squares, over the samples of all processes.

    `inputs` [t, I] are those of the samples that are here, `shift_O` what was added to the layer's bias.
    """
    rows_OI = rows_of(weight, codes.transposed).float()
    rounded_OI = rows_of(codes.dequantize(), codes.transposed)
    error = size = 0.0
    for x_tI in inputs:
        for first in range(0, len(rows_OI), ROWS_AT_A_TIME):
            part = slice(first, first + ROWS_AT_A_TIME)
            change_tO = x_tI @ (rounded_OI[part] - rows_OI[part]).t()
            if shift_O is not None:
                change_tO += shift_O[part]
            error += float(change_tO.square().sum(dtype=torch.float64))
            size += float((x_tI @ rows_OI[part].t()).square().sum(dtype=torch.float64))
    errors, sizes = zip(*team.gathered([error, size]), strict=True)
    return sum(errors) / sum(sizes) if sum(sizes) else 0.0
