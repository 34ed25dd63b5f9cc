"""What a sweep keeps in the run folder, so that a killed run goes on behind the last finished block, bytes the same.

    block step      the codes of one block and the plain weights that were changed in it, kept
    stream step     the calibration samples as they are behind that block, verbatim; the one before it is removed

Both are content-addressed by everything that they depend on: model, rows, settings, the steps applied before, the code.
Without a run folder nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.models.deferred import Outline
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.roles import Stack
from gossamer.models.walker import Output, Stream
from gossamer.run.workspace import Run

if TYPE_CHECKING:
    from gossamer.techniques.blockwise import Block

CODES, STREAMS = "codes.safetensors", "streams.safetensors"
WEIGHT_VALUES = ".weight-values"
Places = Sequence[tuple[Stack, int]]


class SweepMemory:
    """Save and load finished blocks and streams; `inputs` is what they all depend on."""

    def __init__(self, run: Run | None, inputs: Mapping[str, Any]) -> None:
        self.run = run
        self.inputs = inputs

    def save(self, stack: str, index: int, block: Block, finding: Mapping[str, Any]) -> None:
        """Keep the codes and changed weights of a solved block, with what was found."""
        if self.run is None:
            return

        def build(folder: Path) -> dict[str, Any]:
            save_file(_tensors(block.solved) | _plain(block), folder / CODES)
            return {**finding, "specs": {name: codes.spec.model_dump() for name, codes in block.solved.items()}}

        step = self.run.step("block", self._at(stack, index), build)
        if block.candidate.weights is not None:  # what lies on disk need not stay in memory
            self._put(block, step.folder, {name: codes.spec for name, codes in block.solved.items()})
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
            outline = Outline(spec, shape, block.decisions[parameter].layer.transposed)
            read = partial(_read_codes, path, parameter, outline)
            if block.candidate.weights is not None:
                block.candidate.defer(parameter, outline, read)
            else:
                block.set_quantized(parameter, read())

    def load(self, stack: str, index: int, block: Block) -> dict[str, Any] | None:
        """Put a finished block's codes and weights in place, return what was found; None when it is not finished."""
        if self.run is None or not self.run.has("block", self._at(stack, index)):
            return None
        step = self.run.step("block", self._at(stack, index), _never)
        found = step.value["specs"]  # sorted by name: the order in which they were solved is that of the decisions
        specs = {name: QuantSpec.model_validate(found[name]) for name in block.decisions if name in found}
        assert len(specs) == len(found), f"codes of {sorted(set(found) - set(specs))} belong to no decision"
        self._put(block, step.folder, specs)
        return dict(step.value)

    def solved_all(self, places: Places, outside: bool) -> bool:
        """Say whether every block is finished, and what is outside of them too."""
        wanted = [(stack.name, index) for stack, index in places] + ([("", 0)] if outside else [])
        run = self.run
        return run is not None and all(run.has("block", self._at(stack, index)) for stack, index in wanted)

    def save_streams(self, places: Places, number: int, live: Stream, reference: Stream) -> None:
        """Keep the samples as they are behind place `number`, and remove those behind the place before."""
        if self.run is None:
            return

        def build(folder: Path) -> dict[str, Any]:
            tensors: dict[str, Tensor] = {}
            shapes = {name: _pack(name, stream, tensors) for name, stream in _named(live, reference)}
            save_file(tensors, folder / STREAMS)
            return shapes

        self.run.step("stream", self._behind(places, number), build)
        if number:
            self.run.discard("stream", self._behind(places, number - 1))

    def load_streams(self, places: Places, live: Stream, reference: Stream) -> int:
        """Fill the streams with the last that were kept, and return how many places they have passed (0: none)."""
        if self.run is None:
            return 0
        for number in reversed(range(len(places))):
            if self.run.has("stream", self._behind(places, number)):
                step = self.run.step("stream", self._behind(places, number), _never)
                tensors = load_file(step.folder / STREAMS)
                for name, stream in _named(live, reference):
                    _unpack(name, stream, step.value[name], tensors)
                return number + 1
        return 0

    def forget_streams(self, places: Places) -> None:
        """Remove the last streams: the sweep is over."""
        if self.run is not None and places:
            self.run.discard("stream", self._behind(places, len(places) - 1))

    def _at(self, stack: str, index: int) -> dict[str, Any]:
        return {**self.inputs, "stack": stack, "block": index}

    def _behind(self, places: Places, number: int) -> dict[str, Any]:
        stack, index = places[number]
        return self._at(stack.name, index)


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


def _named(live: Stream, reference: Stream) -> tuple[tuple[str, Stream], ...]:
    return ("live", live), ("reference", reference)


def _pack(name: str, stream: Stream, tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Add a stream's tensors to `tensors`; return for each of its lists what each output is made of.

    None is a tensor by itself; a list says of each part of a tuple whether it is a tensor (else it is None).
    """
    shapes: dict[str, list[Any]] = {}
    for part, outputs in [("", stream.outputs), *stream.finished.items()]:
        shapes[part] = []
        for position, output in enumerate(outputs):
            pieces = (output,) if isinstance(output, Tensor) else output
            for place, piece in enumerate(pieces):
                if isinstance(piece, Tensor):
                    # a copy: outputs may share memory, which the format refuses
                    tensors[f"{name}/{part}/{position}/{place}"] = piece.detach().clone().contiguous()
                else:
                    assert piece is None, f"a block gives {type(piece).__name__} among its outputs"
            shapes[part].append(None if isinstance(output, Tensor) else [piece is not None for piece in output])
    return shapes


def _unpack(name: str, stream: Stream, shapes: Mapping[str, list[Any]], tensors: Mapping[str, Tensor]) -> None:
    """Fill a stream with what `_pack` took apart."""
    for part, made_of in shapes.items():
        outputs: list[Output] = []
        for position, pieces in enumerate(made_of):
            key = f"{name}/{part}/{position}"
            if pieces is None:
                outputs.append(tensors[f"{key}/0"])
            else:
                outputs.append(
                    tuple(tensors[f"{key}/{place}"] if there else None for place, there in enumerate(pieces))
                )
        if part:
            stream.finished[part] = outputs
        else:
            stream.outputs = outputs


def _never(_: Path) -> dict[str, Any]:
    raise AssertionError("a finished step is not built again")
