"""Make large models small and fast, and prove it: say the goal, get a model that is proven to meet it.

>>> import gossamer
>>> result = gossamer.optimize("./my-bert", task="text-classification", data="train.jsonl", evaluation="test.jsonl",
...                            goal="quality >= 99%, size <= 30%, latency <= 40%")  # doctest: +SKIP
>>> result.verdict, result.artifact  # doctest: +SKIP
('PASS', 'build/artifact')
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.api import apply, bench, compare, doctor, evaluate, inspect, optimize, plan, report
    from gossamer.errors import GossamerError
    from gossamer.goal import Goal, parse_goal
    from gossamer.judgement import Verdict
    from gossamer.models.source import Source
    from gossamer.plan.records import PlanResult, RunResult
    from gossamer.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Goal",
    "GossamerError",
    "PlanResult",
    "Recipe",
    "RunResult",
    "Source",
    "Verdict",
    "apply",
    "bench",
    "compare",
    "doctor",
    "evaluate",
    "inspect",
    "optimize",
    "parse_goal",
    "plan",
    "report",
]

# imported only when asked for: torch and transformers take seconds, and `gossamer --help` needs neither
_HOMES = {
    "Goal": "gossamer.goal",
    "GossamerError": "gossamer.errors",
    "PlanResult": "gossamer.plan.records",
    "Recipe": "gossamer.recipe",
    "RunResult": "gossamer.plan.records",
    "Source": "gossamer.models.source",
    "Verdict": "gossamer.judgement",
    "parse_goal": "gossamer.goal",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use. Raises AttributeError for what is not public."""
    if name not in __all__:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "gossamer.api")), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
