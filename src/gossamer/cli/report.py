"""`gossamer report`: a run as one page to read, print and send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write RUN/report.html: one file, readable offline, with everything that was found."""
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer.report.html import write_report  # not the api's, which imports torch: reading a run needs none of it

    page = write_report(run)
    if not screen.answer_plain({"report": str(page), "bytes": page.stat().st_size}):
        screen.line(str(page))
