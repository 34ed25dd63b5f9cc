"""The child's side of `gossamer.runtimes.process`: open one artifact, then answer run / time / memory to its end.

Started as `python -m gossamer.runtimes.child PARENT_PID`. Frames come in on what was standard input and go out on what
was standard output; libraries that print reach standard error instead. Heavy imports wait until an artifact is opened,
so that this process holds what the runtime needs and no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gossamer.errors import GossamerError
from gossamer.measure.memory import peak_bytes, release_unused, reset_peak, resident_bytes
from gossamer.runtimes.frames import Header, pack_arrays, pack_frame, read_frame, unpack_arrays

if TYPE_CHECKING:
    from gossamer.runtimes.base import Runtime, Session
    from gossamer.tasks.base import Arrays

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve until the parent closes the pipe; return the exit status."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    incoming, outgoing = take_channels()
    read_exactly = exact_reader(incoming)
    server = Server()
    while True:
        try:
            header, payload = read_frame(read_exactly)
        except EOFError:
            return 0
        outgoing.write(answer(server, header, payload))
        outgoing.flush()


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process with its parent, even while stopped (off Linux the pipe's end does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask
        raise SystemExit(0)


def take_channels() -> tuple[BinaryIO, BinaryIO]:
    """Keep standard input and output for frames: others that read get nothing, others that print reach stderr."""
    incoming, outgoing = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")


def exact_reader(stream: BinaryIO) -> Callable[[int], bytes]:
    """Return a function that reads exactly n bytes or raises EOFError."""

    def read_exactly(count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    return read_exactly


def answer(server: Server, header: Header, payload: bytes) -> bytes:
    """Return the reply frame; an exception becomes an `error` header, and the child lives on."""
    try:
        operation = server.operations[header["op"]]
        reply, arrays = operation(header, payload)
        return pack_frame(reply, pack_arrays(arrays))
    except GossamerError as error:
        return pack_frame({"error": error.message, "hint": error.hint, "kind": type(error).__name__, "ours": True})
    except Exception as error:  # the boundary of the process: every failure must reach the parent as data
        import traceback

        traceback.print_exc()
        return pack_frame(
            {"error": str(error) or type(error).__name__, "hint": "", "kind": type(error).__name__, "ours": False}
        )


class Server:
    """Hold the opened artifact and answer one operation at a time; each returns a header and arrays."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.kept: dict[str, Session] = {}  # those that stay open behind the one that answers, by folder
        self.timed_inputs: Arrays = {}
        self.figures: dict[str, Any] = {}
        self.queued: list[Arrays] = []
        self.answers: Iterator[Arrays] = iter(())
        self.operations = {
            "open": self.open,
            "run": self.run,
            "queue": self.queue,
            "next": self.next,
            "time": self.time,
            "memory": self.memory,
        }

    def open(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Open the artifact in `folder` with `runtime`, `threads` and the task, noting memory before and after.

        One that was opened with `keep` answers again at once.
        """
        if header["keep"] and header["folder"] in self.kept:
            self.session = self.kept[header["folder"]]
            return {"ok": True}, {}
        runtime = load_runtime(header["runtime"])
        task = None
        if header["task"] is not None and (runtime.opens_with_task or header["budget"] is not None):
            from gossamer.tasks import get_task

            task = get_task(header["task"], **header["task_settings"])
        release_unused()
        resettable = reset_peak()
        baseline = resident_bytes()
        folder, threads = Path(header["folder"]), header["threads"]
        if header["budget"] is None:
            self.session = runtime.open(folder, threads=threads, task=task)
        else:
            assert task is not None
            self.session = runtime.open_streamed(folder, threads=threads, task=task, budget=header["budget"])
        if header["keep"]:
            self.kept[header["folder"]] = self.session
        peak_open = peak_bytes()
        release_unused()
        after_open = resident_bytes()
        reset_peak()
        self.figures = {
            "baseline": baseline,
            "after_open": after_open,
            "peak_open": peak_open,
            "resettable": resettable,
        }
        return {"ok": True}, {}

    def run(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Run once and return the outputs."""
        return {"ok": True}, self._opened().run(unpack_arrays(payload))

    def queue(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Take in one of the batches that `next` will answer; the first one begins anew."""
        if header["first"]:
            self.queued = []
        self.queued.append(unpack_arrays(payload))
        if header["last"]:
            self.answers = self._opened().run_all(self.queued)
        return {"ok": True}, {}

    def next(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Return the outputs of the next queued batch."""
        return {"ok": True}, next(self.answers)

    def time(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Run `warmup` times untimed, then `repeats` times timed, on the inputs sent with this or an earlier `time`."""
        if payload:
            self.timed_inputs = unpack_arrays(payload)
        run, inputs, clock = self._opened().run, self.timed_inputs, time.perf_counter
        for _ in range(header["warmup"]):
            run(inputs)
        seconds = []
        gc.collect()
        gc.disable()  # as timeit does: a collection of what others left is not the model's time
        try:
            for _ in range(header["repeats"]):
                start = clock()
                run(inputs)
                seconds.append(clock() - start)
        finally:
            gc.enable()
        return {"seconds": seconds}, {}

    def memory(self, header: Header, payload: bytes) -> tuple[Header, Arrays]:
        """Return the memory figures so far."""
        self._opened()
        return {**self.figures, "peak_run": peak_bytes()}, {}

    def _opened(self) -> Session:
        if self.session is None:
            raise RuntimeError("no artifact is open")
        return self.session


def load_runtime(name: str) -> Runtime:
    """Return the runtime of a known name, or of `package.module:Class` for one that lives elsewhere."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        runtime: Runtime = getattr(importlib.import_module(module), attribute)()
        return runtime
    from gossamer.runtimes import get_runtime

    return get_runtime(name)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone: nobody to answer
        sys.exit(main())
