"""RESULTS.md: one section a benchmark run, replaced when the same benchmark runs again on the same model."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gossamer.measure.machine import installed_version, stamp
from gossamer.run.atomic import write_text

FILE = Path(__file__).parent / "RESULTS.md"
VERSIONS = ("nncf", "numpy")  # beside those in the machine's stamp


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(key: str, title: str, body: str, *, threads: int, seconds: float, file: Path = FILE) -> None:
    """Put a section with its provenance in the place of the one with the same `key`, or at the end."""
    begin, end = f"<!-- begin {key} -->", f"<!-- end {key} -->"
    section = "\n\n".join((begin, f"## {title}", body, provenance(threads, seconds), end))
    before = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    if begin in before:
        head, rest = before.split(begin, 1)
        _, tail = rest.split(end, 1)
        write_text(file, head + section + tail)
    else:
        write_text(file, before.rstrip("\n") + "\n\n" + section + "\n")


def provenance(threads: int, seconds: float) -> str:
    """Return what the figures depend on: the command, the day, the machine, versions, how busy the machine was."""
    machine = stamp()
    versions: Mapping[str, str] = machine.packages | {
        name: found for name in VERSIONS if (found := installed_version(name)) is not None
    }
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return "\n".join(
        (
            f"`{command()}`  ",
            f"{datetime.date.today().isoformat()}, {seconds / 60:.0f} minutes{load}; {machine}; {threads} threads; "
            f"machine stamp {machine.id}.  ",
            f"Python {machine.python}, " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        )
    )


def command() -> str:
    """Return the command line as a reader can give it again."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])
