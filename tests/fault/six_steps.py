"""A small run of six steps and a published folder, for tests that kill it: `six_steps.py FOLDER PAUSE`.

`six_steps.py FOLDER sweep` runs two of the steps over and over in FOLDER/1, FOLDER/2, ...: run n is killed just before
its n-th file operation and then run again to its end; it stops at the n that is never reached.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from gossamer.run.atomic import publish_folder, write_text
from gossamer.run.workspace import Run

FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def die_at(operation: int) -> None:
    """End the process just before the n-th operation on files."""
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in FILE_OPERATIONS:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main(folder: Path, pause: float, num_steps: int = 6) -> None:
    """Run the steps, each made from the one before, and publish the last."""
    with Run(folder / "run", {"job": "six steps"}, code="1") as run:
        previous, last = "", folder
        for number in range(num_steps):

            def build(scratch: Path, number: int = number, previous: str = previous) -> str:
                content = random.Random(f"{number} {previous}").randbytes(20_000)
                (scratch / "half").write_bytes(content[:10_000])
                time.sleep(pause)
                (scratch / "nested").mkdir()
                (scratch / "nested" / "rest").write_bytes(content[10_000:])
                write_text(scratch / "gossamer.json", "{}")
                return content[:8].hex()

            step = run.step("small", {"number": number, "previous": previous}, build, verify=True)
            previous, last = step.value, step.folder
        publish_folder(last, folder / "out")


def sweep(base: Path) -> None:
    """Kill a run before each of its file operations in turn, and let each finish."""
    operation, killed = 0, True
    while killed:
        operation += 1
        folder = base / str(operation)
        folder.mkdir()
        killed = in_a_child(folder, operation) == -signal.SIGKILL
        if in_a_child(folder) != 0:
            sys.exit(f"the run killed before file operation {operation} does not finish")


def in_a_child(folder: Path, operation: int | None = None) -> int:
    """Run two steps in a process of their own; forking saves starting Python anew for each."""
    child = os.fork()
    if child == 0:
        if operation is not None:
            die_at(operation)
        status = 1
        try:
            main(folder, 0, num_steps=2)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    if sys.argv[2] == "sweep":
        sweep(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), float(sys.argv[2]))
