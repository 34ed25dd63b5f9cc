"""What a sweep keeps in the run folder, so that a killed run goes on behind the last finished block, bytes the same.

    block step      the codes of one block and the plain weights that were changed in it, kept
    stream step     the calibration samples as they are behind that block, verbatim: one step for those that passed the
                    solved blocks, one for those that passed the blocks as they were; the steps before them are removed

All are content-addressed by everything that they depend on: model, rows, settings, the steps applied before, the code.
Without a run folder nothing is kept.

Of several processes the leader writes what is solved, and each its own samples: a stream has a file for each chunk of
them (`sweep_shared.py`), so that any number of processes may go on. All of them see the run folder. Samples that do not
fit into memory stay in these files and are read from there, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.models.deferred import Outline
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.roles import Stack
from gossamer.models.spilled import Lazy, TensorFile
from gossamer.models.walker import Output, Stream
from gossamer.run.atomic import storage_errors
from gossamer.run.team import ALONE, Team
from gossamer.run.workspace import Run
from gossamer.techniques.sweep_samples import fetch, store
from gossamer.techniques.sweep_shared import Share

if TYPE_CHECKING:
    from gossamer.techniques.block import Block

CODES, TENSORS = "codes.safetensors", ".tensors"
LIVE, REFERENCE = "live", "reference"
WEIGHT_VALUES = ".weight-values"
Places = Sequence[tuple[Stack, int]]


class SweepMemory:
    """Save and load finished blocks and streams; `inputs` is what they all depend on."""

    def __init__(self, run: Run | None, inputs: Mapping[str, Any], team: Team = ALONE) -> None:
        self.run = run if team.leads else None
        self.inputs = inputs
        self.team = team
        self.kept = bool(team.everywhere(run is not None))

    @property
    def scratch(self) -> Path | None:
        """Return the folder for what need not outlive this process; every process sees the same disk."""
        found = self.team.everywhere(str(self.run.folder / "scratch") if self.run is not None else "")
        return Path(found) if found else None

    def save(self, stack: str, index: int, block: Block, finding: Mapping[str, Any]) -> None:
        """Keep the codes and changed weights of a solved block, with what was found."""
        if not self.kept:
            return

        def build(folder: Path) -> dict[str, Any]:
            save_file(_tensors(block.solved) | _plain(block), folder / CODES)
            return {**finding, "specs": {name: codes.spec.model_dump() for name, codes in block.solved.items()}}

        if self.run is not None:
            self.run.step("block", self._at(stack, index), build)
        if block.candidate.weights is not None:  # what lies on disk need not stay in memory
            folder, _ = self._finished("block", self._at(stack, index))
            self._put(block, folder, {name: codes.spec for name, codes in block.solved.items()})
            block.solved.clear()
            block.weights.clear()
            block.replaced.clear()

    def _put(self, block: Block, folder: Path, specs: Mapping[str, QuantSpec]) -> None:
        """Put a block's changed weights and its codes in place: at once, or read whenever they are asked for."""
        path = folder / CODES
        with safe_open(path, "pt") as file:
            plain = [name for name in file.keys() if name.endswith(WEIGHT_VALUES)]  # noqa: SIM118 - no mapping
        for name in plain:
            block.candidate.put_weight(name.removesuffix(WEIGHT_VALUES), partial(_read_tensor, path, name))
        for parameter, spec in specs.items():
            shape = tuple(block.candidate.module.get_parameter(parameter).shape)
            outline = Outline(spec, shape, block.inside[parameter].layer.transposed, spec.scale_dtype)
            read = partial(_read_codes, path, parameter, outline)
            if block.candidate.weights is not None:
                block.candidate.defer(parameter, outline, read)
            else:
                block.set_quantized(parameter, read())

    def load(self, stack: str, index: int, block: Block) -> dict[str, Any] | None:
        """Put a finished block's codes and weights in place, return what was found; None when it is not finished."""
        if not self._has("block", self._at(stack, index)):
            return None
        folder, value = self._finished("block", self._at(stack, index))
        found = value["specs"]  # sorted by name: the order in which they were solved is that of the decisions
        specs = {name: QuantSpec.model_validate(found[name]) for name in block.inside if name in found}
        assert len(specs) == len(found), f"codes of {sorted(set(found) - set(specs))} belong to no decision"
        self._put(block, folder, specs)
        return dict(value)

    def solved_all(self, places: Places, outside: bool) -> bool:
        """Say whether every block is finished, and what is outside of them too."""
        wanted = [(stack.name, index) for stack, index in places] + ([("", 0)] if outside else [])
        return all(self._has("block", self._at(stack, index)) for stack, index in wanted)

    def passed(
        self,
        places: Places,
        number: int,
        of: str,
        outputs: Iterator[Output],
        *,
        share: Share,
        spilled: bool,
    ) -> Sequence[Output]:
        """Return what the samples of a stream are behind place `number`, kept in the run folder.

        `outputs` are computed only when they are not there already. They stay in memory unless `spilled`.
        """
        if not self.kept:
            return list(outputs)
        at = self._behind(places, number, of)
        if self._has("stream", at):
            return self._fetched(at, share)
        held: list[Output] | None = None if spilled else []

        def build(folder: Path) -> dict[str, Any]:
            where = Path(self.team.everywhere(str(folder)))
            with storage_errors(where):
                told = _written(where, outputs, share, held)
            return {chunk: entries for theirs in self.team.gathered(told) for chunk, entries in theirs.items()}

        if self.run is not None:
            self.run.step("stream", at, build)
        else:
            build(Path())
        return held if held is not None else self._fetched(at, share)

    def _fetched(self, at: Mapping[str, Any], share: Share) -> Sequence[Output]:
        """Return the outputs of a finished step that belong to this process, read when they are asked for."""
        folder, index = self._finished("stream", at)
        files = {chunk: TensorFile((folder / f"{chunk}{TENSORS}").open("rb")) for chunk in index}
        entries = [
            (files[str(chunk)], entry)
            for chunk, _ in share.rounds
            if str(chunk) in index
            for entry in index[str(chunk)]
        ]
        return Lazy(lambda position: fetch(*entries[position]), range(len(entries)))

    def load_streams(self, places: Places, live: Stream, reference: Stream, share: Share) -> int:
        """Fill the streams with the last that were kept, and return how many places they have passed (0: none).

        What a kill has left of places before that is removed.
        """
        if not self.kept:
            return 0
        numbers = reversed(range(len(places)))
        last = next((n for n in numbers if self._has("stream", self._behind(places, n, LIVE))), -1)
        for number in range(last + 1):
            stack, index = places[number]
            if index < stack.num_blocks - 1 and number < last:
                self._discard(places, number)
                continue
            for of, stream in ((LIVE, live), (REFERENCE, reference)):
                stream.outputs = self._fetched(self._behind(places, number, of), share)
                if index == stack.num_blocks - 1:
                    stream.finish(stack.name)
        return last + 1

    def forget_streams(self, places: Places, behind: int | None = None) -> None:
        """Remove the streams behind place `behind`, which nothing will ask for again; all when the sweep is over.

        Those behind the last block of a stack are asked for until the end.
        """
        if behind is None:
            for number in range(len(places)):
                self._discard(places, number)
        elif behind >= 0 and places[behind][1] < places[behind][0].num_blocks - 1:
            self._discard(places, behind)

    def _discard(self, places: Places, number: int) -> None:
        if self.run is not None:
            for of in (LIVE, REFERENCE):
                self.run.discard("stream", self._behind(places, number, of))

    def _has(self, kind: str, at: Mapping[str, Any]) -> bool:
        """Say whether a step is finished: what the leader sees, on every process."""
        return bool(self.team.everywhere(self.run is not None and self.run.has(kind, at)))

    def _finished(self, kind: str, at: Mapping[str, Any]) -> tuple[Path, Any]:
        """Return folder and value of a finished step, on every process."""
        step = self.run.step(kind, at, _never) if self.run is not None else None
        folder, value = self.team.everywhere([str(step.folder), step.value] if step is not None else None)
        return Path(folder), value

    def _at(self, stack: str, index: int) -> dict[str, Any]:
        return {**self.inputs, "stack": stack, "block": index}

    def _behind(self, places: Places, number: int, of: str) -> dict[str, Any]:
        stack, index = places[number]
        return {**self._at(stack.name, index), "of": of}


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        values: Tensor = file.get_tensor(name)
        return values


