"""An artifact served by a child process: what is measured runs alone, in a process that has opened nothing else.

ONNX Runtime's, OpenVINO's and OpenMP's threads spin while they wait, so two runtimes in one process spoil each other's
times, and memory is only attributable when the process holds one artifact. The child gets the same environment whatever
it serves: thread counts, no network. Between turns it is stopped, so that its threads cost nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self

from gossamer.errors import MeasureError
from gossamer.measure.types import MemoryUse
from gossamer.runtimes.frames import BadFrame, Header, pack_arrays, pack_frame, read_frame, unpack_arrays

if TYPE_CHECKING:
    from gossamer.tasks.base import Arrays

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
STDERR_TAIL = 4000


class Served:
    """Open an artifact in a child process of its own and run, time and weigh it there. A context manager.

        with Served("onnxruntime", folder, threads=2) as served:
            outputs = served.run(inputs)
            seconds = served.time(inputs, repeats=50)
            print(served.peak_memory())

    `runtime` is a known name or `package.module:Class`; `task_name` and `task_settings` rebuild the task in the child
    where the runtime opens files with one (None: it opens them without); `cpus` pins the child to these cores where the
    system can (default: this process's own); `threads` is what the runtime may use. With `budget` the artifact is
    served piece by piece, so many bytes of its weights in memory at a time (it then wants a task).
    Every failure (the artifact does not open, the child crashes, hangs longer than `timeout` seconds, or raises) is a
    MeasureError that carries the child's message, hint, and the end of its standard error. The child dies with the
    thread that made this object.
    """

    def __init__(
        self,
        runtime: str,
        folder: Path,
        *,
        threads: int,
        task_name: str | None = None,
        task_settings: Mapping[str, Any] | None = None,
        cpus: Sequence[int] | None = None,
        timeout: float = 600.0,
        budget: int | None = None,
    ) -> None:
        self.label = f"{runtime} serving {folder}"
        self.timeout = timeout
        self.paused = False
        self._timed_digest = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gossamer.runtimes.child", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child_environment(os.environ, threads),
            start_new_session=True,  # Ctrl-C reaches the parent only, which then closes the child
        )
        self._finalizer = weakref.finalize(self, _end, self._process, self._stderr)
        try:
            if cpus and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(self._process.pid, cpus)
            for pipe in (self._process.stdin, self._process.stdout):
                os.set_blocking(_open_pipe(pipe).fileno(), False)
            self._opening: Header = {
                "op": "open",
                "runtime": runtime,
                "threads": threads,
                "task": task_name,
                "task_settings": dict(task_settings or {}),
                "budget": budget,
            }
            self.reopen(folder)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Return the child's process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Say whether the child is gone, however it went."""
        return self._process.poll() is not None

    def reopen(self, folder: Path, *, keep: bool = False) -> None:
        """Open another artifact of the same runtime in the same child, in place of the one that lay open.

        With `keep` it stays open behind others, and opening it again costs nothing: for small ones that take turns.
        """
        self._ask({**self._opening, "folder": str(Path(folder).resolve()), "keep": keep})

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs for one batch of inputs."""
        return unpack_arrays(self._ask({"op": "run"}, pack_arrays(inputs))[1])

    def run_all(self, batches: Sequence[Arrays]) -> Iterator[Arrays]:
        """Yield the outputs of each batch in turn; the runtime may work on all of them together."""
        if self._opening["budget"] is None:  # nothing is won by holding them all in the child
            yield from map(self.run, batches)
            return
        for position, inputs in enumerate(batches):
            header = {"op": "queue", "first": position == 0, "last": position == len(batches) - 1}
            self._ask(header, pack_arrays(inputs))
        for _ in batches:
            yield unpack_arrays(self._ask({"op": "next"})[1])

    def time(self, inputs: Arrays, repeats: int, *, warmup: int = 1) -> list[float]:
        """Return the seconds of `repeats` runs, each timed inside the child after `warmup` untimed ones.

        The inputs travel once: later calls with equal inputs reuse what the child holds.
        """
        payload = pack_arrays(inputs)
        digest = hashlib.sha256(payload).digest()
        known = digest == self._timed_digest
        reply, _ = self._ask({"op": "time", "repeats": repeats, "warmup": warmup}, b"" if known else payload)
        self._timed_digest = digest
        return [float(seconds) for seconds in reply["seconds"]]

    def memory(self) -> MemoryUse:
        """Return the child's memory in bytes: before opening, after it, and the peaks."""
        return MemoryUse.model_validate(self._ask({"op": "memory"})[0])

    def peak_memory(self) -> int:
        """Return the most bytes of the child that were ever resident."""
        return self.memory().peak

    def pause(self) -> None:
        """Stop the child with all its threads until `resume` or the next question."""
        if not self.paused and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGSTOP)
            self.paused = True

    def resume(self) -> None:
        """Let a stopped child go on."""
        if self.paused:
            os.kill(self._process.pid, signal.SIGCONT)
            self.paused = False

    def close(self) -> None:
        """End the child. Harmless when it has ended."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, header: Header, payload: bytes = b"") -> tuple[Header, bytes]:
        if not self._finalizer.alive:
            raise MeasureError(f"{self.label}: already closed", "open it again with Served(...)")
        self.resume()
        deadline = time.monotonic() + self.timeout
        try:
            self._write(pack_frame(header, payload), deadline)
            reply, data = read_frame(lambda count: self._read(count, deadline))
        except TimeoutError as error:
            self._give_up(f"no answer to `{header['op']}` within {self.timeout:g} s", "give it a longer timeout", error)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._give_up(self._ending(), "the messages of the runtime above may say why; is memory short?", error)
        except BadFrame as error:
            self._give_up(str(error), "something wrote into the child's pipe", error)
        except BaseException:  # Ctrl-C in the middle of an answer: the stream can no longer be trusted
            self.close()
            raise
        if "error" in reply:
            self._raise(reply)
        return reply, data

    def _raise(self, reply: Header) -> None:
        if reply["ours"]:
            raise MeasureError(f"{self.label}: {reply['error']}", reply["hint"])
        raise MeasureError(f"{self.label}: {reply['kind']}: {reply['error']}{self._stderr_tail()}")

    def _give_up(self, why: str, hint: str, error: Exception) -> NoReturn:
        tail = self._stderr_tail()
        self.close()
        raise MeasureError(f"{self.label}: {why}{tail}", hint) from error

    def _ending(self) -> str:
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the child closed its pipe"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"the child was killed by {signal.Signals(-status).name}"
        return f"the child ended with status {status}"

    def _stderr_tail(self) -> str:
        descriptor = self._stderr.fileno()
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, STDERR_TAIL, max(0, size - STDERR_TAIL)).decode(errors="replace").strip()
        return f"\n{tail}" if tail else ""

    def _write(self, data: bytes, deadline: float) -> None:
        pipe, view = _open_pipe(self._process.stdin).fileno(), memoryview(data)
        while view:
            _wait(pipe, selectors.EVENT_WRITE, deadline)
            view = view[os.write(pipe, view) :]

    def _read(self, count: int, deadline: float) -> bytes:
        pipe, data = _open_pipe(self._process.stdout).fileno(), bytearray()
        while len(data) < count:
            _wait(pipe, selectors.EVENT_READ, deadline)
            piece = os.read(pipe, min(count - len(data), 2**20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment of a child: this one's, with equal threads and without a network.

    The allocator is left as the user has set it: the original is measured as its owner runs it, and glibc's default
    costs plain PyTorch page faults that a tuned MALLOC_TRIM_THRESHOLD_ would save. Both sides get the same.

    The child imports what this process can import: `sys.path` is handed on.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - an import path is a string
    fixed = {name: str(threads) for name in THREAD_VARIABLES}
    return {**environment, **fixed, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _wait(pipe: int, event: int, deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError


def _open_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # Popen was asked for both
    return pipe


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    process.kill()  # also ends a stopped child; it has nothing to save
    process.wait()
    for pipe in (process.stdin, process.stdout, stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
