"""Samples in files: the calls are the same, what is known is not written twice, and memory holds one of them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.errors import RunError
from gossamer.models.spilled import Lazy, TensorFile
from gossamer.models.walker import Call, Output, Stream
from gossamer.run import atomic
from gossamer.techniques.sweep_samples import Samples, fetch, store


def behind(outputs: list[Output]) -> Stream:
    """Return a stream whose outputs lie in a file."""
    file = TensorFile(tempfile.TemporaryFile())  # noqa: SIM115 - closed with it
    entries = [store(file, output) for output in outputs]
    return Stream(Lazy(lambda position: fetch(file, entries[position]), range(len(entries))))


def calling(lengths: list[int]) -> tuple[Stream, list[Call], int]:
    """Return a stream, what a loop would call a block with behind it, and the bytes of the calls' masks."""
    draw = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, length, 4, generator=draw) for length in lengths]
    masks = [torch.ones(length, length).tril() for length in lengths]
    stream = behind([(states, None) for states in hidden])
    calls = [
        Call((states,), {"mask": mask, "places": (mask[0], 3), "use_cache": False})
        for states, mask in zip(hidden, masks, strict=True)
    ]
    return stream, calls, sum(mask.nbytes for mask in masks)


def found_in(calls: list[Call], stream: Stream) -> Iterator[Call]:
    """Yield the calls with the stream's own tensors as hidden states, as a model's loop hands them on."""
    for position, call in enumerate(calls):
        output = stream.outputs[position]
        assert isinstance(output, tuple)
        yield Call((output[0],), call.kwargs)


def test_calls_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    stream, calls, _ = calling([3, 3, 5, 3])
    for allowed in (0, None):
        found = Samples(allowed, tmp_path).calls(lambda held: found_in(calls, held), stream, len(calls))
        assert isinstance(found, Lazy) == (allowed == 0)
        assert len(found) == len(calls)
        for ours, theirs in (*zip(found, calls, strict=True), (found[2], calls[2]), (found[1:][0], calls[1])):
            assert torch.equal(ours.args[0], theirs.args[0])
            assert torch.equal(ours.kwargs["mask"], theirs.kwargs["mask"])
            assert torch.equal(ours.kwargs["places"][0], theirs.kwargs["places"][0])
            assert ours.kwargs["places"][1] == 3
            assert ours.kwargs["use_cache"] is False
    assert not list(tmp_path.iterdir())  # a file without a name


def test_what_is_known_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[torch.Size] = []
    write = TensorFile.write

    def noting(self: TensorFile, tensor: Tensor) -> object:
        written.append(tensor.shape)
        return write(self, tensor)

    stream, calls, _ = calling([3, 3, 5, 5, 3])
    monkeypatch.setattr(TensorFile, "write", noting)
    Samples(0, tmp_path).calls(lambda held: found_in(calls, held), stream, len(calls))
    # no hidden states; masks and positions where the length changes
    assert written == [(3, 3), (3,), (5, 5), (5,), (3, 3), (3,)]


def test_they_stay_in_memory_as_long_as_they_fit(tmp_path: Path) -> None:
    stream, calls, _ = calling([6] * 4)
    each = calls[0].args[0].nbytes + calls[0].kwargs["mask"].nbytes + calls[0].kwargs["places"][0].nbytes
    each += calls[0].kwargs["mask"].nbytes  # an output as large as the largest input
    for allowed, spilled in ((4 * each, False), (4 * each - 1, True)):
        found = Samples(allowed, tmp_path).calls(lambda held: found_in(calls, held), stream, 4)
        assert isinstance(found, Lazy) == spilled
    # what finished stacks hold in memory is no longer there for others
    held = Stream(stream.outputs, {"encoder": [torch.zeros(1)]})
    assert isinstance(Samples(4 * each, tmp_path).calls(lambda _: found_in(calls, held), held, 4), Lazy)


def test_a_disk_that_cannot_hold_them_is_told_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: Usage)
    stream, calls, _ = calling([6] * 4)
    with pytest.raises(RunError, match=r"3\.\d+ kB needed, 1 kB free"):
        Samples(0, tmp_path).calls(lambda held: found_in(calls, held), stream, len(calls))


FLAT = """
import sys
import numpy as np, torch
from pathlib import Path
from torch import nn
from gossamer.measure.memory import peak_bytes, release_unused, reset_peak
from gossamer.models.candidate import Candidate
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context
from gossamer.techniques.quantize.calibrated import Gptq
torch.set_num_threads(1)
WIDTH, NARROW, TOKENS = 4096, 16, 64  # a sample takes a MiB between two blocks, and costs nothing to pass one

class Thin(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, NARROW), nn.Linear(NARROW, NARROW)
    def forward(self, x):
        return x + nn.functional.pad(self.down(self.up(x[..., :NARROW]).relu()), (0, WIDTH - NARROW))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, WIDTH), nn.ModuleList(Thin() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

torch.manual_seed(0)
net = Net().eval()
forward = lambda module, inputs: module(inputs["input_ids"])
source = Source.open(net, forward=forward)
example = {"input_ids": torch.arange(TOKENS)[None] % 32}
codes = {}
for turn, (count, allowed) in enumerate([(8, None), (8, 0), (56, 0), (56, None)]):
    candidate = Candidate(source=source, module=source.module(get_task("causal-lm")))
    model = map_model(candidate.module, example, forward)
    draw = np.random.default_rng(0)
    batches = [Batch({"input_ids": draw.integers(0, 32, (1, TOKENS))}, np.array([i])) for i in range(count)]
    with Run(Path(sys.argv[1]) / str(turn), {"verb": "test"}) as run:
        context = Context(task=get_task("causal-lm"), example={}, calibration=batches, progress=Silent(), run=run,
                          identity={"of": "test"}, samples_memory=allowed)
        release_unused()
        if not reset_peak():
            sys.exit(77)
        before = peak_bytes()
        Gptq(bits=4, group_size=16, ignore=("head",)).apply(candidate, model, context)
        print(count, peak_bytes() - before)
    left = [*(run.folder / "scratch").iterdir(), *(run.folder / "steps").glob("stream-*")]
    assert not left, left
    found = {name: (part.codes, part.scale) for name, part in candidate.quantized.items()}
    wanted = codes.setdefault(count, found)
    assert all(torch.equal(a, b) for name in wanted for a, b in zip(wanted[name], found[name], strict=True))
"""


@pytest.mark.timeout(180)
def test_memory_does_not_grow_with_the_number_of_samples_and_codes_are_the_same(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=150
    )
    if ran.returncode == 77:
        pytest.skip("this system does not let a process reset its peak memory")
    assert ran.returncode == 0, ran.stderr
    _, few, many, many_in_memory = (int(line.split()[1]) for line in ran.stdout.splitlines())
    assert many_in_memory - few > 40 << 20  # 48 MiB of samples more, in front of a block or behind it
    assert many - few < 16 << 20
