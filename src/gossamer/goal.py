"""What the user wants: constraints and an objective; read from one line and printed back (`judgement.py` judges).

    quality >= 99%, size <= 30%, latency p95 <= 40ms, minimize size

A bound with `%` is a share of the original's value; any other bound is absolute and carries a unit. `quality >= 99%`
is a share of the original's score; `quality >= 0.95` is the metric's own value (accuracy 0.95), and a metric that is
better when lower takes `quality <= 32` (perplexity 32). `time` is the budget of the run itself and has no original.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gossamer.errors import GoalError

Operator = Literal[">=", "<=", ">", "<"]
STATISTICS = ("p50", "p95", "p99", "mean")


@dataclass(frozen=True)
class Quantity:
    """Describe what may stand in a goal: its units in base units (bytes, seconds, counts), its direction, its words."""

    units: Mapping[str, Fraction]
    share: str  # "at most 30 % of " + share
    absolute: str  # "at most 30 MB " + absolute
    best: str  # how the objective reads
    higher_is_better: bool = False


BYTES = {"B": Fraction(1)} | {f"{p}B": Fraction(1000**i) for i, p in enumerate("kMG", 1)}
BYTES |= {f"{p}iB": Fraction(1024**i) for i, p in enumerate("KMG", 1)}
SECONDS = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
PLAIN = {"": Fraction(1)}
PARAMETERS = PLAIN | {"K": Fraction(10**3), "M": Fraction(10**6), "B": Fraction(10**9)}
OPERATIONS = PLAIN | {"M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12)}
QUANTITIES = {
    "quality": Quantity(PLAIN, "the original's score", "as the metric's own value", "the highest quality", True),
    "size": Quantity(BYTES, "the original's bytes", "to ship", "as few bytes as possible"),
    "latency": Quantity(SECONDS, "the original's {} latency", "of {} latency", "the lowest {} latency"),
    "throughput": Quantity(
        {"/s": Fraction(1)}, "the original's throughput", "of throughput", "the highest throughput", True
    ),
    "memory": Quantity(BYTES, "the original's peak memory", "of peak memory", "the lowest peak memory"),
    "params": Quantity(PARAMETERS, "the original's parameters", "parameters", "as few parameters as possible"),
    "flops": Quantity(
        OPERATIONS,
        "the original's floating-point operations",
        "floating-point operations",
        "as few floating-point operations as possible",
    ),
    "time": Quantity(SECONDS, "", "for the run itself", ""),
}
OTHER_NAMES = {
    "accuracy": "quality",
    "score": "quality",
    "perplexity": "quality",
    "f1": "quality",
    "bytes": "size",
    "disk": "size",
    "speed": "latency",
    "ram": "memory",
    "parameters": "params",
    "macs": "flops",
    "budget": "time",
}


class Constraint(BaseModel):
    """Hold one bound: `quantity statistic op amount unit`, as the user wrote it; `bound` is what values compare with.

    `statistic` is p50 (the default), p95, p99 or mean for latency and None otherwise. Raises GoalError for a bound that
    cannot be: no unit, not above zero, or in the direction that nobody wants.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantity: str
    op: Operator
    amount: float
    unit: str = ""
    statistic: str | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        known = QUANTITIES[_known_quantity(self.quantity, str(self))]
        _check_statistic(self.quantity, self.statistic, str(self))
        if self.unit != "%" and self.unit not in known.units:
            raise GoalError(
                f"`{self}`: {self.quantity} {f'takes no {self.unit!r}' if self.unit else 'wants a unit'}",
                f"use {_units(self.quantity)}",
            )
        if self.unit == "%" and self.quantity == "time":
            raise GoalError(f"`{self}`: time is the budget of the run itself, it has no original", "write time <= 2h")
        if not (math.isfinite(self.amount) and 0 < self.bound < math.inf):
            raise GoalError(f"`{self}`: the bound {self.amount:g} is not a positive number", "use a bound above 0")
        perplexity_like = self.quantity == "quality" and not self.relative
        if self.at_least != known.higher_is_better and not perplexity_like:
            more, sign = ("more", ">=") if known.higher_is_better else ("less", "<=")
            raise GoalError(
                f"`{self}` is a bound that nobody wants: {more} {self.quantity} is better",
                f"write {self.quantity} {sign} {_number(self.amount)}{self.unit}",
            )
        return self

    @property
    def relative(self) -> bool:
        """Say whether the bound is a share of the original's value."""
        return self.unit == "%"

    @property
    def at_least(self) -> bool:
        """Say whether the bound is a floor (>=, >) and not a ceiling."""
        return self.op in (">=", ">")

    @property
    def strict(self) -> bool:
        """Say whether meeting the bound exactly is not enough."""
        return self.op in (">", "<")

    @property
    def scale(self) -> Fraction:
        """Return what one unit is in base units: a share (0.01), bytes, seconds, or a count."""
        return Fraction(1, 100) if self.relative else QUANTITIES[self.quantity].units[self.unit]

    @property
    def bound(self) -> float:
        """Return the bound as a share of the original (0.3) or in base units (bytes, seconds, counts)."""
        try:
            return float(Fraction(self.amount) * self.scale)
        except OverflowError:
            return math.inf

    @property
    def key(self) -> str:
        """Return the name under which this is measured: `size`, `latency p95`."""
        return f"{self.quantity} {self.statistic}" if self.statistic else self.quantity

    def __str__(self) -> str:
        return f"{_named(self.quantity, self.statistic)} {self.op} {_number(self.amount)}{self.unit}"

    def describe(self, confidence: float = 0.95) -> str:
        """Say it in plain words: "at most 30 % of the original's bytes"."""
        word = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[self.op]
        known = QUANTITIES[self.quantity]
        statistic = "median" if self.statistic == "p50" else self.statistic
        if self.relative:
            text = f"{word} {self.show(self.bound)} of {known.share}"
        else:
            text = f"{word} {self.show(self.bound)} {known.absolute}"
        sure = f", with {confidence * 100:g} % confidence" if self.quantity == "quality" else ""
        return text.format(statistic) + sure

    def show(self, value: float) -> str:
        """Print a value, given as `bound` is, in the unit of this constraint: "29.3 %", "38.2 ms"."""
        number = f"{value / float(self.scale):.5g}"
        return number + self.unit if self.unit == "/s" else f"{number} {self.unit}".rstrip()


