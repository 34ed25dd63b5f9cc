"""Cut the width of a residual stream: which channels stay, and what the narrower model is checked against.

Channels of a stream are scored by what reads them (Muralidharan et al., "Minitron", 2024, section 2.2: the mean size of
what norms write, summed over the layers), by Fisher information or any other `by`, summed over all readers. No basis is
changed: the stream is as wide as its channels are many, and PCA (SliceGPT) would put a matrix into every residual sum.

A norm over fewer channels has another mean and another size, so the narrower model is not the one with zeros. What it
must be is the model whose norms look at the channels that stay and whose readers see nothing else:

    norm'(x) = norm over x_K with weights w_K, zero elsewhere        reader'(x) = W_:K x_K

which is run with hooks, and must agree to rounding; a model that computes with its width as a number (embeddings times
its square root) does not, and is refused. A factor that all outputs have in common (T5 divides them by the root of its
width when the head is tied) is given to the norm in front of the head.

What stays makes up for the rest in `width_fit.py`. Shape suffixes: K channels that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.reduction import reduced, said_by_config
from gossamer.models.roles import Dimension
from gossamer.models.structure import layer_kind
from gossamer.techniques.prune.same import ROUNDING, check_same

LEAVE = "leave its width as it is, and say so to us"
Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def narrowed(
    candidate: Candidate,
    kept: Mapping[Dimension, Sequence[int]],
    forward: Forward,
    example: dict[str, Tensor],
) -> tuple[Candidate, nn.Module, float]:
    """Return the candidate with fewer channels, checked against the masked model, the module as it was before, and the
    factor that the last norm was given.

    Raises TechniqueError for a model that is read piece by piece, and where the narrower model computes something else.
    """
    if candidate.weights is not None:
        raise TechniqueError(
            "the width is cut in every matrix at once, and the model is read piece by piece", "raise --memory"
        )
    before = candidate.module
    if said_by_config(before, kept) is None:  # then it is cut in place
        before = copy.deepcopy(before)
    smaller = reduced(candidate, kept)
    with torch.no_grad():
        with masked(before, smaller.module, kept):
            expected = forward(before, example)
        try:
            found = forward(smaller.module, example)
        except RuntimeError as error:  # a module that was made smaller in place holds its width as a number
            raise TechniqueError(
                f"the narrower model does not run, since something in it computes with its width: {error}", LEAVE
            ) from error
        if (factor := common_factor(expected, found)) != 1:
            scale_last_norm(smaller.module, factor, kept, partial(forward, smaller.module, example))
            found = forward(smaller.module, example)
    check_same(expected, found, "the narrower model", "something else in it computes with its width", LEAVE)
    return smaller, before, factor


@contextmanager
def masked(module: nn.Module, smaller: nn.Module, kept: Mapping[Dimension, Sequence[int]]) -> Iterator[None]:
    """Let norms look at, and readers see, only the channels that stay while the `with` lasts."""
    with ExitStack() as hooks:
        for one, units in kept.items():
            kept_K = torch.tensor(units)
            for name in norms_of(module, one):
                norm = smaller.get_submodule(name)

                def over_kept(_: nn.Module, inputs: Any, output: Tensor, norm: nn.Module, kept_K: Tensor) -> Tensor:
                    return torch.zeros_like(output).index_copy(-1, kept_K, norm(inputs[0][..., kept_K]))

                handle = module.get_submodule(name).register_forward_hook(partial(over_kept, norm=norm, kept_K=kept_K))
                hooks.callback(handle.remove)
            for name in linears_of(module, one, reading=True):

                def blinded(_: nn.Module, inputs: Any, kept_K: Tensor) -> Any:
                    seen = torch.zeros_like(inputs[0]).index_copy(-1, kept_K, inputs[0][..., kept_K])
                    return (seen, *inputs[1:])

                handle = module.get_submodule(name).register_forward_pre_hook(partial(blinded, kept_K=kept_K))
                hooks.callback(handle.remove)
        yield


def norms_of(module: nn.Module, one: Dimension) -> list[str]:
    """Return the norms over a stream."""
    owners = dict.fromkeys(member.parameter.rpartition(".")[0] for member in one.members)
    return [name for name in owners if layer_kind(module.get_submodule(name))[0] == "norm"]


def linears_of(module: nn.Module, one: Dimension, *, reading: bool) -> dict[str, bool]:
    """Return the linear layers that read (or write) a stream, and whether each is stored turned, as [in, out]."""
    found = {}
    for member in one.members:
        name, _, local = member.parameter.rpartition(".")
        if local != "weight":
            continue
        kind, turned = layer_kind(module.get_submodule(name))
        if kind == "linear" and (member.axis == (0 if turned else 1)) is reading:
            found[name] = turned
    return found


def common_factor(expected: Tensor, found: Tensor) -> float:
    """Return the factor that makes one output the other, 1 where there is none."""
    factor = float((expected.double() * found.double()).sum() / found.double().square().sum().clamp(min=1e-30))
    away = float((expected - factor * found).abs().max())
    same = away <= 0.1 * ROUNDING * float(expected.abs().max()) and factor > 0
    return factor if same and abs(factor - 1) > ROUNDING else 1.0


def scale_last_norm(
    smaller: nn.Module, factor: float, kept: Mapping[Dimension, Sequence[int]], run: Callable[[], object]
) -> None:
    """Multiply what the last norm of all writes."""
    order: list[str] = []
    with ExitStack() as hooks:
        for name in {name for one in kept for name in norms_of(smaller, one)}:
            handle = smaller.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
            hooks.callback(handle.remove)
        run()
    for values in smaller.get_submodule(order[-1]).parameters() if order else ():
        values.detach().mul_(factor)
