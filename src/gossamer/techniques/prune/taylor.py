"""First-order importance: how much the task's loss is predicted to change when a unit's parameters all become zero.

    I_u = mean over rows r of sum_{w in u} |w dL_r/dw|

Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, section 3.1; summed over every parameter of
a group that goes together (rows of up and gate, columns of down) as in Ma et al., "LLM-Pruner", 2023, section 3.2
("element-wise"). For whole blocks all parameters inside: Kim et al., "Shortened LLaMA", 2024, section 3.1.

L is the task's own loss on the user's rows, so rows need what the task compares with (labels; a language model's are
its next tokens). With labels drawn from the model, as for Fisher information, the gradient is zero in expectation, and
so it nearly is over the rows that a model was trained on: sizes are taken row by row, before rows can cancel. Left out:
the second-order term (fisher has it, without labels), and units as one sum that may cancel inside ("vector-wise").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import Dimension, Member
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context


def taylor_scores(
    candidate: Candidate, dimensions: Iterable[Dimension], batches: Sequence[Batch], context: Context
) -> dict[Dimension, Tensor]:
    """Return the importance of every unit, [U] float64, by dimension, from one pass forward and back over each batch.

    Raises TechniqueError for a model that is read piece by piece, for rows that reach no parameter of a dimension, and
    for importance that is not finite; DataError for rows without labels where the task needs them.
    """
    if candidate.weights is not None:
        raise TechniqueError(
            "taylor takes the gradients of weights, and the model is read piece by piece",
            "raise --memory, or choose by obs",
        )
    source, output = candidate.source, context.task.output

    def loss(batch: Batch) -> Tensor:
        inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
        return context.task.loss({output: source.forward(candidate.module, inputs, output)}, batch)

    groups = {one: list(_groups(candidate.module, one)) for one in dimensions}
    names = dict.fromkeys(member.parameter for members in groups.values() for member, _ in members)
    sums = _sums(candidate.module, list(names), (partial(loss, batch) for batch in batches))
    found = {}
    for one, members in groups.items():
        reached = [(member, unit) for member, unit in members if member.parameter in sums]
        if not reached:
            raise TechniqueError(f"no row's loss depends on {one.kind} of {one.name}", "give other rows")
        total_U = torch.zeros(one.size, dtype=torch.float64)
        for member, unit in reached:
            _add(total_U, member, unit, sums[member.parameter], one.size)
        if not bool(torch.isfinite(total_U).all()):
            raise TechniqueError(f"the importance of {one.kind} of {one.name} is NaN or infinite", "try another `by`")
        found[one] = total_U / len(batches)
    return found


def _groups(module: nn.Module, one: Dimension) -> Iterator[tuple[Member, int | None]]:
    """Yield what belongs to the units: axes of parameters, or (blocks) whole parameters with their unit's number."""
    if one.kind != "layers":
        yield from ((member, None) for member in one.members)
        return
    for number in range(one.size):
        block = f"{one.stack}.{number}"
        for name, _ in module.get_submodule(block).named_parameters():
            yield Member(f"{block}.{name}", 0), number


def _add(total_U: Tensor, member: Member, unit: int | None, values: Tensor, size: int) -> None:
    """Add the sums of one parameter to the units that it has a part of."""
    if unit is not None:
        total_U[unit] += values.sum()
        return
    by_index = values.movedim(member.axis, 0).reshape(values.shape[member.axis], -1).sum(1)
    total_U += by_index[member.offset : member.offset + size * member.unit].view(size, member.unit).sum(1)


def _sums(module: nn.Module, names: Sequence[str], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Return sum over losses of |w dL/dw| in the shape of each parameter that a loss depends on."""
    parameters = [module.get_parameter(name) for name in names]
    found: dict[str, Tensor] = {}
    with _watched(module, parameters), torch.enable_grad():
        for loss in losses:
            gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                if gradient is not None:
                    size = (parameter.detach() * gradient).abs_()
                    found[name] = found[name].add_(size) if name in found else size
    return {name: values.double() for name, values in found.items()}


@contextmanager
def _watched(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take gradients of some parameters, and of no others, while the `with` lasts."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)
