"""Where the command line begins and ends: the commands, and what becomes of errors, interrupts and exit statuses.

Exit status: 0 the goal is met, 1 an error, 2 the goal is not met or not decided, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from gossamer.cli import apply, bench, compare, doctor, evaluate, inspect, optimize, plan, report
from gossamer.cli.terminal import plain
from gossamer.errors import GossamerError
from gossamer.run.team import started_rank

RESUMABLE = ("optimize", "apply")  # these keep what is done in the folder named by --out
ERROR, INTERRUPTED = 1, 130

app = typer.Typer(
    name="gossamer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.command("optimize")(optimize.optimize)
app.command("plan")(plan.plan)
app.command("apply")(apply.apply)
app.command("inspect")(inspect.inspect)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gossamer {version('gossamer')}")
        raise typer.Exit()


@app.callback()
def gossamer(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Say the goal, get a smaller and faster model that is proven to meet it.

    Exit status: 0 goal met, 1 error, 2 goal not met or undecided, 130 interrupted (the same command goes on).
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's own) and return the exit status.

    Nothing is raised: every error becomes a message on stderr, and with --json a document on stdout.
    Example: `main(["doctor", "--json"])`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = bool({"-v", "--verbose"} & set(given))
    if not verbose:
        _quieten_libraries()
    try:
        status = app(args=given, prog_name="gossamer", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:  # typer makes this of KeyboardInterrupt
            print(interrupted(given), file=sys.stderr)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print(interrupted(given), file=sys.stderr)
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # `gossamer inspect ... | head`: the reader has gone, and flushing at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except typer.TyperException as error:
        if message := error.format_message():
            _say_error(given, "UsageError", message, "see gossamer --help" if not given else _usage_hint(given))
        return ERROR
    except GossamerError as error:
        if verbose:
            traceback.print_exc()
        _say_error(given, type(error).__name__, error.message, error.hint)
        return ERROR
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "this is a bug of gossamer's; please report it with what the same command prints with -v"
        _say_error(given, type(error).__name__, f"{type(error).__name__}: {error}", hint)
        return ERROR


def interrupted(given: Sequence[str]) -> str:
    """Say how to go on after an interrupt: the same command, less --fresh, which would start again."""
    if not given or given[0] not in RESUMABLE:
        return "interrupted"
    again = shlex.join(["gossamer", *(word for word in given if word != "--fresh")])
    return f"interrupted; finished steps are kept. To go on where it stopped, run the same command again:\n  {again}"


def _usage_hint(given: Sequence[str]) -> str:
    names = {command.name for command in app.registered_commands}
    return f"see gossamer {given[0]} --help" if given[0] in names else "see gossamer --help"


def _say_error(given: Sequence[str], kind: str, message: str, hint: str) -> None:
    rank = started_rank()
    print(plain(f"error{f' of process {rank}' if rank else ''}: {message}"), file=sys.stderr)
    if hint:
        print(plain(f"hint: {hint}"), file=sys.stderr)
    if "--json" in given and not rank:
        print(json.dumps({"error": {"type": kind, "message": message, "hint": hint}}))


def _quieten_libraries() -> None:
    """Keep other libraries' bars and advice off stderr, which carries our progress; -v lets them speak."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
