"""``pqk-fast sensitivity``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.progress import track
from torch import nn

from pqk_fast.branches import pqk_layers
from pqk_fast.commands.deploy import STAGES, load_student
from pqk_fast.commands.options import Commands, command, console, count
from pqk_fast.data.load import Splits, load_splits
from pqk_fast.deploy.sensitivity import Row, choose_bits, least_bytes, sensitivity
from pqk_fast.files import replacing
from pqk_fast.pages import Page, Table
from pqk_fast.plots import LAYER_COLOURS, make_figure, plain_axes, png

BITS = (2, 3, 4, 5, 6, 7)
SPARSITIES = (0.9, 0.95, 0.98)


def add(commands: Commands) -> None:
    text = "what each layer of a run's student loses when it alone is pruned or quantized further"
    sub = command(commands, run_sensitivity, "sensitivity", text)
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set; its validation split is used")
    sub.add_argument("--stage", choices=STAGES, help="whose student (default: the last of those that ran)")
    sub.add_argument("--bits", type=int, nargs="+", default=BITS, help="fewer bits to try (default: %(default)s)")
    sub.add_argument("--sparsities", type=float, nargs="*", default=SPARSITIES, help="(default: %(default)s)")
    sub.add_argument("--bytes", type=count, metavar="N", help="also choose bits that fit into N bytes of weights")
    sub.add_argument("--page", type=Path, metavar="DIR", help="also write sensitivity.md, .html and .json into DIR")


def run_sensitivity(args: argparse.Namespace) -> None:
    model, recipe, stage = load_student(args.run, args.stage)
    rows = measured(model, load_splits(recipe, args.data), args.bits, args.sparsities)
    table = table_of(rows)
    console.print(table.rich())
    page = Page(f"Sensitivity of {recipe.name}, the student of {stage}")
    page.text(
        "Cross-entropy on validation when one layer alone is changed, without training, and what it is above the "
        f"student's own {rows[0].loss:.3f} ({rows[0].accuracy:.1f} %); bytes are that layer's weights in a packed file."
    )
    page.table(table)
    chosen: list[str] = []
    if args.bytes and args.bytes >= least_bytes(rows):
        chosen = [f"{name} = {bits}" for name, bits in choose_bits(rows, args.bytes).items()]
        page.text(f"Bits for {args.bytes:,} bytes of weights: {', '.join(chosen)}.")
    if args.page:
        try:
            page.picture("sensitivity", picture_of(rows), "Loss above the student's own, by bytes saved or added.")
        except ImportError as error:
            page.text(f"No picture: {error}.")
        paths = [*page.write(args.page, "sensitivity"), args.page / "sensitivity.json"]
        with replacing(paths[-1], "w") as file:
            json.dump({"recipe": recipe.name, "stage": stage, "rows": [asdict(row) for row in rows]}, file, indent=1)
        console.print(escape(f"written: {', '.join(map(str, paths))}"))
    if chosen:
        console.print(escape("\n".join([f"for {args.bytes:,} bytes, in a recipe:\n", "[pqk.layer_bits]", *chosen])))
    elif args.bytes:
        choose_bits(rows, args.bytes)  # says that nothing fits


def measured(model: nn.Module, splits: Splits, bits: Sequence[int], sparsities: Sequence[float] = ()) -> list[Row]:
    """On validation, with a bar. ValueError if there is none."""
    if splits.validation is None:
        raise ValueError("the recipe has no validation split: set data.validation when you train")
    most = 1 + len(pqk_layers(model)) * (1 + len(bits) + len(sparsities))
    rows = sensitivity(model, list(splits.validation), bits, sparsities)
    return list(track(rows, "measuring sensitivity", most, console=console, transient=True))


def table_of(rows: Sequence[Row]) -> Table:
    """A row a layer: bytes and loss above the student's own for every change; "-" where it was not tried."""
    changes = sorted({(row.change, row.value) for row in rows[1:]})
    titles = [f"{value} bits" if change == "bits" else f"{100 * value:g} % sparse" for change, value in changes]
    table = Table("Loss above the student's own (bytes)", ("layer", *titles))
    found = {(row.layer, row.change, row.value): row for row in rows[1:]}
    for layer in dict.fromkeys(row.layer for row in rows[1:]):
        cells = (found.get((layer, *change)) for change in changes)
        table.rows.append(
            [layer, *("-" if c is None else f"{c.loss - rows[0].loss:+.3f} ({c.bytes:,})" for c in cells)]
        )
    return table


def picture_of(rows: Sequence[Row]) -> bytes:
    figure = make_figure(8, 5)
    axes = figure.subplots()
    plain_axes(axes, "", "bytes of the layer's weights, at the bits beside each point", "loss above the student's own")
    for i, layer in enumerate(dict.fromkeys(row.layer for row in rows[1:])):
        own = sorted((row for row in rows if row.layer == layer and row.change == "bits"), key=lambda row: row.bytes)
        colour, style = LAYER_COLOURS[i % len(LAYER_COLOURS)], ("-", "--", ":")[i // len(LAYER_COLOURS) % 3]
        losses = [row.loss - rows[0].loss for row in own]
        axes.plot([row.bytes for row in own], losses, f"o{style}", color=colour, markersize=4, label=layer)
        for row, loss in zip(own, losses, strict=True):
            axes.annotate(f"{row.value:g}", (row.bytes, loss), (2, 3), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="#6E6E6E", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    return png(figure)