class Objective(BaseModel):
    """Hold what to make as good as possible once every constraint is met."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Literal["minimize", "maximize"]
    quantity: str
    statistic: str | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        known = QUANTITIES[_known_quantity(self.quantity, str(self))]
        _check_statistic(self.quantity, self.statistic, str(self))
        if self.quantity == "time":
            raise GoalError(f"`{self}`: time is the budget of the run itself", "write a bound: time <= 2h")
        if (self.verb == "maximize") != known.higher_is_better:
            other = "maximize" if known.higher_is_better else "minimize"
            raise GoalError(f"`{self}` is what nobody wants", f"write {other} {self.quantity}")
        return self

    @property
    def key(self) -> str:
        """Return the name under which this is measured: `size`, `latency p95`."""
        return f"{self.quantity} {self.statistic}" if self.statistic else self.quantity

    def __str__(self) -> str:
        return f"{self.verb} {_named(self.quantity, self.statistic)}"

    def describe(self) -> str:
        """Say it in plain words: "within these bounds, as few bytes as possible"."""
        statistic = "median" if self.statistic == "p50" else self.statistic
        return f"within these bounds, {QUANTITIES[self.quantity].best}".format(statistic)


class Goal(BaseModel):
    """Hold what the result must meet. Raises GoalError when the parts contradict or repeat each other.

    >>> str(parse_goal("size ≤ 30 % and quality >= 99%"))
    'size <= 30%, quality >= 99%'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    constraints: tuple[Constraint, ...] = Field(min_length=1)
    objective: Objective | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for index, later in enumerate(self.constraints):
            for earlier in self.constraints[:index]:
                if (later.key, later.relative) == (earlier.key, earlier.relative):
                    what = "repeats" if later.at_least == earlier.at_least else "contradicts"
                    raise GoalError(f"`{later}` {what} `{earlier}`", f"keep one bound on {later.key}")
        return self

    def __str__(self) -> str:
        return ", ".join(str(part) for part in (*self.constraints, self.objective) if part is not None)

    def describe(self, confidence: float = 0.95) -> list[str]:
        """Say the goal in plain words, one sentence a part; what is left open is said too."""
        sentences = [constraint.describe(confidence) for constraint in self.constraints]
        if self.objective is not None:
            sentences.append(self.objective.describe())
        if not any(constraint.quantity == "quality" for constraint in self.constraints):
            sentences.append("no bound on quality: how much of the original's score is kept is not judged")
        return sentences

    def check_metric(self, name: str, higher_is_better: bool, original: float) -> None:
        """Refuse an absolute quality bound that does not fit the task's metric; `original` is its value there.

        Raises GoalError when the direction is not the metric's, or the bound is more than five times off the
        original's value (`quality >= 99` for an accuracy of 0.98: a forgotten `%`).
        """
        for constraint in self.constraints:
            if constraint.quantity != "quality" or constraint.relative:
                continue
            if constraint.at_least != higher_is_better:
                better, sign = ("higher", ">=") if higher_is_better else ("lower", "<=")
                raise GoalError(f"`{constraint}`: {name} is better when {better}", f"write quality {sign} ...")
            factor = constraint.bound / original if higher_is_better else original / constraint.bound
            if original > 0 and factor > 5:
                raise GoalError(
                    f"`{constraint}`: the original's {name} is {original:.4g}",
                    f"a share of the original is written with %: quality >= {min(constraint.amount, 99):g}%",
                )


