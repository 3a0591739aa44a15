"""Accuracy against bytes: students of many bits and sparsities, all from one trained dense network of each model.

``pqk-fast pareto``. The choice is made on validation; testing is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pqk_fast.experiments.results import Sample
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import Task, tasks_of
from pqk_fast.pages import Page, Table
from pqk_fast.plots import LAYER_COLOURS, make_figure, plain_axes, png
from pqk_fast.recipe_files import load_recipe
from pqk_fast.settings import check_bits, require

BASE = "kws-res8-narrow-plus-w4-p90"
MARKERS = "os^Dv*P"
# By bits, without the yellow.
COLOURS = dict(zip((8, 2, 3, 4, 5, 6, 7), (*LAYER_COLOURS[:4], *LAYER_COLOURS[5:8]), strict=True))


@dataclass(frozen=True)
class Point:
    """A kind of student: ``bytes`` is its packed file's, of its largest seed; ``validation`` its accuracy (percent) by
    seed after the last step. A ``mixed`` one has bits of their own for its layers, the first seed's ``layer_bits``, in
    as many bytes of weights."""

    model: str
    bits: int
    sparsity: float
    bytes: int
    validation: dict[int, float]
    layer_bits: dict[str, int] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        return bool(self.layer_bits)

    @property
    def sample(self) -> Sample:
        return Sample(self.validation)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.bits_text} bits, {100 * self.sparsity:g} % sparse"

    @property
    def bits_text(self) -> str:
        return f"mixed, as {self.bits}" if self.mixed else str(self.bits)


# What a point's settings are, beside the options that say so.
OWN_OPTIONS = {
    "model": "--models",
    "pqk.bits": "--bits",
    "pqk.sparsity": "--sparsities",
    "phase1.steps": "--steps",
    "vanilla": "--dense-steps, and phase1 for the rest",
    "seed": "--seeds",
    "stages": "`pqk-fast train` for other stages",
    "phase1_start": "`pqk-fast train` for a start from scratch",
}


def settings_of(model: str, bits: int, sparsity: float, steps: int, seed: int) -> list[str]:
    """What makes the base recipe a point's: phase 1 alone, short, from the dense network; the last part of it without
    new masks."""
    return [
        f"model={model}",
        f"pqk.bits={bits}",
        f"pqk.sparsity={sparsity}",
        "pqk.mask_end=0.6",
        f"phase1.steps={steps}",
        "phase1_start=vanilla",
        "stages=['vanilla', 'phase1']",
        f"seed={seed}",
    ]


def plan(
    models: Sequence[str],
    bits: Sequence[int],
    sparsities: Sequence[float],
    steps: int,
    dense_steps: int,
    seeds: int,
    settings: Sequence[str] = (),
) -> list[Task]:
    """A task for every point and seed; the dense networks, trained for ``dense_steps``, are their parents.

    ``settings`` (``KEY=VALUE``) come last. Raises ConfigError for bits outside 2..8, and for settings that are a
    point's own.
    """
    for number in bits:
        check_bits(number)
    for setting in settings:
        key = setting.partition("=")[0].strip()
        for name, option in OWN_OPTIONS.items():
            ours = key == name or key.startswith(name + ".")
            require(not ours, f"--set {setting}: {name} is each point's own, use {option}")
    tasks = []
    for model in dict.fromkeys(models):
        for seed in range(seeds):
            for number in dict.fromkeys(bits):
                for part in dict.fromkeys(sparsities):
                    own = settings_of(model, number, part, steps, seed)
                    recipe = load_recipe(BASE, [*own, *settings])
                    dense = replace(recipe.phase1, steps=dense_steps)
                    tasks.append(tasks_of(replace(recipe, vanilla=dense))["phase1"])
    return tasks


def with_layer_bits(task: Task, layer_bits: Mapping[str, int]) -> Task:
    """A point's task, with bits of their own for layers: otherwise the same."""
    recipe = replace(task.recipe, pqk=replace(task.recipe.pqk, layer_bits=dict(layer_bits)))
    return tasks_of(recipe)["phase1"]


