from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch

from gossamer.errors import ArtifactError, MeasureError
from gossamer.measure.quality import Equivalence, compare_arrays, compare_outputs, paired
from gossamer.tasks.base import Evaluation, Metric, Scores

ACCURACY = Metric("accuracy", "", True, lambda mean: mean, lambda candidate, original: candidate / original)


def test_agrees_with_torch() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, (50, 7)).astype(np.float32)
    found = reference + rng.normal(0, 0.5, reference.shape).astype(np.float32)
    difference = compare_arrays(reference, found)
    a, b = torch.from_numpy(reference).double(), torch.from_numpy(found).double()
    assert difference.max_abs == pytest.approx(float((a - b).abs().max()))
    assert difference.max_relative == pytest.approx(float((a - b).abs().max() / a.std(correction=0)))
    assert difference.rms_relative == pytest.approx(float((a - b).pow(2).mean().sqrt() / a.std(correction=0)))
    assert difference.top1_agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert difference.num_values == 350


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_relative_error_does_not_depend_on_the_unit(scale: float) -> None:
    reference, found = np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 2.0, 4.1]])
    expected = compare_arrays(reference, found).max_relative
    assert compare_arrays(reference * scale, found * scale).max_relative == pytest.approx(expected)


def test_what_is_not_a_number_never_passes() -> None:
    reference = np.array([1.0, 2.0, -inf])
    assert compare_arrays(reference, reference).max_abs == 0.0
    for bad in (np.nan, inf):
        broken = compare_outputs({"logits": reference}, {"logits": np.array([1.0, bad, -inf])})
        assert broken.worst[1].max_abs == inf
        with pytest.raises(ArtifactError, match="logits differs"):
            broken.check(max_relative=1e9)
        assert Equivalence.model_validate_json(broken.model_dump_json()) == broken


def test_names_the_worst_output_and_both_numbers() -> None:
    rng = np.random.default_rng(1)
    reference = {"logits": rng.normal(size=(4, 3)), "hidden": rng.normal(size=(4, 8))}
    found = {**reference, "hidden": reference["hidden"] + 0.1, "extra": np.zeros(1)}
    compared = compare_outputs(reference, found)
    assert compared.worst[0] == "hidden"
    compared.check(max_relative=0.2)
    with pytest.raises(ArtifactError, match=r"hidden differs by up to .* standard deviations \(0\.1\), allowed: 0\.01"):
        compared.check(max_relative=0.01)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MeasureError, match=r"\['logits'\] are missing, there are \['other'\]"):
        compare_outputs({"logits": np.ones(2)}, {"other": np.ones(2)})
    with pytest.raises(MeasureError, match=r"\(3,\) with \(2,\)"):
        compare_outputs({"logits": np.ones(2)}, {"logits": np.ones(3)})
    with pytest.raises(MeasureError, match="cannot compare"):
        compare_arrays(np.ones((0, 2)), np.ones((0, 2)))


def test_constant_outputs_are_compared_by_their_size() -> None:
    assert compare_arrays(np.full((2, 2), 5.0), np.full((2, 2), 5.5)).max_relative == pytest.approx(0.1)
    assert compare_arrays(np.zeros(3), np.zeros(3)).max_relative == 0.0


def test_pairs_two_evaluations() -> None:
    rng = np.random.default_rng(2)
    ones = np.ones(300)
    original = (rng.random(300) < 0.95).astype(np.float64)
    candidate = original.copy()
    candidate[:9] = 0
    found = paired(
        Evaluation(
            Scores(candidate, ones), {}, divergence=Scores(rng.random(300) * 0.01, ones), agreement=Scores(ones, ones)
        ),
        Evaluation(Scores(original, ones), {}),
        ACCURACY,
    )
    assert found.candidate.value == pytest.approx(candidate.mean())
    assert found.kept.value == pytest.approx(candidate.mean() / original.mean())
    assert found.kept.low < found.kept.value < found.kept.high
    assert found.divergence is not None
    assert found.divergence.unit == "nats"
    assert found.agreement is not None
    assert found.agreement.low < 1.0  # 300 agreements do not prove the next one
