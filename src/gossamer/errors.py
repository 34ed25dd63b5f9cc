"""One tree of errors. Each says what was wrong, with the numbers, and the remedy as a hint."""

from __future__ import annotations


class GossamerError(Exception):
    """Report a mistake that the user can mend: `message` says what was wrong, `hint` the remedy.

    The command line prints both and exits with status 1.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class GoalError(GossamerError):
    """The goal cannot be read, names an unknown quantity, or contradicts itself."""


class RecipeError(GossamerError):
    """A recipe cannot be read, names an unknown technique or setting, or matches no module."""


class ModelError(GossamerError):
    """A model cannot be opened, is damaged, or is of a kind that cannot be treated."""


class DataError(GossamerError):
    """Rows cannot be read, a column is missing, or there are too few of them."""


class TaskError(GossamerError):
    """The task is unknown, or model and data do not fit it."""


class TechniqueError(GossamerError):
    """A technique's settings do not fit the layers that they were meant for."""


class RuntimeUnavailable(GossamerError):
    """A runtime is not installed, or cannot hold what the recipe asks for."""


class ArtifactError(GossamerError):
    """A written artifact does not hold what it should, or does not open."""


class MeasureError(GossamerError):
    """A measurement could not be taken."""


class RunError(GossamerError):
    """The run folder belongs to something else, is in use, or cannot be written."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
