"""What is followed of attention, against slow loops over rows, heads and tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.models.self_attention import MapRule
from gossamer.tasks.base import Batch
from gossamer.train.attention import Mapped, Maps, Related, Relations
from gossamer.train.objectives import Seen

LENGTHS = (3, 5)


def seen(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Seen:
    """Return a pass over two rows of 3 and 5 tokens, padded to 5."""
    rows = [Batch({"input_ids": np.ones((1, n), dtype=np.int64)}, np.array([i])) for i, n in enumerate(LENGTHS)]
    return Seen(torch.zeros(2, 2), None, [], [], rows, student, teacher)


def relation(values_TC: Tensor, heads: int, head: int, token: int) -> Tensor:
    """Return how one token relates to all of a row without padding."""
    size = values_TC.shape[1] // heads
    one = values_TC[:, head * size : (head + 1) * size]
    return torch.stack([one[token] @ other / math.sqrt(size) for other in one]).softmax(0)


def kl(p: Tensor, q: Tensor) -> float:
    return float(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))


def test_relations_are_the_papers_for_heads_and_widths_of_any_number() -> None:
    torch.manual_seed(0)
    ours = {name: torch.randn(2, 5, 8) for name in "qv"}
    theirs = {name: torch.randn(2, 5, 12) for name in "QV"}
    found = Relations([Related("q", "Q", 4), Related("v", "V", 2)])(seen(ours, theirs))
    each = []
    for a, b, heads in (("q", "Q", 4), ("v", "V", 2)):
        terms = [
            kl(
                relation(theirs[b][row, :length], heads, head, token),
                relation(ours[a][row, :length], heads, head, token),
            )
            for row, length in enumerate(LENGTHS)
            for head in range(heads)
            for token in range(length)
        ]
        each.append(sum(terms) / len(terms))
    assert float(found) == pytest.approx(sum(each) / 2, rel=1e-5)


def test_padding_is_neither_related_nor_looked_at() -> None:
    ours, theirs = {"q": torch.randn(2, 5, 8), "k": torch.randn(2, 5, 8)}, {"q": torch.randn(2, 5, 8)}
    theirs["k"] = torch.randn(2, 5, 8)
    rule = MapRule(4, 0.5, causal=False)
    objectives = Relations([Related("q", "q", 2)]), Maps([Mapped(("q", "k"), ("q", "k"), rule, rule)])
    before = [objective(seen(ours, theirs)) for objective in objectives]
    for side in (ours, theirs):
        for values in side.values():
            values[0, 3:] = torch.randn(2, 8) * 100
    assert [objective(seen(ours, theirs)) for objective in objectives] == before
    ours["q"][0, 2] += 1
    assert all(
        float(objective(seen(ours, theirs))) != float(one) for objective, one in zip(objectives, before, strict=True)
    )


def test_relations_of_equals_are_followed_wholly_with_a_gradient_of_nothing() -> None:
    values = torch.randn(2, 5, 8, requires_grad=True)
    loss = Relations([Related("q", "q", 2)])(seen({"q": values}, {"q": values.detach()}))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert values.grad is not None
    assert float(values.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_maps_are_those_of_torchs_own_attention(causal: bool) -> None:
    """Values that are the identity make attention give out its map; one key is shared by two queries."""
    queries, keys = torch.randn(1, 5, 12), torch.randn(1, 5, 6)
    heads, shared = (values.view(1, 5, -1, 3).transpose(1, 2) for values in (queries, keys))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        heads, shared.repeat_interleave(2, 1), torch.eye(5).expand(1, 4, 5, 5), is_causal=causal
    )
    assert torch.allclose(MapRule(3, 3**-0.5, causal).scores(queries, keys).softmax(-1), wanted, atol=1e-6)


def test_causal_maps_diverge_by_what_came_before_alone() -> None:
    rule = MapRule(8, 8**-0.5, causal=True)
    ours, theirs = ({"q": torch.randn(2, 5, 8), "k": torch.randn(2, 5, 8)} for _ in range(2))
    terms = []
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            p, q = (
                (side["k"][row, : token + 1] @ side["q"][row, token] / math.sqrt(8)).softmax(0)
                for side in (theirs, ours)
            )
            terms.append(kl(p, q))
    found = Maps([Mapped(("q", "k"), ("q", "k"), rule, rule)])(seen(ours, theirs))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_relations_are_computed_in_float32_under_autocast() -> None:
    ours, theirs = {"q": 5 * torch.randn(2, 5, 8)}, {"q": 5 * torch.randn(2, 5, 8)}
    objective = Relations([Related("q", "q", 2)])
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(seen(ours, theirs))
    assert torch.equal(found, objective(seen(ours, theirs)))