def with_most_bits(tasks: Sequence[Task]) -> Iterator[tuple[Task, Task]]:
    """Each task and the one of its model, sparsity and seed with the most bits, but those that have them themselves."""
    most: dict[tuple[str, float, int], Task] = {}
    for task in sorted(tasks, key=lambda task: task.recipe.pqk.bits):
        most[_kind(task)] = task
    for task in tasks:
        if task.recipe.pqk.bits < most[_kind(task)].recipe.pqk.bits:
            yield task, most[_kind(task)]


def _kind(task: Task) -> tuple[str, float, int]:
    return task.recipe.model, task.recipe.pqk.sparsity, task.recipe.seed


def points_of(runs: Runs, tasks: Iterable[Task], size_of: Callable[[Task], int]) -> Iterator[Point]:
    """The points of which at least one task is trained."""
    found: dict[tuple[str, int, float, bool], list[tuple[Task, float]]] = {}
    for task in sorted(tasks, key=lambda task: task.recipe.seed):
        record = runs.record(task)
        if record is not None:
            pqk = task.recipe.pqk
            kind = (task.recipe.model, pqk.bits, pqk.sparsity, bool(pqk.layer_bits))
            found.setdefault(kind, []).append((task, record["results"]["phase1_p"]["last"]["validation"]))
    for (model, bits, sparsity, _), by_seed in found.items():
        first, _ = by_seed[0]
        validation = {task.recipe.seed: value for task, value in by_seed}
        size = max(size_of(task) for task, _ in by_seed)
        yield Point(model, bits, sparsity, size, validation, dict(first.recipe.pqk.layer_bits))


def dense_of(runs: Runs, tasks: Iterable[Task]) -> dict[str, Sample]:
    """The dense networks' accuracy by model."""
    found: dict[str, dict[int, float]] = {}
    for task in tasks:
        for parent in task.parents:
            record = runs.record(parent)
            if record is not None:
                value = record["results"]["vanilla"]["last"]["validation"]
                found.setdefault(task.recipe.model, {})[task.recipe.seed] = value
    return {model: Sample(values) for model, values in found.items()}


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats: none of as few bytes is as accurate. By bytes."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, -point.sample.mean)):
        if not best or point.sample.mean > best[-1].sample.mean:
            best.append(point)
    return best


def best_within(points: Iterable[Point], budget: int) -> Point:
    """The most accurate whose file has at most ``budget`` bytes. ValueError if none has."""
    ways = front(points)
    within = [point for point in ways if point.bytes <= budget]
    if not within:
        least = f"the smallest has {ways[0].bytes:,}" if ways else "none is trained yet"
        raise ValueError(f"no student's file has at most {budget:,} bytes: {least}; try fewer bits or more sparsity")
    return within[-1]


