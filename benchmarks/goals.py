"""One goal, one command: `gossamer optimize` carried out as a user would, and what it came to as a table.

    python benchmarks/goals.py MODEL --task T --data F [--eval F] --goal "size <= 8%" --runtime R --out D

Everything is handed to `gossamer optimize`; the table holds its candidates, the goal's figures predicted and measured,
and the verdicts. A run that is finished in --out is read again, not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from results import table, write_section

from gossamer.cli import main as gossamer
from gossamer.goal import parse_goal
from gossamer.measure.machine import usable_cores
from gossamer.plan.records import RunResult, Tried
from gossamer.report.html import RESULT
from gossamer.report.words import latency_share, quality_share, show_duration, show_figure, show_share, size_share

COLUMNS = ("", "size", "latency", "quality", "these as predicted", "verdict", "took")


def row_of(tried: Tried, result: RunResult) -> list[str]:
    """Return a candidate's row: shares of the original."""
    predicted = tried.predicted
    told = (predicted.size_bytes / result.original.size_bytes, predicted.latency_share, predicted.quality_share)
    found = [tried.rejected or "not measured", "", ""]
    if tried.measured is not None:
        paired = (show_figure(of(tried), unit="share") for of in (latency_share, quality_share))
        found = [show_share(size_share(tried, result.original)), *paired]
    return [tried.name, *found, ", ".join(map(show_share, told)), tried.verdict or "", show_duration(tried.seconds)]


def text_of(result: RunResult) -> str:
    """Return the verdict with its reason, and the table of candidates."""
    head = f"**{result.verdict}** in {show_duration(result.seconds)}, {result.provenance.runtime}: {result.reason}."
    rows = [row_of(tried, result) for tried in result.tried]
    return f"{head}\n\n{table(COLUMNS, rows)}"


def main() -> int:
    """Run the command, and write down what its report says."""
    arguments = sys.argv[1:]
    if "--out" not in arguments or "--goal" not in arguments:
        print(__doc__)
        return 2
    out = Path(arguments[arguments.index("--out") + 1])
    if not (out / RESULT).exists():
        code = gossamer(["optimize", *arguments])
        if not (out / RESULT).exists():
            return code
    result = RunResult.model_validate_json((out / RESULT).read_text(encoding="utf-8"))
    asked = parse_goal(arguments[arguments.index("--goal") + 1])
    if parse_goal(result.goal) != asked:
        print(f"goals.py: {out} holds a run for `{result.goal}`: give another --out", file=sys.stderr)
        return 1
    text = text_of(result)
    print(text)
    model = Path(result.provenance.model).name
    title = f"One goal for {model}: {result.goal}"
    write_section(f"goal {model}", title, text, threads=usable_cores(), seconds=result.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
