"""Ranks that move between layers: where they go, how many are left, and what a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.train.adapters import adapters, read_adapter
from gossamer.train.objectives import Seen
from gossamer.train.ranks import NAME, MovingRanks, Orthogonal, settings

STEPS = 60


def network() -> nn.Sequential:
    """Return two layers side by side; the first needs a change of rank 4, the second a small one of rank 1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)).requires_grad_(False)


def trained(model: nn.Sequential, layers: Mapping[str, Any], moving: MovingRanks, steps: range, state: Any) -> Any:
    """Train as the loop does, from a state on; return the state behind the last step."""
    change = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        4, 12, generator=torch.Generator().manual_seed(2)
    )
    parameters = [values for values in moving.layers.parameters() if values.requires_grad]
    adam = torch.optim.Adam(parameters, lr=3e-2)
    if state is not None:
        for values, kept in zip([*parameters, *moving.layers.buffers()], state["values"], strict=True):
            values.data.copy_(kept)
        adam.load_state_dict(state["adam"])
    base = [layer.get_base_layer().weight for layer in layers.values()]
    for step in steps:
        moving.before_step(step, STEPS)
        inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(100 + step))
        wanted = [inputs @ (base[0] + change).t(), inputs @ (base[1] + 0.1 * change[:1]).t()]
        found = [model[index](inputs) for index in (0, 1)]
        loss = sum((f - w).square().mean() for f, w in zip(found, wanted, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        moving.before_update()
        adam.step()
        moving.after_update()
        adam.zero_grad()
    values = [values.detach().clone() for values in (*parameters, *moving.layers.buffers())]
    return {"values": values, "adam": adam.state_dict()}


def ranks_of(moving: MovingRanks) -> list[int]:
    return [int((layer.get_parameter(f"lora_E.{NAME}") != 0).sum()) for layer in moving.layers]


def test_ranks_go_where_the_loss_needs_them() -> None:
    model = network()
    with adapters(model, ["0", "1"], rank=2, alpha=4, kind="adalora") as layers:
        moving = MovingRanks(layers, settings(2, 4, ["0", "1"]))
        trained(model, layers, moving, range(STEPS), None)
        found = ranks_of(moving)
        assert sum(found) == 4
        assert found[0] > found[1]
        change = read_adapter(layers["0"]).merged - layers["0"].get_base_layer().weight
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == found[0]
    assert not MovingRanks.settled(moving, 30, STEPS)
    assert MovingRanks.settled(moving, 31, STEPS)


def test_what_a_checkpoint_holds_is_enough_to_go_on() -> None:
    ends = []
    for parts in ([range(STEPS)], [range(20), range(20, STEPS)]):
        state = None
        for part in parts:
            model = network()
            with adapters(model, ["0", "1"], rank=2, alpha=4, kind="adalora") as layers:
                moving = MovingRanks(layers, settings(2, 4, ["0", "1"]))
                state = trained(model, layers, moving, part, state)
        assert state is not None
        ends.append(state["values"])
    assert all(torch.equal(whole, in_two) for whole, in_two in zip(*ends, strict=True))


def test_a_step_that_overflowed_is_not_averaged() -> None:
    model = network()
    with adapters(model, ["0", "1"], rank=2, alpha=4, kind="adalora") as layers:
        moving = MovingRanks(layers, settings(2, 4, ["0", "1"]))
        model(torch.full((2, 12), torch.inf)).sum().backward()
        moving.before_update()
        assert all(not bool(layer.get_buffer("moved_lora_A").any()) for layer in moving.layers)


def test_orthogonal_parts_cost_nothing_and_rows_that_judge_never_do() -> None:
    model = network()
    with adapters(model, ["0"], rank=2, alpha=4, kind="adalora") as layers:
        moving = MovingRanks(layers, settings(2, 4, ["0"]))
        objective = Orthogonal(moving.layers)
        seen = Seen(torch.zeros(1), None, [], [], [])
        assert float(objective(seen).detach()) > 0.5
        with torch.no_grad():
            assert float(objective(seen)) == 0.0
            for part in ("lora_A", "lora_B"):
                values = moving.layers[0].get_parameter(f"{part}.{NAME}")
                values.copy_(torch.linalg.qr(values.t())[0].t() if part == "lora_A" else torch.linalg.qr(values)[0])
        assert float(objective(seen).detach()) < 1e-5
