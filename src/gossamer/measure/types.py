"""The two shapes that every number of ours has: an interval, and an interval that knows its unit and its machine.

`confidence` is that of *each bound alone*: at 0.95 the truth lies above `low` with 95 % confidence, and below `high`
with 95 % confidence. A verdict looks at one bound, so that is the figure that it needs; read as a two-sided interval
[low, high] holds with 90 %.
"""

from __future__ import annotations

from math import floor, isfinite, log10
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from gossamer.measure.size import human_size

Op = Literal[">=", "<="]


class Frozen(BaseModel):
    """Be a frozen record that JSON can hold: infinite numbers are written as strings and read back as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Interval(Frozen):
    """Hold an estimate with its two one-sided bounds, from `n` samples.

    Exact quantities have `low == value == high`. Example: `Interval(value=0.99, low=0.98, high=1.0, n=500)`.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:  # also refuses NaN
            raise ValueError(f"an interval needs low <= value <= high, not {self.low}, {self.value}, {self.high}")
        if self.n < 1:
            raise ValueError(f"an interval needs n >= 1, not {self.n}")
        return self

    @property
    def exact(self) -> bool:
        """Say whether the quantity was counted and not estimated."""
        return self.low == self.high

    def __str__(self) -> str:
        return format_interval(self.value, self.low, self.high)


class Measurement(Interval):
    """Hold a measured quantity: its interval, unit, direction, and the stamp of the machine that it was taken on.

    Units are plain: `B` bytes, `s` seconds, `1/s`, `%`, or empty for a share. Example:
    `str(Measurement(value=0.0058, low=0.0056, high=0.006, n=800, unit="s", higher_is_better=False))` reads
    `5.80 ms ± 0.20 ms (n=800)`.
    """

    unit: str
    higher_is_better: bool
    stamp_id: str | None = None

    @classmethod
    def from_interval(
        cls, interval: Interval, *, unit: str, higher_is_better: bool, stamp_id: str | None = None
    ) -> Measurement:
        """Give an interval its unit and direction."""
        fields = {name: getattr(interval, name) for name in Interval.model_fields}
        return cls(**fields, unit=unit, higher_is_better=higher_is_better, stamp_id=stamp_id)

    @classmethod
    def counted(cls, value: float, *, unit: str, higher_is_better: bool = False) -> Measurement:
        """Make the measurement of a quantity that is counted and has no error: bytes on disk, parameters."""
        return cls(
            value=value, low=value, high=value, n=1, confidence=1.0, unit=unit, higher_is_better=higher_is_better
        )

    def __str__(self) -> str:
        if self.exact:
            return f"{_with_unit(self.value, self.unit)} (exact)"
        if self.unit == "B":
            spread = max(self.high - self.value, self.value - self.low)
            return f"{human_size(self.value)} ± {human_size(spread)} (n={self.n})"
        scale, unit = (1e3, "ms") if self.unit == "s" and abs(self.value) < 1 else (1.0, self.unit)
        text = format_interval(self.value * scale, self.low * scale, self.high * scale, unit)
        return f"{text} (n={self.n})"


class MemoryUse(Frozen):
    """Hold the resident memory of a process that served an artifact, in bytes.

    `baseline` before the artifact was opened (interpreter and imports), `after_open` when it lay open, `peak` the most
    that was ever resident; `peak_open` and `peak_run` split it into opening and running, where the system lets the mark
    be reset (`resettable`). What the artifact itself costs is `peak - baseline`.
    """

    baseline: int
    after_open: int
    peak_open: int
    peak_run: int
    resettable: bool

    @property
    def peak(self) -> int:
        """Return the most bytes that were ever resident."""
        return max(self.peak_open, self.peak_run)

    @property
    def own_peak(self) -> int:
        """Return the peak above what the interpreter and its imports take."""
        return self.peak - self.baseline


def format_interval(value: float, low: float, high: float, unit: str = "") -> str:
    """Write `value ± half-width`, or `value (low to high)` when the halves differ, to two digits of the error."""
    suffix = f" {unit}" if unit else ""
    below, above = value - low, high - value
    if low == high:
        return f"{value:g}{suffix}"
    if not (isfinite(low) and isfinite(high)):
        return f"{value:.4g}{suffix} ({low:.4g} to {high:.4g})"
    digits = min(max(1 - floor(log10(max(below, above))), 0), 9)
    if min(below, above) > 0.7 * max(below, above):
        return f"{value:.{digits}f}{suffix} ± {max(below, above):.{digits}f}{suffix}"
    return f"{value:.{digits}f}{suffix} ({low:.{digits}f} to {high:.{digits}f})"


def _with_unit(value: float, unit: str) -> str:
    if unit == "B":
        return human_size(value)
    return f"{value:g} {unit}".strip()
