"""`gossamer inspect`: what a model is made of, and what can be done to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.cli import options
from gossamer.cli.console import Screen

if TYPE_CHECKING:
    from gossamer.models.inspect import ModelCard


def inspect(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's modules by role, its parameters, bytes, MACs and blocks, and what can be done to it."""
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api
    from gossamer.report.words import NONE, show_count, show_share

    card = api.inspect(model, trust_remote_code=trust_remote_code)
    if screen.answer(card):
        return
    show_totals(screen, card)
    screen.heading("layers by role")
    columns = ("role", "layers", "parameters", "share", "MACs", "shapes", "for example")
    rows = [
        (
            row.role,
            str(row.num_layers),
            show_count(row.num_parameters),
            show_share(row.share),
            show_count(row.macs) if row.macs else NONE,
            ", ".join(f"{count} of {shape}" for shape, count in row.shapes.items()),
            row.example,
        )
        for row in card.roles
    ]
    screen.table(columns, rows, right=columns[1:5], fold=columns[5:])
    for stack in card.stacks:
        each = show_count(stack.num_parameters_per_block)
        screen.line(f"{stack.name}: {stack.num_blocks} blocks of {stack.kind}, {each} parameters each")
    screen.heading("what can be done to it")
    options_columns = ("technique", "layers", "parameters", "share")
    rows_of_options = [
        (option.family, str(option.num_layers), show_count(option.num_parameters), show_share(option.share))
        for option in card.options
    ]
    screen.table(options_columns, rows_of_options, right=options_columns[1:])
    if card.cuts:
        cut_columns = ("cut (prune)", "places", "units each", "said by config.json", "for example")
        rows_of_cuts = [
            (row.what, str(row.places), str(row.units), ", ".join(row.said_by) or "no: graph only", row.example)
            for row in card.cuts
        ]
        screen.table(cut_columns, rows_of_cuts, right=cut_columns[1:3], fold=cut_columns[3:])
    for names, why in card.left_out.items():
        screen.line(f"left as it is: {names} - {why}")
    for note in card.notes:
        screen.line(f"note: {note}")


def show_totals(screen: Screen, card: ModelCard) -> None:
    """Print what the model is and how large."""
    from gossamer.report.words import NONE, show, show_count

    labels = ", ".join(card.labels or ())
    rows = [
        ("model", f"{card.name}  ({card.architecture})"),
        ("for", card.task or "not known: name it with --task"),
        ("labels", labels if len(labels) < 200 else f"{len(card.labels or ())}"),
        ("parameters", show_count(card.num_parameters)),
        ("to ship", NONE if card.shipped_bytes is None else show(card.shipped_bytes, "B")),
        ("weights", ", ".join(f"{show(size, 'B')} of {dtype}" for dtype, size in card.dtypes.items())),
        ("quantized", card.quantization or "no"),
        ("work", f"{show_count(card.macs)} multiply-adds a request" if card.macs else NONE),
        ("tied", ", ".join(f"{name} = {owner}" for name, owner in card.tied.items())),
        ("fingerprint", card.fingerprint),
    ]
    screen.pairs([(name, value) for name, value in rows if value])
