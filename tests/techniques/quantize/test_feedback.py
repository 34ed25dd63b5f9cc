"""What makes up for drifted inputs: the least squares answer, nothing without drift, better models with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.techniques.blockwise import observe_drift
from gossamer.techniques.quantize.gptq import made_up_for
from gossamer.techniques.quantize.moments import Drift, Moments


def test_the_weights_are_those_of_least_squares_with_a_pull_to_the_old_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    x_tI, weight_OI = torch.randn(300, 12, generator=draw), torch.randn(5, 12, generator=draw)
    live_tI = 0.9 * x_tI + 0.2 * torch.randn(300, 12, generator=draw)
    seen, drift = Moments.empty(12), Drift.empty(12)
    for start in range(0, 300, 100):
        seen.add(live_tI[start : start + 100])
        drift.add(x_tI[start : start + 100], live_tI[start : start + 100])
    found = made_up_for(weight_OI, seen.second_II, drift.mean_II, damping=0.1)
    pull = 0.1 * float(seen.second_II.diagonal().mean()) * 300
    inputs = np.vstack([live_tI.numpy(), np.sqrt(pull) * np.eye(12)])
    for row in range(5):
        outputs = np.concatenate([x_tI.numpy() @ weight_OI[row].numpy(), np.sqrt(pull) * weight_OI[row].numpy()])
        wanted, *_ = np.linalg.lstsq(inputs, outputs, rcond=None)
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_without_drift_nothing_changes_and_silent_inputs_are_harmless() -> None:
    draw = torch.Generator().manual_seed(1)
    x_tI, weight_OI = torch.randn(50, 6, generator=draw), torch.randn(3, 6, generator=draw)
    x_tI[:, 2] = 0
    seen, drift = Moments.empty(6), Drift.empty(6)
    seen.add(x_tI)
    drift.add(x_tI, x_tI)
    assert torch.equal(made_up_for(weight_OI, seen.second_II, drift.mean_II, 0.05), weight_OI)
    silent = torch.zeros(6, 6)
    assert bool(torch.isfinite(made_up_for(weight_OI, silent, silent, 0.05)).all())


def test_both_passes_are_seen_and_readers_of_one_tensor_share() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> None:
            self.o(self.q(x))
            self.k(x)

    torch.manual_seed(0)
    reads = Reads()
    samples = [(torch.randn(1, 7, 4), torch.randn(1, 7, 4)) for _ in range(3)]
    pairs = ((lambda x=x: reads(x), lambda y=y: reads(y)) for x, y in samples)
    moments, drift = observe_drift(dict(reads.named_children()), pairs)
    assert moments["q"] is moments["k"]
    assert drift["q"] is drift["k"]
    x, live = (torch.cat([sample[side][0] for sample in samples]) for side in (0, 1))
    torch.testing.assert_close(drift["q"].mean_II, (x - live).t() @ live / 21)
    with torch.no_grad():
        inner, live_inner = reads.q(x), reads.q(live)
    torch.testing.assert_close(drift["o"].mean_II, (inner - live_inner).t() @ live_inner / 21)
    torch.testing.assert_close(moments["o"].second_II, live_inner.t() @ live_inner / 21)
    assert drift["q"].num_tokens == pytest.approx(21)
