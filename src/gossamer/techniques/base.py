"""The contract of a technique: one frozen model holds its settings, its needs, and what it does.

The registry, the recipe's YAML schema, the command line's help, the docs page and the planner's search space all
derive from this one class. A new technique is one file with one subclass.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field

from gossamer.errors import TechniqueError
from gossamer.models.caches import CacheSpec
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import Cut, LayerInfo, ModelMap
from gossamer.run.device import CPU
from gossamer.run.progress import Progress
from gossamer.run.team import ALONE, Team
from gossamer.run.workspace import Run
from gossamer.tasks.base import Arrays, Batch, Task

if TYPE_CHECKING:
    from gossamer.runtimes.base import Runtime


VALUE_BYTES = 7  # of a weight while it is rounded: as stored, its codes, those packed, and what packing takes


@dataclass(frozen=True)
class Needs:
    """Declare what a technique needs before it can run, and its place in a recipe.

    `calibration_rows` and `training` ask for data; `after` and `before` name techniques that must precede or follow
    it when both are in a recipe; `excludes` names techniques that cannot be combined with it.
    """

    calibration_rows: int = 0
    training: bool = False
    gradients: bool = False
    roles: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Say what a technique will do to one named parameter: the row of the resolved table that the user sees."""

    parameter: str
    layer: LayerInfo
    weight: QuantSpec | None = None
    activation: ActivationSpec | None = None
    dtype: str | None = None
    cache: CacheSpec | None = None  # of an attention's keys or values, whose scale `parameter` is then
    cut: Cut | None = None  # of a dimension, which `parameter` names then

    def __str__(self) -> str:
        parts = [
            str(part) for part in (self.weight, self.activation, self.dtype, self.cache, self.cut) if part is not None
        ]
        return f"{self.parameter}: {', '.join(parts)}"


@dataclass(frozen=True)
class Context:
    """Hold what `apply` may use besides the candidate: one example request, calibration batches, progress, the seed.

    `run` remembers finished parts of a long step, `identity` is what they depend on besides the steps themselves.
    `samples_memory` is how many bytes calibration samples may take together (None: as many as they are); `team` are the
    processes that carry out this step together, each with the same candidate. `training` gives the batches, of one row
    each, that neither calibrate nor prove, `as_original` the same rows in the original's own tokens, where an earlier
    step cut some, and `training_print` is the hash of their rows. `device` is where samples pass blocks, solvers
    compute and trainings take place; the candidate itself lies in main memory. `holds` says whether the files can hold
    a layer with another grid than the recipe has for it.
    """

    task: Task
    example: Arrays
    calibration: Sequence[Batch]
    progress: Progress
    seed: int = 0
    run: Run | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    samples_memory: int | None = None
    team: Team = ALONE
    training: Callable[[], Sequence[Batch]] = tuple
    as_original: Callable[[], Sequence[Batch]] = tuple
    training_print: str = ""
    device: torch.device = CPU
    holds: Callable[[LayerInfo, QuantSpec], bool] = lambda layer, spec: False


@dataclass(frozen=True)
class SearchSpace:
    """Hold what `candidates` may look at: the model's map, the runtime that will serve it, the task.

    `wanted` are the quantities that the goal bounds or asks the most or least of (`latency`, `size`); `bounds` what of
    the original's may be left of those that it bounds from above;
    `training_rows` how many rows there are to learn from.
    """

    model: ModelMap
    runtime: Runtime
    task: Task
    calibration_rows: int
    wanted: frozenset[str] = frozenset()
    bounds: Mapping[str, float] = field(default_factory=dict)
    training_rows: int = 0


def searched(default: Any, domain: Iterable[Any], description: str) -> Any:
    """Declare a setting together with the values that the planner may try: the domain stands beside the default."""
    return Field(default, description=description, json_schema_extra={"search": list(domain)})


def resolved(model: ModelMap, steps: Iterable[Technique]) -> tuple[list[Decision], ModelMap]:
    """Return all that some steps decide, one after another, and the map of the model that they leave.

    Raises RecipeError as `Technique.resolve` does.
    """
    decisions: list[Decision] = []
    for step in steps:
        decisions += step.resolve(model)
        model = step.after(model)
    return decisions, model


def check_not_rounded(candidate: Candidate, decisions: Iterable[Decision]) -> None:
    """Raise TechniqueError where an earlier step has rounded a parameter that is to be rounded."""
    again = [decision.parameter for decision in decisions if decision.parameter in candidate.quantized]
    if again:
        raise TechniqueError(
            f"{len(again)} parameters were rounded by an earlier step: {', '.join(again[:3])}",
            "name them under `ignore` in one of the two steps",
        )


class Technique(BaseModel, ABC):
    """One step of a recipe: settings, needs, and `apply`. Frozen: two equal techniques do equal things."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]  # the key in a recipe
    family: ClassVar[str]  # quantize, prune, distill, adapt
    needs: ClassVar[Needs]
    divergence_left: ClassVar[float] = 1.0  # of a repair: the share that it usually leaves of what earlier steps made

    @abstractmethod
    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return what will be done to which parameter. Raises RecipeError when a pattern matches nothing."""

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model once this step is done: what later steps resolve against."""
        return model

    @abstractmethod
    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with this technique applied; the one given is used up."""

    @classmethod
    @abstractmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield runs of steps that the planner may put into a recipe, from this technique's search domains.

        A run may hold steps of other techniques that this one leaves to them (embeddings, say).
        """

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return the steps of which one brings back quality that `steps` lost, at the same bytes: the strongest first.

        Asked for recipes that fall short in quality alone; the first that there is time for is proposed. Whoever
        returns a step says in `divergence_left` what it is worth, and `candidates` does not yield it.
        """
        del steps, space
        return ()

    def rows_needed(self) -> int:
        """Return how many calibration rows this step cannot do without, with the settings that it has."""
        return self.needs.calibration_rows

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return about how much memory `apply` takes on a model that is read piece by piece, the process left out.

        `sample_bytes` is what one calibration sample takes between two blocks.
        """
        return VALUE_BYTES * max((layer.num_parameters for layer in model.layers), default=0)

    def model_passes(self, num_samples: int, left: float = 1.0) -> float:
        """Return how many passes of one sample through the original `apply` takes; forward and back counts 3.

        The samples are those that calibrate, of a step that needs training those that there are to learn from. `left`
        is the share of the original's operations that steps before this one leave the candidate.
        """
        del num_samples, left
        return 0.0

    @classmethod
    def domain(cls, setting: str) -> list[Any]:
        """Return the values of a setting that the planner may try: its declared domain, or only its default."""
        field = cls.model_fields[setting]
        extra = field.json_schema_extra
        return list(cast("list[Any]", extra["search"])) if isinstance(extra, dict) else [field.default]

    @classmethod
    def product(cls, *settings: str) -> Iterator[dict[str, Any]]:
        """Yield every combination of the domains of these settings."""
        for values in itertools.product(*(cls.domain(setting) for setting in settings)):
            yield dict(zip(settings, values, strict=True))

    def label(self) -> str:
        """Return a few words that tell this step from others of its kind, for tables and file names."""
        settings = ", ".join(f"{name} {value}" for name, value in self.entry()[self.name].items())
        return f"{self.name} ({settings})" if settings else self.name

    def entry(self) -> dict[str, Any]:
        """Return the recipe entry: {name: settings that differ from the defaults}."""
        fields = type(self).model_fields.items()  # pydantic's exclude_defaults keeps those that have a serializer
        changed = {
            name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        return {self.name: self.model_dump(mode="json", include=changed)}
