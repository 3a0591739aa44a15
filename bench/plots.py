"""Pictures of records, as PNGs: time against size, and candidates side by side; scales are logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from figures import Figure, number

from pqk_fast.plots import LAYER_COLOURS, make_figure, plain_axes, png
from pqk_fast.report import BLACK, GREY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE, YELLOW = "#E69F00", "#F0E442"  # too near to ours; too pale for a line
MARKS = "sD^vP*Xhp<>"
Series = Mapping[str, Sequence[tuple[float, Figure]]]  # candidate: (size, figure), in order


def styles(names: Sequence[str], ours: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each: ours vermilion circles, the others one each, in the order given."""
    rest = [colour for colour in LAYER_COLOURS if colour not in (VERMILION, ORANGE, YELLOW)]
    others = [name for name in names if name not in ours]
    found = {name: (rest[i % len(rest)], MARKS[i % len(MARKS)]) for i, name in enumerate(others)}
    return found | {name: (VERMILION, "o" if i == 0 else "d") for i, name in enumerate(ours)}


def against_size(series: Series, ours: Sequence[str], title: str, xlabel: str, ylabel: str) -> bytes:
    """A line a candidate with the quartiles as bars. ValueError without a candidate that has two sizes."""
    shown = {name: points for name, points in series.items() if len(points) > 1}
    if not shown:
        raise ValueError("no candidate has figures at two sizes")
    figure = make_figure(7.2, 4.8)
    axes = figure.subplots()
    look = styles(list(shown), [name for name in shown if name in ours])
    for name in sorted(shown, key=lambda name: name in ours):  # ours on top
        colour, mark = look[name]
        sizes, values = zip(*shown[name], strict=True)
        medians = [value.median for value in values]
        below = [max(0.0, value.median - value.low) for value in values]
        above = [max(0.0, value.high - value.median) for value in values]
        axes.errorbar(
            sizes, medians, [below, above], color=colour, marker=mark, markersize=5, linewidth=1.8, capsize=2.5,
            linestyle="-" if name in ours else "--", label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    if all(size < 1000 for points in shown.values() for size, _ in points):  # batches: just those
        axes.set_xticks(sorted({size for points in shown.values() for size, _ in points}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    plain_axes(axes, title, xlabel, ylabel)
    axes.grid(which="minor", axis="y", color="#EEEEEE", linewidth=0.5)
    handles, labels = axes.get_legend_handles_labels()
    first = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] not in ours)
    figure.legend(*zip(*first, strict=True), loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return png(figure)


def side_by_side(rows: Mapping[str, Figure], ours: Sequence[str], title: str, xlabel: str) -> bytes:
    """Each candidate's median and quartiles on a line of its own, in the order given, the first on top."""
    if not rows:
        raise ValueError("no candidate has a figure")
    figure = make_figure(7.2, 1.5 + 0.34 * len(rows))
    axes = figure.subplots()
    names = list(rows)[::-1]
    for y, name in enumerate(names):
        value, colour = rows[name], VERMILION if name in ours else "#0072B2"
        axes.plot([value.low, value.high], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot([value.median], [y], "o" if name in ours else "s", color=colour, markersize=6)
        axes.annotate(
            number(value.median), (value.median, y), xytext=(0, 6), textcoords="offset points", ha="center",
            fontsize=8, color=GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set_ylim(-0.6, len(names) - 0.2)
    least, most = min(value.low for value in rows.values()), max(value.high for value in rows.values())
    plain_axes(axes, title, xlabel, "")
    if least > 0 and most > 4 * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.6, most * 1.6)
        plain_ticks(axes, 10 * least > most)
    else:
        axes.set_xlim(left=0)
    for label in axes.get_yticklabels():
        label.set_color(VERMILION if label.get_text() in ours else BLACK)
    return png(figure)


def plain_ticks(axes: Axes, narrow: bool) -> None:
    """Plain numbers; also 2 and 5 of each decade where the range is ``narrow``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
