"""Find the range of a layer's input for static 8-bit activations: min-max, percentile, or least squared error.

One pass over the calibration rows finds the extremes of every input; a second fills a histogram of NUM_BINS equal
bins between them. From the histogram h over bin centres c:

    min-max       [min, max] as seen; one outlier costs every other value its precision
    percentile    the shortest [low, high] that leaves (1 - p) / 2 of the mass outside on each side
    mse           argmin over shrunken ranges of sum_i h_i * (c_i - round_to_grid(c_i))^2

(Migacz 2017 uses the same histogram with a divergence; the squared error was chosen because it needs no smoothing
and agrees with how the weights' grids are judged.) Ranges always include zero: padding must stay exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError

Observer = Literal["minmax", "percentile", "mse"]

NUM_BINS = 4096
NUM_SHRINKS = 64


@dataclass
class Range:
    """Hold what was seen of one layer's input: extremes, and after the second pass a histogram between them."""

    low: float = float("inf")
    high: float = float("-inf")
    counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))

    def widen(self, values: Tensor) -> None:
        """Take the extremes of `values` in."""
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def count(self, values: Tensor) -> None:
        """Add `values` to the histogram between the extremes found before."""
        if self.high > self.low:
            self.counts += torch.histc(values.float(), NUM_BINS, self.low, self.high).double()

    def centres(self) -> Tensor:
        """Return the middles of the bins, float64 [NUM_BINS]."""
        edges = torch.linspace(self.low, self.high, NUM_BINS + 1, dtype=torch.float64)
        return (edges[1:] + edges[:-1]) / 2


def chosen_range(seen: Range, observer: Observer, percentile: float, *, symmetric: bool) -> tuple[float, float]:
    """Return (low, high), including zero, that `observer` picks from what was seen."""
    if observer == "minmax" or seen.high <= seen.low:
        return min(seen.low, 0.0), max(seen.high, 0.0)
    if observer == "percentile":
        return percentile_range(seen, percentile)
    return mse_range(seen, symmetric=symmetric)


def percentile_range(seen: Range, percentile: float) -> tuple[float, float]:
    """Return the range that leaves (100 - percentile) / 2 percent of the values outside at each end."""
    mass = seen.counts.cumsum(0) / seen.counts.sum()
    tail = (1 - percentile / 100) / 2
    centres = seen.centres()
    low = centres[int(torch.searchsorted(mass, tail).clamp(max=NUM_BINS - 1))]
    high = centres[int(torch.searchsorted(mass, 1 - tail).clamp(max=NUM_BINS - 1))]
    return min(float(low), 0.0), max(float(high), 0.0)


def mse_range(seen: Range, *, symmetric: bool) -> tuple[float, float]:
    """Return the range whose 8-bit grid has the least expected squared error under the histogram."""
    centres = seen.centres()
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best, best_error = (low, high), float("inf")
    for shrink in torch.linspace(1.0, 0.2, NUM_SHRINKS).tolist():
        trial = (low * shrink, high * shrink)
        rounded = round_to_range(centres, *trial, symmetric=symmetric)
        error = float((seen.counts * (centres - rounded).square()).sum())
        if error < best_error:
            best, best_error = trial, error
    return best


def round_to_range(values: Tensor, low: float, high: float, *, symmetric: bool) -> Tensor:
    """Return float64 `values` rounded to the 8-bit grid over [low, high] and back."""
    if symmetric:
        scale = max(abs(low), abs(high)) / 127 or 1.0
        return torch.clamp(torch.round(values / scale), -128, 127) * scale
    scale = (high - low) / 255 or 1.0
    zero_point = round(-low / scale)
    return (torch.clamp(torch.round(values / scale) + zero_point, 0, 255) - zero_point) * scale


@contextmanager
def watching(module: nn.Module, ranges: Mapping[str, Range], *, histogram: bool) -> Iterator[None]:
    """Collect the inputs of the named layers while the `with` lasts: extremes first, a histogram the second time."""
    handles = []
    for name, seen in ranges.items():

        def collect(_: nn.Module, inputs: tuple[Any, ...], seen: Range = seen, name: str = name) -> None:
            values = inputs[0].detach()
            if not bool(torch.isfinite(values).all()):
                raise TechniqueError(
                    f"the input of {name} is NaN or infinite on a calibration row", "check the rows and the model"
                )
            if histogram:
                seen.count(values)
            else:
                seen.widen(values)

        handles.append(module.get_submodule(name).register_forward_pre_hook(collect))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_ranges(module: nn.Module, names: Iterable[str], run: Iterable[Any], *, histogram: bool) -> dict[str, Range]:
    """Return a Range for each named layer after `run` (an iterable that makes one forward pass an item).

    `run` is iterated once for extremes, and once more when a histogram is needed, so it must be re-iterable.
    """
    ranges = {name: Range() for name in names}
    for is_second in (False, True) if histogram else (False,):
        with watching(module, ranges, histogram=is_second):
            for _ in run:
                pass
    unseen = [name for name, seen in ranges.items() if seen.high < seen.low]
    if unseen:
        raise TechniqueError(
            f"{len(unseen)} layers never ran on the calibration rows: {', '.join(unseen[:4])}",
            "name them under `ignore`, or use dynamic activations",
        )
    return ranges
