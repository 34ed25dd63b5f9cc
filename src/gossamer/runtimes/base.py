"""The contract of a runtime: write the artifact, open it, run it, and say what the file holds.

One file a runtime. A runtime lowers the codes that were decided before; it never quantizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gossamer.errors import RuntimeUnavailable

# types only: a process that serves an artifact should hold what the runtime needs, not torch and every task
if TYPE_CHECKING:
    from gossamer.models.candidate import Candidate
    from gossamer.models.quantized import ActivationSpec, QuantSpec
    from gossamer.models.roles import Cut, ModelMap
    from gossamer.models.shards import Keep
    from gossamer.models.source import Source
    from gossamer.tasks.base import Arrays, Task


@dataclass(frozen=True)
class StoredTensor:
    """Say how a file holds one parameter: its name in the model, logical bits, asymmetric or not, groups, bytes.

    `bits` is 32, 16 or the width of the codes; `bytes` counts codes, scales and zero points as they lie in the file.
    `dtype` is that of the numbers; for codes that are no integers the name of their format (`fp8`, `nvfp4`, ...).
    """

    name: str
    dtype: str
    bits: int
    group_size: int | None
    symmetric: bool
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class ExportRequest:
    """Hold what writing an artifact needs besides the candidate.

    `example` is one real batch of inputs (tracing needs one); `axes` names the axes that may vary, by input;
    `outputs` the output names to keep, the scored one first; `cache` is a folder where work that does not depend on
    the weights (an exported graph) may be kept between candidates of one run. `keep` writes one of several large files
    unless it was written by a run that was killed.
    """

    task: Task
    example: Arrays
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    cache: Path
    keep: Keep | None = None


class Session(ABC):
    """An opened artifact: give it inputs, get outputs. Lives in a process of its own while anything is measured."""

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name; floating-point outputs as float32."""

    def run_all(self, batches: Sequence[Arrays]) -> Iterator[Arrays]:
        """Yield the outputs of each batch in turn."""
        for batch in batches:
            yield self.run(batch)


class Runtime(ABC):
    """Write, open and run artifacts of one kind."""

    name: ClassVar[str]
    extra: ClassVar[str | None] = None  # the pip extra that brings it: gossamer[openvino]
    files: ClassVar[tuple[str, ...]]  # patterns of the files that a user must ship, besides tokenizer and config
    keeps_16_bits: ClassVar[bool] = False  # True: weights that came in 16 bits and were not touched stay so
    streams: ClassVar[bool] = False  # True: it can write and serve a model that does not fit into memory
    holds_layers: ClassVar[bool] = True  # False: it writes whole models only, so no layer can be timed alone
    holds_adapters: ClassVar[bool] = True  # False: no place for thin layers beside a weight
    adapter_bytes: ClassVar[int] = 4  # of one of their numbers, where nothing is cast
    holds_caches: ClassVar[bool] = False  # True: its files say how a server keeps keys and values
    holds_blocks: ClassVar[bool] = False  # True: weights may be the blocks of GGUF files
    needs_config: ClassVar[bool] = (
        False  # what opens the files builds the model from config.json, which must say its shapes
    )
    opens_with_task: ClassVar[bool] = True  # False: `open` has no use for it, and serving is lighter without
    rounds_inputs: ClassVar[bool] = False  # True: its kernels round layer inputs to 8 bits, whatever the recipe says

    def missing(self) -> str | None:
        """Return the package that is not installed, or None when the runtime can be used here."""
        return None

    @property
    def cache_refusal(self) -> str | None:
        """Return why files cannot say how keys and values are kept, or None when they can."""
        if self.holds_caches:
            return None
        return f"files for {self.name} have no place for scales of keys and values; use --runtime torch"

    def check_stock(self, candidate: Candidate) -> None:
        """Raise RuntimeUnavailable where a model was cut to shapes that its config does not say."""
        if self.needs_config and not candidate.stock:
            raise RuntimeUnavailable(
                f"config.json does not say the shapes that {candidate.source.name} was cut to",
                "use a runtime that holds a graph, or cut all blocks alike",
            )

    def cut_refusal(self, cut: Cut) -> str | None:
        """Return why files cannot hold a model that is smaller in this way, or None when they can."""
        one = cut.dimension
        if not self.needs_config or one.attributes is None:
            return None
        if not one.attributes:
            return f"no number of config.json says {one.name} cut from {cut}; use a runtime that holds a graph"
        if not cut.alike:
            said = ", ".join(one.attributes)
            return f"config.json has one number ({said}) for {one.name} and others: cut all of them, or use a graph"
        if one.sizes is not None and cut.size not in one.sizes:
            near = sorted(sorted(one.sizes, key=lambda size: abs(size - cut.size))[:3])
            return (
                f"config.json does not take {cut.size} {one.kind} of {one.name}; {', '.join(map(str, near))} it takes"
            )
        return None

    @abstractmethod
    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer (its role, its weight [O, I...]) cannot be held like this, or None when it can."""

    def refusal_beside(self, spec: QuantSpec, floats: str) -> str | None:
        """Return why codes cannot lie in a file whose floats are `float32`, `bf16` or `fp16`, or None when they can."""
        del spec, floats
        return None

    def refusal_together(self, model: ModelMap, chosen: Mapping[str, QuantSpec]) -> str | None:
        """Return why a model cannot be held with these grids by layer name, each of which alone could be, or None.

        Asked before anything is spent, with no grid at all first. A runtime that traces a model cannot follow experts:
        which of them run depends on the tokens.
        """
        stacked = [experts for experts in model.experts if experts.stacked]
        if not stacked:
            return None
        return (
            f"the model sends each token to some of {stacked[0].num_experts} experts ({stacked[0].name}), "
            f"which {self.name} does not follow"
        )

    @abstractmethod
    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return exactly how many bytes the file needs for a parameter: codes, scales, zero points, padding."""

    @abstractmethod
    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write the artifact's files into `folder` (it is there, and empty); equal candidates give equal bytes."""

    @abstractmethod
    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Open an artifact that `write` wrote, in this process."""

    def open_streamed(self, folder: Path, *, threads: int, task: Task, budget: int) -> Session:
        """Open an artifact so that at most `budget` bytes of its weights stay in memory.

        Raises RuntimeUnavailable for a runtime that opens its files whole.
        """
        raise RuntimeUnavailable(
            f"{self.name} opens its files whole: {folder} cannot be served piece by piece",
            "raise --memory, or use --runtime torch",
        )

    @abstractmethod
    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back from the files alone how each parameter is held."""

    def load_more(self, folder: Path) -> str:
        """Return the lines that follow those of `load_snippet` for what this artifact holds besides."""
        del folder
        return ""

    def notes(self, folder: Path, model: ModelMap) -> tuple[str, ...]:
        """Return what else a user should know of an artifact that was written: who else opens it, and who does not.

        `model` is the map of the original.
        """
        del folder, model
        return ()

    @abstractmethod
    def load_snippet(self, task: Task) -> str:
        """Return the few lines of Python with which a user opens and runs the artifact without gossamer."""

    def write_original(self, source: Source, folder: Path, request: ExportRequest) -> None:
        """Write the unchanged model for this runtime; the base of the same-runtime ratio."""
        from gossamer.models.candidate import Candidate

        self.write(Candidate(source=source, module=source.module(request.task)), folder, request)