CLAUSE = re.compile(r"(?P<name>[^<>=!]+?)\s*(?P<op>[<>=!]+)\s*(?P<bound>.*)", re.DOTALL)
BOUND = re.compile(r"(?P<amount>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>.*)", re.DOTALL)
OBJECTIVE = re.compile(r"(?P<verb>minimi[sz]e|maximi[sz]e)\b\s*(?P<name>.*)", re.IGNORECASE | re.DOTALL)


def parse_goal(text: str) -> Goal:
    """Read a goal such as "quality >= 99%, size <= 30%, latency p95 <= 40ms, minimize size".

    Parts are separated by commas, `and`, or line ends; `≥ ≤ ％ ，` are understood. Raises GoalError naming the part
    that is unknown, malformed, or contradicts another. `parse_goal(str(goal)) == goal`.
    """
    plain = unicodedata.normalize("NFKC", text).replace("≥", ">=").replace("≤", "<=").replace("μ", "u")
    parts = [part.strip() for part in re.split(r"[,;\n]|\band\b", plain, flags=re.IGNORECASE)]
    constraints: list[Constraint] = []
    objectives: list[Objective] = []
    for part in filter(None, parts):
        if match := OBJECTIVE.fullmatch(part):
            quantity, statistic = _read_name(match["name"], part)
            verb: Literal["minimize", "maximize"] = "minimize" if match["verb"].lower()[:3] == "min" else "maximize"
            objectives.append(Objective(verb=verb, quantity=quantity, statistic=statistic))
        else:
            constraints.append(_read_constraint(part))
    if not constraints:
        given = f"the goal `{text.strip()}` sets no bound" if text.strip() else "the goal is empty"
        raise GoalError(given, 'say what must hold, for example "quality >= 99%, size <= 30%"')
    if len(objectives) > 1:
        raise GoalError(f"`{objectives[1]}` follows `{objectives[0]}`: only one thing can be optimised", "keep one")
    return Goal(constraints=tuple(constraints), objective=objectives[0] if objectives else None)


def _read_constraint(part: str) -> Constraint:
    match = CLAUSE.fullmatch(part)
    if match is None or match["name"][0].isdigit():
        hint = "write a bound as: quantity, operator, number, unit - `size <= 30%` (1000, not 1,000)"
        raise GoalError(f"cannot read `{part}` in the goal", hint)
    quantity, statistic = _read_name(match["name"], part)
    if match["op"] not in (">=", "<=", ">", "<"):
        better = ">=" if QUANTITIES[quantity].higher_is_better else "<="
        hint = f"measured values never match exactly: write {_named(quantity, statistic)} {better} {match['bound']}"
        raise GoalError(f"`{part}`: `{match['op']}` is not a bound", hint)
    number = BOUND.fullmatch(match["bound"])
    if number is None:
        raise GoalError(f"`{part}`: `{match['bound']}` is not a number with a unit", f"use {_units(quantity)}")
    unit = _read_unit(quantity, number["unit"])
    op: Operator = match["op"]  # type: ignore[assignment]  # one of the four, checked above
    return Constraint(quantity=quantity, statistic=statistic, op=op, amount=float(number["amount"]), unit=unit)


def _read_name(name: str, part: str) -> tuple[str, str | None]:
    words = name.lower().split()
    if not words:
        raise GoalError(f"`{part}` names no quantity", f"use one of {', '.join(QUANTITIES)}")
    quantity = _known_quantity(words[0], part)
    statistic = " ".join(words[1:]) or ("p50" if quantity == "latency" else None)
    _check_statistic(quantity, statistic, part)
    return quantity, statistic


def _read_unit(quantity: str, unit: str) -> str:
    """Return the unit as this file spells it; an unknown one is left for Constraint to refuse."""
    plain = unit.replace(" ", "")
    spelled = {known.casefold(): known for known in ("%", *QUANTITIES[quantity].units)}
    return spelled.get(plain.casefold(), plain)


def _known_quantity(name: str, part: str) -> str:
    if name in QUANTITIES:
        return name
    near = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, QUANTITIES, n=1)), None)
    guess = f"did you mean {near}? " if near else ""
    raise GoalError(f"`{part}`: unknown quantity {name!r}", f"{guess}known: {', '.join(QUANTITIES)}")


def _check_statistic(quantity: str, statistic: str | None, part: str) -> None:
    if quantity == "latency" and statistic not in STATISTICS:
        raise GoalError(f"`{part}`: unknown statistic {statistic!r}", f"latency takes {', '.join(STATISTICS)}")
    if quantity != "latency" and statistic is not None:
        raise GoalError(f"`{part}`: {quantity} takes no statistic, found {statistic!r}", f"write {quantity} alone")


def _named(quantity: str, statistic: str | None) -> str:
    return f"{quantity} {statistic}" if statistic not in (None, "p50") else quantity


def _number(value: float) -> str:
    """Print a float so that reading it back gives the same float: 30, 0.1, 1e-07."""
    return repr(value).removesuffix(".0")


def _units(quantity: str) -> str:
    units = [unit or "a plain number" for unit in QUANTITIES[quantity].units]
    return ", ".join(units if quantity == "time" else ["% (of the original)", *units])
