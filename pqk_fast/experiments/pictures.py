"""Pictures of records, as PNGs: Fig. 2 in our version, layers over time, a confusion matrix, methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqk_fast.experiments.results import Sample
from pqk_fast.plots import LAYER_COLOURS, make_figure, plain_axes, png
from pqk_fast.report import BLACK, BLUE, GREEN, GREY, VERMILION

Records = Mapping[int, Mapping[str, Any]]  # by seed


def fig2(phase1: Records, phase2: Records, finetune: Records) -> bytes:
    """Validation accuracy over the epochs of phase 2: student, full net and finetuning; mean of the seeds, and the
    range from the lowest to the highest. Phase 1's end is epoch 0; a line marks where distillation starts.

    Raises ValueError without a seed that has all three.
    """
    from matplotlib.ticker import MaxNLocator

    seeds = sorted(set(phase1) & set(phase2) & set(finetune))
    if not seeds:
        raise ValueError("no seed has phase 1, phase 2 and finetuning: train table2 or fig2 first")
    start = [phase1[seed]["curves"]["phase1"][-1]["validation"] for seed in seeds]
    figure = make_figure(7.2, 4.8)
    axes = figure.subplots()
    curves = (
        (phase2, "phase2", "validation", VERMILION, "-", "phase 2, student P"),
        (phase2, "phase2", "validation_f", VERMILION, "--", "phase 2, full net F"),
        (finetune, "finetune", "validation", GREEN, "-", "finetune, rate .1"),
    )
    for records, stage, view, colour, style, label in curves:
        rows = [records[seed]["curves"][stage] for seed in seeds]
        epochs = [row["epoch"] for row in rows[0]]
        values = [[row[view] for row in one] for one in zip(*rows, strict=True)]
        if view == "validation":  # the student's go on from phase 1
            epochs, values = [0, *epochs], [start, *values]
        axes.plot(
            epochs,
            [sum(v) / len(v) for v in values],
            color=colour,
            linestyle=style,
            marker="o",
            markersize=4,
            markerfacecolor="white" if style == "--" else colour,
            linewidth=1.8,
            label=label,
        )
        if len(seeds) > 1:
            axes.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.13, lw=0
            )
    settings = phase2[seeds[0]]["recipe"]["phase2"]
    warm_up = settings["distill_start"] / settings["epoch_steps"]
    axes.axvline(warm_up, color=GREY, linewidth=1.2, zorder=1)
    axes.annotate(
        "distillation starts",
        (warm_up, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=9,
        color=GREY,
    )
    axes.axhline(sum(start) / len(start), color=BLUE, linestyle=":", linewidth=1.8, label="phase 1, end")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    count = f"mean and range of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    plain_axes(axes, f"Phase 2 against finetuning, {count}", "epoch of phase 2", "validation accuracy (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=10, frameon=False)
    return png(figure)


def layers_over_time(record: Mapping[str, Any]) -> bytes:
    """Of phase 1, over its steps: the part of each layer that is kept, and its step size. ValueError without layers."""
    rows, layers = record["curves"].get("phase1", ()), record.get("layers")
    if not rows or not layers:
        raise ValueError("the record has no phase 1 with prepared layers")
    figure = make_figure(7.2, 8)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    for i, layer in enumerate(layers):
        colour = LAYER_COLOURS[i % len(LAYER_COLOURS)]
        style = ("-", "--", ":")[i // len(LAYER_COLOURS) % 3]
        kept = [100 * row["kept"][i] / layer["weights"] for row in rows]
        upper.plot(steps, kept, color=colour, linestyle=style, linewidth=1.6, label=layer["name"])
        lower.plot(steps, [row["step_size"][i] for row in rows], color=colour, linestyle=style, linewidth=1.6)
    upper.plot(steps, [100 * (1 - row["sparsity"]) for row in rows], color=GREY, linewidth=4, alpha=0.35, label="all")
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.set_yticks([2, 5, 10, 20, 50, 100])
    upper.minorticks_off()
    lower.set_yscale("log")
    for axes in (upper, lower):
        axes.xaxis.set_major_formatter("{x:,.0f}")
    plain_axes(upper, "Weights kept", "", "kept (%), logarithmic")
    plain_axes(lower, "Step size S", "step of phase 1", "S, logarithmic")
    columns = min(len(layers) + 1, 5)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    return png(figure)


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> bytes:
    """Counts by label (row) and answer (column); shades are parts of the row."""
    size = 2.2 + 0.5 * len(classes)
    figure = make_figure(size, size * 0.92)
    axes = figure.subplots()
    parts = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            if count:
                colour = "white" if parts[i][j] > 0.55 else BLACK
                axes.text(j, i, str(count), ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=10)
    axes.set_yticks(range(len(classes)), classes, fontsize=10)
    axes.set_xlabel("answer", fontsize=11)
    axes.set_ylabel("label", fontsize=11)
    axes.set_title(title, fontsize=12)
    return png(figure)


def side_by_side(
    methods: Sequence[tuple[str, Sample]],
    highlight: str,
    title: str = "Testing accuracy after the same number of steps",
) -> bytes:
    """Accuracy of each method, best last: every seed a dot, the mean a mark. ValueError without any."""
    ranked = sorted(((name, s) for name, s in methods if len(s)), key=lambda pair: pair[1].mean)
    if not ranked:
        raise ValueError("no method has been trained yet")
    figure = make_figure(8.6, 1.4 + 0.42 * len(ranked))
    axes = figure.subplots()
    for y, (name, sample) in enumerate(ranked):
        colour = VERMILION if name == highlight else BLUE
        values = list(sample.values.values())
        axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=5, alpha=0.25, solid_capstyle="round")
        axes.plot(values, [y] * len(values), "o", color=colour, markersize=5)
        axes.plot([sample.mean], [y], "|", color=BLACK, markersize=17, markeredgewidth=1.6)
        axes.text(sample.mean, y + 0.44, f"{sample.mean:.1f}", fontsize=8, color=GREY, ha="center", va="center")
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked], fontsize=10)
    axes.set_ylim(-0.6, len(ranked) - 0.2)
    plain_axes(axes, title, "accuracy (%): seeds, and their mean", "")
    return png(figure)