def _read_codes(path: Path, parameter: str, outline: Outline) -> Quantized:
    """Return the codes of one parameter from a block's file."""
    with safe_open(path, "pt") as file:
        zero_point = f"{parameter}.zero_point"
        return Quantized(
            codes=file.get_tensor(f"{parameter}.codes"),
            scale=file.get_tensor(f"{parameter}.scale"),
            zero_point=file.get_tensor(zero_point) if zero_point in file.keys() else None,  # noqa: SIM118 - no mapping
            spec=outline.spec,
            shape=outline.shape,
            transposed=outline.transposed,
        )


def _tensors(solved: Mapping[str, Quantized]) -> dict[str, Tensor]:
    tensors = {}
    for parameter, codes in solved.items():
        tensors[f"{parameter}.codes"], tensors[f"{parameter}.scale"] = codes.codes, codes.scale
        if codes.zero_point is not None:
            tensors[f"{parameter}.zero_point"] = codes.zero_point
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _plain(block: Block) -> dict[str, Tensor]:
    """Return the plain weights that were changed, but for those that codes have replaced since."""
    kept = {name: values for name, values in block.weights.items() if name not in block.solved}
    return {f"{name}{WEIGHT_VALUES}": values.contiguous() for name, values in kept.items()}


def _written(folder: Path, outputs: Iterator[Output], share: Share, held: list[Output] | None) -> dict[str, Any]:
    """Write outputs as they come, a file for each chunk; return what each file holds. Adds them to `held` too."""
    told: dict[str, Any] = {}
    for chunk, places in share.rounds:
        file = None
        for output in islice(outputs, len(places)):
            if file is None:
                file, told[str(chunk)] = TensorFile((folder / f"{chunk}{TENSORS}").open("wb")), []
            told[str(chunk)].append(store(file, output))
            if held is not None:
                held.append(output)
    return told


def _never(_: Path) -> dict[str, Any]:
    raise AssertionError("a finished step is not built again")
