"""The technique `prune_until`: a goal for cutting in place of sizes, which are found out before anything is cut.

`plan` and `apply` measure how long the blocks take at each size, predict what each costs, and put `prune` steps with
the sizes that they found in its place (`plan/settled.py`): what is carried out, shown and kept in the artifact's
manifest are those. `Until` is what it has in common with other steps that may be given such a goal (`gates`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from gossamer.errors import RecipeError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import Cuttable, ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.uneven import read_share

Quantity = Literal["latency", "params"]


class Until(Technique):
    """A step that may be given a goal for the blocks in place of sizes: what they take, or hold."""

    latency: str | None = Field(None, description="share of the time of all blocks that is left, as 50%")
    params: str | None = Field(None, description="share of the parameters of all blocks that is left, as 80%")

    @field_validator("latency", "params")
    @classmethod
    def _is_a_share(cls, value: str | None) -> str | None:
        share = read_share(value) if value is not None else 0.5
        if share is None or not 0 < share < 1:
            raise ValueError(f"{value!r} is no share between 0% and 100%")
        return value

    @property
    @abstractmethod
    def may_cut(self) -> tuple[Cuttable, ...]:
        """Return the kinds of units that may go for the goal."""

    @abstractmethod
    def with_sizes(self, cuts: Sequence[Prune]) -> tuple[Technique, ...]:
        """Return the steps that stand in this one's place, once the sizes that meet its goal are found."""

    @property
    def quantity(self) -> Quantity | None:
        """Return what is bounded; None where sizes are given."""
        if self.latency is not None:
            return "latency"
        return "params" if self.params is not None else None

    @property
    def share(self) -> float:
        """Return the share that may be left."""
        share = read_share(self.latency or self.params or "")
        assert share is not None
        return share

    def _check_settled(self) -> None:
        """Raise RecipeError where sizes are still to be found."""
        if self.quantity is not None:
            raise RecipeError(
                f"the sizes of `{self.label()}` are found out by measuring",
                "`gossamer plan` with this recipe finds them; or give them: prune: {what: ffn, to: 50%}",
            )


class PruneUntil(Until):
    """Cut heads and channels, each block as far as it costs least, until blocks take a share of their time or bytes.

    In a recipe: `- prune_until: {latency: 50%}` or `- prune_until: {params: 80%, what: [ffn]}`, before steps that
    round: the time is that of the blocks as these steps hold them.
    """

    name: ClassVar[str] = "prune_until"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=Prune.needs.calibration_rows, before=(*Prune.needs.before,), excludes=("prune",)
    )

    what: tuple[Literal["heads", "ffn"], ...] = Field(
        ("heads", "ffn"), min_length=1, description="what may be cut: heads of attentions, channels (ffn)"
    )

    @model_validator(mode="after")
    def _has_one_goal(self) -> Self:
        if (self.latency is None) == (self.params is None):
            raise ValueError("say either `latency` or `params`")
        return self

    @property
    def may_cut(self) -> tuple[Cuttable, ...]:
        """Return the kinds of units that may go."""
        return self.what

    def with_sizes(self, cuts: Sequence[Prune]) -> tuple[Technique, ...]:
        """Return the steps that cut to these sizes."""
        return tuple(cuts)

    def label(self) -> str:
        """Return the goal in a few words: `prune until latency 50%`."""
        return f"prune until {self.quantity} {self.latency or self.params}"

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Raise RecipeError: what it decides is known only once it is settled."""
        self._check_settled()
        return []

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Raise RecipeError, as `resolve` does."""
        self._check_settled()
        return candidate

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: the planner solves for its goal itself, and proposes the sizes."""
        yield from ()
