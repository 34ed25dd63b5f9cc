"""Tell trackers of experiments what a run does: TensorBoard, Weights & Biases, MLflow, by Accelerate's trackers.

Only what is asked for by name is told anything. Files go into the folder given, unless a tracker's own environment
variables say where to (`MLFLOW_TRACKING_URI`, `WANDB_DIR`; `WANDB_MODE=offline` keeps Weights & Biases here).

What is told: settings at the start; numbers in series (losses of each training, figures of each candidate) with the
step that they belong to; files at the end. A series that begins again (the next candidate's training) gets a number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.errors import RunError, first_line
from gossamer.run.atomic import storage_errors
from gossamer.run.progress import Progress
from gossamer.run.team import num_processes

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FOLDER = "tracking"
PROJECT = "gossamer"
DATABASE = "mlflow.db"
Values = Mapping[str, float | str]


class Tracker(Protocol):
    """Hold one place where numbers go."""

    def settings(self, values: Values) -> None:
        """Keep what the run was asked to do."""

    def numbers(self, series: str, step: int, values: Values) -> None:
        """Keep numbers and words of a series at one step."""

    def file(self, path: Path) -> None:
        """Keep a copy of a file."""

    def finish(self, *, failed: bool) -> None:
        """Write what is left, say whether the run came to its end, and close."""


class Tracked:
    """Pass progress on, and numbers to trackers too. One that fails is said once and told nothing more.

    A tracker may be behind a network, and hours of work are not lost because it is out of reach.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._trackers: dict[str, Tracker] = {}
        self._last: dict[str, tuple[int, int]] = {}  # series -> how often it began, its last step

    def stage(self, label: str, total: float | None = None) -> AbstractContextManager[Callable[[float], None]]:
        """Open a piece of work of `total` units; what is yielded takes the units done since the last call."""
        return self._progress.stage(label, total)

    def say(self, message: str) -> None:
        """Pass one line on."""
        self._progress.say(message)

    def record(self, series: str, step: int, values: Values) -> None:
        """Tell the trackers, under a name with a number where the series begins again."""
        self._progress.record(series, step, values)
        begun, last = self._last.get(series, (1, -1))
        begun += step < last
        self._last[series] = (begun, step)
        named = series if begun == 1 else f"{series} {begun}"
        self._tell(lambda tracker: tracker.numbers(named, step, values))

    def settings(self, values: Values) -> None:
        """Tell the trackers what was asked for."""
        self._tell(lambda tracker: tracker.settings(values))

    def file(self, path: Path) -> None:
        """Give the trackers a file."""
        self._tell(lambda tracker: tracker.file(path))

    def open(self, name: str, folder: Path) -> None:
        """Begin to tell the named tracker, whose files go into `folder`. Raises RunError where it cannot be opened."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._trackers[name] = TRACKERS[name](folder.resolve())
        except Exception as error:  # whatever a library raises: a wrong address, no key, a database of another version
            raise RunError(
                f"{name} could not be opened: {first_line(error)}",
                f"see its environment variables, or leave out --track {name}",
            ) from error

    def finish(self, *, failed: bool) -> None:
        """Let every tracker write what is left, and close."""
        self._tell(lambda tracker: tracker.finish(failed=failed))

    def _tell(self, told: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                told(tracker)
            except Exception as error:  # whatever a library or a network raises: what is measured here goes on
                del self._trackers[name]
                self.say(f"{name} is told nothing more: {first_line(error)}")


@contextmanager
def tracked(names: Sequence[str], out: Path, progress: Progress) -> Iterator[Tracked]:
    """Open the named trackers while the `with` lasts.

    Raises RunError for one that is unknown, not installed, or that cannot be opened.

    >>> with tracked(["tensorboard"], Path("build"), Silent()) as progress:  # doctest: +SKIP
    ...     optimize(..., progress=progress)
    """
    if names and num_processes() > 1:
        raise RunError(f"--track is for one process, {num_processes()} were started", "leave it out under torchrun")
    found, ended = Tracked(progress), False
    try:
        for name in dict.fromkeys(names):
            _check(name)
            found.open(name, out / FOLDER / name)
        yield found
        ended = True
    finally:
        found.finish(failed=not ended)


def _check(name: str) -> None:
    if name not in TRACKERS:
        raise RunError(f"no tracker is called {name!r}", f"known: {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise RunError(f"the package {name} is not installed", f'pip install "gossamer[{name}]"')


class _Known:
    """Hold a tracker of Accelerate."""

    def __init__(self, tracker: GeneralTracker) -> None:
        from accelerate import PartialState

        PartialState()  # Accelerate's trackers ask it whether this process is the one that tells
        self.tracker: Any = tracker
        self.tracker.start()

    def settings(self, values: Values) -> None:
        """Keep what the run was asked to do."""
        self.tracker.store_init_configuration(dict(values))

    def finish(self, *, failed: bool) -> None:
        """Write what is left, and close; of a run that failed the last numbers are all there is to say so."""
        del failed
        self.tracker.finish()


class _TensorBoard(_Known):
    """Scalars and texts in event files; files are copied beside them."""

    def __init__(self, folder: Path) -> None:
        from accelerate.tracking import TensorBoardTracker

        self.folder = folder
        super().__init__(TensorBoardTracker(PROJECT, folder))

    def numbers(self, series: str, step: int, values: Values) -> None:
        """Keep numbers as scalars and words as texts."""
        self.tracker.log({f"{series}/{name}": value for name, value in values.items()}, step=step)

    def file(self, path: Path) -> None:
        """Copy a file beside the events: TensorBoard shows none."""
        (self.folder / path.name).write_bytes(path.read_bytes())


class _WeightsAndBiases(_Known):
    """A run of Weights & Biases; each series has steps of its own there."""

    def __init__(self, folder: Path) -> None:
        from accelerate.tracking import WandBTracker

        where = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
        super().__init__(WandBTracker(PROJECT, **where))

    def numbers(self, series: str, step: int, values: Values) -> None:
        """Keep numbers and words, with the step beside them: a run's own steps may not go back."""
        self.tracker.tracker.define_metric(f"{series}/*", step_metric=f"{series}/step")
        self.tracker.log({f"{series}/step": step} | {f"{series}/{name}": value for name, value in values.items()})

    def file(self, path: Path) -> None:
        """Keep a file as an artifact of the run."""
        self.tracker.tracker.log_artifact(str(path), name=path.stem, type="report")

    def finish(self, *, failed: bool) -> None:
        """Write what is left, and close: `failed` or `finished`."""
        self.tracker.tracker.finish(exit_code=int(failed))


class _MLflow(_Known):
    """A run of MLflow; words, which are no metrics, become tags."""

    def __init__(self, folder: Path) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(elsewhere or f"sqlite:///{folder / DATABASE}")  # for good: an earlier run's stays else
        super().__init__(MLflowTracker(PROJECT, None if elsewhere else (folder / "artifacts").as_uri()))

    def numbers(self, series: str, step: int, values: Values) -> None:
        """Keep numbers as metrics and words as tags."""
        import mlflow

        named = {f"{series}/{name}": value for name, value in values.items()}
        self.tracker.log({name: value for name, value in named.items() if not isinstance(value, str)}, step=step)
        mlflow.set_tags({f"{name} {step}": value for name, value in named.items() if isinstance(value, str)})

    def file(self, path: Path) -> None:
        """Keep a file as an artifact of the run."""
        self.tracker.log_artifact(str(path))

    def finish(self, *, failed: bool) -> None:
        """Write what is left, and close: FAILED or FINISHED."""
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