def as_json(points: Sequence[Point], dense: dict[str, Sample], about: dict[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "dense": {model: sample.values for model, sample in dense.items()},
        "points": [asdict(point) for point in points],
    }


def from_json(record: dict[str, Any]) -> tuple[list[Point], dict[str, Sample]]:
    points = [Point(**{**one, "validation": _by_seed(one["validation"])}) for one in record["points"]]
    return points, {model: Sample(_by_seed(values)) for model, values in record["dense"].items()}


def _by_seed(values: dict[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def make_page(record: dict[str, Any]) -> Page:
    """Of the record that :func:`as_json` makes."""
    points, dense = from_json(record)
    page = Page("What fits into how many bytes")
    page.text(
        "Accuracy on validation (%) of students of many bits and sparsities, against the bytes of their packed files "
        "(all of it: BatchNorm, biases and names too; of several seeds the largest). Each is trained for "
        f"{record['steps']:,} steps from one dense network of its model and seed. Means over seeds ± their standard "
        "deviation; testing was not looked at."
    )
    page.code(record["command"])
    try:
        page.picture("pareto", picture(points, dense), "The line joins those that no smaller or equal file beats.")
    except ImportError as error:
        page.text(f"No picture: {error}.")
    page.heading("Worth training")
    page.text("Students that none with as few bytes beats: take the last row whose bytes you have.")
    page.table(table_of("By bytes", front(points)))
    page.heading("All of them")
    page.table(table_of("By model, bits and sparsity", points))
    page.items([f"{model}, dense, 32 bits: {sample.text()} (seeds: {len(sample)})." for model, sample in dense.items()])
    if any(point.mixed for point in points):
        page.heading("Bits chosen for each layer")
        page.text(
            "Against uniform bits, in at most as many bytes of weights: the bits that lose least when one layer after "
            "the other of the student of most bits is quantized further (on validation as well), trained as all others "
            "are."
        )
        page.table(_mixed_table(points))
        page.text("The bits that were chosen, of the first seed:")
        page.items([_layer_bits(point) for point in points if point.mixed])
    return page


def table_of(title: str, points: Iterable[Point]) -> Table:
    table = Table(title, ("model", "bits", "sparsity", "bytes", "validation", "seeds"))
    for point in points:
        cells = [point.model, point.bits_text, f"{100 * point.sparsity:g} %", f"{point.bytes:,}"]
        table.rows.append([*cells, point.sample.text(), str(len(point.sample))])
    return table


def _mixed_table(points: Sequence[Point]) -> Table:
    columns = ("model", "sparsity", "bits", "validation", "bytes", "chosen bits", "bytes", "difference", "seeds")
    table = Table("Mixed against uniform bits", columns)
    uniform = {(one.model, one.sparsity, one.bits): one for one in points if not one.mixed}
    for point in points:
        other = uniform.get((point.model, point.sparsity, point.bits))
        if point.mixed and other is not None:
            difference = point.sample.minus(other.sample)
            cells = [point.model, f"{100 * point.sparsity:g} %", str(point.bits), other.sample.text()]
            cells += [f"{other.bytes:,}", point.sample.text(), f"{point.bytes:,}", difference.text(sign=True)]
            table.rows.append([*cells, str(len(difference))])
    return table


def _layer_bits(point: Point) -> str:
    """Layers by their bits, most bits first."""
    layers: dict[int, list[str]] = {}
    for name, bits in point.layer_bits.items():
        layers.setdefault(bits, []).append(name)
    parts = [f"{bits} bits for {', '.join(layers[bits])}" for bits in sorted(layers, reverse=True)]
    return f"{point.name}: {'; '.join(parts)}."


def picture(points: Sequence[Point], dense: dict[str, Sample]) -> bytes:
    """A colour for the bits, hollow where they are mixed, a marker for the model, the sparsity beside each point."""
    figure = make_figure(8.4, 5.6)
    axes = figure.subplots()
    models = list(dict.fromkeys(point.model for point in points))
    kinds: dict[tuple[int, int, bool], list[Point]] = {}
    for point in points:
        kinds.setdefault((models.index(point.model), point.bits, point.mixed), []).append(point)
    for (i, bits, mixed), own in sorted(kinds.items()):
        axes.plot(
            [point.bytes for point in own],
            [point.sample.mean for point in own],
            MARKERS[i % len(MARKERS)],
            color=COLOURS[bits],
            fillstyle="none" if mixed else "full",
            markersize=7,
            label=f"{models[i]}, {own[0].bits_text} bits",
        )
    for point in points:
        place = (point.bytes, point.sample.mean)
        axes.annotate(f"{100 * point.sparsity:g}", place, (5, -8), textcoords="offset points", fontsize=8)
    ways = front(points)
    axes.plot([p.bytes for p in ways], [p.sample.mean for p in ways], color="#6E6E6E", linewidth=1.2, zorder=0)
    for i, (model, sample) in enumerate(dense.items()):
        axes.axhline(sample.mean, color="#6E6E6E", linewidth=1, linestyle=(":", "--")[i % 2], label=f"{model}, dense")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.tick_params(axis="x", which="both", labelsize=9, rotation=30)
    plain_axes(axes, "", "bytes of the packed file, logarithmic; beside each point its sparsity in %", "validation (%)")
    axes.legend(fontsize=9, ncols=2, frameon=False, loc="lower right")
    return png(figure)
