"""Tables and plots of a run, made from its record (`pqk_fast.record`) alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable

from pqk_fast.pages import Table
from pqk_fast.record import RESULTS, check_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["layers_table", "plot_curves", "results_table", "to_markdown"]

Record = Mapping[str, Any]

LABELS = {
    "vanilla": "vanilla",
    "phase1_p": "phase1-P",
    "finetune": "finetune",
    "distill": "separate teacher",
    "phase2_p": "phase2-P",
    "phase2_f": "phase2-F",
}
STUDENTS = ("phase1_p", "finetune", "distill", "phase2_p")  # the pruned, quantized ones: the best of them is bold

# Okabe and Ito's colours, told apart with any colour vision
BLACK, BLUE, GREEN, VERMILION, GREY = "#000000", "#0072B2", "#009E73", "#D55E00", "#6E6E6E"


def results_table(record: Record) -> RichTable:
    """Accuracies of the stages that ran, in the rows of the paper's tables: bits, sparsity, and the accuracy in percent
    of the last epoch and of the epoch that was best on the validation set. The best student of a column is bold.

    Raises:
        ValueError: not a record, or one without results, or it lacks `recipe.pqk.bits`.
    """
    check_record(record)
    return _results(record).rich()


def layers_table(record: Record) -> RichTable:
    """Per layer: shape, number of weights, how many are kept, step size, and the part of the kept ones that is clipped.

    Raises:
        ValueError: not a record, or one without layers (no pruned network was trained).
    """
    check_record(record)
    return _layers(record).rich()


def to_markdown(record: Record) -> str:
    """The same tables in Markdown, below a heading and the run's data, hardware and versions; tables that would be
    empty are left out.

    Raises:
        ValueError: not a record.
    """
    check_record(record)
    lines = [f"# {_title(record)}", ""]
    lines += [f"- {name}: {text}" for name, text in _facts(record)]
    for make, there in ((_results, record["results"]), (_layers, record.get("layers"))):
        if there:
            table = make(record)
            lines += ["", f"## {table.title}", "", *table.markdown()]
    return "\n".join(lines) + "\n"


def _results(record: Record) -> Table:
    results = record["results"]
    names = [name for name in RESULTS if name in results]
    if not names:
        raise ValueError('the record has no results: its "results" is empty, no stage of the run was finished')
    table = Table(
        "Accuracy (%), last epoch and best epoch on the validation set",
        ("", "bits", "sparsity", "last val", "last test", "best val", "best test", "at epoch"),
    )
    measured: list[list[float | None]] = []  # by row, in the order of the columns 3 to 6
    for name in names:
        result = results[name]
        accuracies = [result[moment][part] for moment in ("last", "best_dev") for part in ("validation", "testing")]
        epoch = result["best_dev"].get("epoch")
        measured.append(accuracies)
        table.rows.append(
            [
                LABELS[name],
                _bits(record, name),
                _percent(_sparsity(record)) if name in STUDENTS else "-",
                *(_number(value, ".1f") for value in accuracies),
                _number(epoch, "d"),
            ]
        )
    students = [i for i, name in enumerate(names) if name in STUDENTS]
    if len(students) > 1:
        for j in range(4):
            values = {i: round(value, 1) for i in students if (value := measured[i][j]) is not None}
            table.bold |= {(i, j + 3) for i, value in values.items() if value == max(values.values())}
    return table


def _layers(record: Record) -> Table:
    layers = record.get("layers")
    if not layers:
        raise ValueError('the record has no layers: its "layers" is missing or empty, no pruned network was trained')
    table = Table("Layers", ("layer", "shape", "weights", "kept", "kept (%)", "step size", "clipped (%)"))
    for layer in layers:
        clipped = layer.get("clipped_fraction")
        table.rows.append(
            [
                layer["name"],
                "x".join(map(str, layer["shape"])),
                f"{layer['weights']:,}",
                f"{layer['kept']:,}",
                f"{100 * layer['kept'] / layer['weights']:.1f}",
                _step_size(layer.get("step_size")),
                "-" if clipped is None else f"{100 * clipped:.2f}",
            ]
        )
    weights, kept = (sum(layer[key] for layer in layers) for key in ("weights", "kept"))
    table.rows.append(["all", "", f"{weights:,}", f"{kept:,}", f"{100 * kept / weights:.1f}", "", ""])
    return table


def _step_size(value: float | Sequence[float] | None) -> str:
    if isinstance(value, Sequence):  # one a channel
        return _number(value[0], ".4g") if len(value) == 1 else f"{min(value):.4g} to {max(value):.4g}"
    return _number(value, ".4g")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _sparsity(record: Record) -> float | None:
    kept = record.get("kept_fraction")
    return record["recipe"].get("pqk", {}).get("sparsity") if kept is None else 1 - kept


def _bits(record: Record, name: str) -> str:
    if name == "vanilla":
        return "32"
    pqk = record["recipe"].get("pqk", {})
    bits = "mixed" if pqk.get("layer_bits") else pqk.get("bits")
    if bits is None:
        raise ValueError(f"the record has a result {name!r} but no recipe.pqk.bits")
    return f"32 (P={bits})" if name == "phase2_f" else str(bits)


def _title(record: Record) -> str:
    recipe = record["recipe"]
    parts = [str(recipe.get("name", "run"))]
    if recipe.get("model"):
        parts.append(str(recipe["model"]))
    if set(record["results"]) & {*STUDENTS} or set(record["curves"]) - {"vanilla"}:
        pqk = recipe.get("pqk", {})
        if "bits" in pqk:
            parts.append("mixed bits" if pqk.get("layer_bits") else f"{pqk['bits']} bits")
        if (sparsity := _sparsity(record)) is not None:
            parts.append(f"{100 * sparsity:.3g} % sparse")
    return ", ".join(parts)


def _facts(record: Record) -> list[tuple[str, str]]:
    """What a reader needs to judge the numbers, as (name, text)."""
    data, hardware = record["data"], record["hardware"]
    counts = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "testing") if part in data)
    machine = [f"{hardware.get('cpu')} ({hardware.get('threads')} of {hardware.get('cores')} cores)"]
    if hardware.get("gpu"):
        machine.insert(0, str(hardware["gpu"]))
    facts = [
        ("data", f"{data.get('name', 'unnamed')} ({counts})"),
        ("seed", str(record["seed"])),
        ("hardware", ", ".join(machine)),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)),
    ]
    if record.get("seconds"):
        facts.append(("time", ", ".join(f"{stage} {_duration(s)}" for stage, s in record["seconds"].items())))
    if record.get("created"):
        facts.append(("created", record["created"]))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plot_curves(record: Record, path: str | Path) -> None:
    """Draw the accuracy on the validation set as a PNG: left vanilla and phase 1 over their steps, with the sparsity on
    a second axis; right, in the form of the paper's Fig. 2, phase 2's student and full net over its epochs against
    finetuning, phase 1's end and the end of the warm-up. A panel without curves is left out.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: not a record, or no curve of it has a validation accuracy.
    """
    check_record(record)
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: pip install matplotlib ({error})") from error
    curves = record["curves"]
    panels: list[Callable[[Axes, Record], None]] = []
    for draw, stages in ((_draw_scratch, ("vanilla", "phase1")), (_draw_phase2, ("phase2", "finetune"))):
        if any(row["validation"] is not None for stage in stages for row in curves.get(stage, ())):
            panels.append(draw)
    if not panels:
        raise ValueError("the record has no curve with a validation accuracy: there is nothing to plot")
    # the object interface: pyplot would keep figures and a backend for the whole process
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(6.2 * len(panels), 4.6), dpi=150, layout=layout)
    figure.suptitle(_title(record), fontsize=13)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, record)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_scratch(axes: "Axes", record: Record) -> None:
    curves = record["curves"]
    _line(axes, curves.get("vanilla", ()), "step", "validation", color=BLACK, label="vanilla, 32 bits")
    phase1 = curves.get("phase1", ())
    _line(axes, phase1, "step", "validation", color=BLUE, label="phase 1, student P")
    handles: list[Any] = list(axes.get_lines())
    sparse = [(row["step"], 100 * row["sparsity"]) for row in phase1 if row.get("sparsity") is not None]
    if sparse:
        second = axes.twinx()
        steps, percent = zip(*sparse, strict=True)
        handles.append(second.fill_between(steps, percent, color="#E9E9E9", linewidth=0, label="sparsity (right)"))
        second.set_ylim(0, 100)
        second.set_ylabel("sparsity (%)", fontsize=11, color=GREY)
        second.tick_params(labelsize=10, labelcolor=GREY, color=GREY)
        second.spines[["top", "left", "right"]].set_visible(False)
        # the curves in front of the area
        axes.set_zorder(second.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    _finish(axes, "Training from scratch", "step", handles)


def _draw_phase2(axes: "Axes", record: Record) -> None:
    from matplotlib.ticker import MaxNLocator

    curves = record["curves"]
    phase2 = curves.get("phase2", ())
    _line(axes, phase2, "epoch", "validation", color=VERMILION, label="phase 2, student P")
    _line(
        axes,
        phase2,
        "epoch",
        "validation_f",
        color=VERMILION,
        linestyle="--",
        markerfacecolor="white",
        label="phase 2, full net F",
    )
    _line(axes, curves.get("finetune", ()), "epoch", "validation", color=GREEN, label="finetune")
    level = [row["validation"] for row in curves.get("phase1", ()) if row["validation"] is not None][-1:]
    if level:
        axes.axhline(level[0], color=BLUE, linestyle=":", linewidth=2, label="phase 1, end")
    handles: list[Any] = list(axes.get_lines())
    last = max(row["epoch"] for stage in ("phase2", "finetune") for row in curves.get(stage, ()))
    warm_up = _warm_up_epochs(record) if phase2 else None
    if warm_up and warm_up < last:
        axes.axvline(warm_up, color=GREY, linewidth=1.2, zorder=1)
        axes.annotate(
            "distillation starts",
            (warm_up, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=GREY,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _finish(axes, "Phase 2" if phase2 else "Finetuning", "epoch", handles)


def _warm_up_epochs(record: Record) -> float | None:
    """Where distillation starts, in epochs of phase 2."""
    phase2 = record["recipe"].get("phase2", {})
    start, epoch_steps = phase2.get("distill_start"), phase2.get("epoch_steps")
    return start / epoch_steps if start and epoch_steps else None


def _line(axes: "Axes", rows: Sequence[Mapping[str, Any]], x: str, y: str, **style: Any) -> None:
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    if points:
        marker = "o" if len(points) <= 15 else None
        axes.plot(*zip(*points, strict=True), linewidth=1.8, marker=marker, markersize=4, **style)


def _finish(axes: "Axes", title: str, xlabel: str, handles: Sequence[Any]) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel("validation accuracy (%)", fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # below the axes, where no curve can be
    columns = 2 if len(handles) == 4 else 3
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=10, frameon=False
    )
