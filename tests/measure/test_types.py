from __future__ import annotations

import json
from math import inf, nan

import pytest
from pydantic import ValidationError

from gossamer.measure.types import Interval, Measurement, MemoryUse


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"value": 0.98667, "low": 0.9785, "high": 0.9948, "unit": ""}, "0.9867 ± 0.0082 (n=600)"),
        ({"value": 0.9867, "low": 0.97, "high": 0.99, "unit": ""}, "0.987 (0.970 to 0.990) (n=600)"),
        ({"value": 0.0058, "low": 0.0056, "high": 0.006, "unit": "s"}, "5.80 ms ± 0.20 ms (n=600)"),
        ({"value": 30.45, "low": 29.4, "high": 31.6, "unit": ""}, "30.4 ± 1.2 (n=600)"),
        ({"value": 23e6, "low": 23e6, "high": 23e6, "unit": "B"}, "23 MB (exact)"),
        ({"value": 1.0, "low": -inf, "high": inf, "unit": ""}, "1 (-inf to inf) (n=600)"),
    ],
)
def test_reads_as_people_write_it(figures: dict[str, float | str], expected: str) -> None:
    assert str(Measurement(n=600, higher_is_better=False, **figures)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(0.2, 0.1, 0.3), (0.1, 0.4, 0.3), (nan, 0.1, 0.3), (0.1, nan, 0.3)])
def test_refuses_bounds_that_do_not_hold_the_value(bounds: tuple[float, float, float]) -> None:
    low, value, high = bounds
    with pytest.raises(ValidationError, match="low <= value <= high"):
        Interval(low=low, value=value, high=high, n=2)


def test_survives_json_with_infinite_bounds() -> None:
    found = Interval(value=0.5, low=-inf, high=inf, n=3)
    text = found.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Interval.model_validate_json(text) == found


def test_is_frozen() -> None:
    counted = Measurement.counted(7, unit="B")
    assert counted.exact
    with pytest.raises(ValidationError):
        counted.value = 8.0


def test_memory_peaks() -> None:
    use = MemoryUse(baseline=100, after_open=150, peak_open=300, peak_run=200, resettable=True)
    assert (use.peak, use.own_peak) == (300, 200)
