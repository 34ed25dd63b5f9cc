"""`gossamer doctor`: what this machine can do, and the command that adds what is missing."""

from __future__ import annotations

from gossamer.cli import options
from gossamer.cli.console import Screen


def doctor(json: options.Json = False, quiet: options.Quiet = False, verbose: options.Verbose = False) -> None:
    """Say what this machine can do: cores, instruction sets, memory, runtimes and extras."""
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer.measure.machine import doctor as examine_machine  # not the api's: it must answer without torch too
    from gossamer.report.words import NONE

    found = examine_machine()
    if screen.answer(found):
        return
    screen.line(str(found.stamp), style="bold")
    screen.heading("this machine")
    screen.table(
        ("", "ok", "what follows"),
        [(one.name, "yes" if one.ok else "no", one.says) for one in found.findings],
        fold=("what follows",),
    )
    screen.heading("packages")
    rows = [(extra.package, extra.version or NONE, extra.extra, extra.purpose) for extra in found.extras]
    screen.table(("package", "version", "comes with", "for"), rows, fold=("for",))
    if found.missing:
        screen.heading("to add what is missing")
        for command in dict.fromkeys(extra.command for extra in found.missing):
            screen.line(f"  {command}")
