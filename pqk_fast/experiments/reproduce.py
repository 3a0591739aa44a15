"""``pqk-fast reproduce``: trains what is missing, then makes the page of tables and pictures from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pqk_fast.config import Recipe
from pqk_fast.experiments import paper, pictures, tables
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.targets import TARGETS, cells_of, check_cells, tasks_for
from pqk_fast.experiments.tasks import Task
from pqk_fast.pages import Page

BASE = paper.TABLE2_RECIPE


def plan(targets: Sequence[str], results: Results, cells: Sequence[str] = ()) -> list[Task]:
    """The tasks of the targets, each once; ``cells`` leaves out all other recipes. ConfigError for an unknown one."""
    check_cells(targets, cells)
    tasks: dict[str, Task] = {}
    for target in targets:
        chosen = [name for name in cells_of(target) if not cells or name in cells]
        tasks.update({task.key: task for task in tasks_for(target, results, chosen)})
    return list(tasks.values())


def train_missing(
    tasks: Sequence[Task],
    out: Path,
    folders: Mapping[str, Path | None],
    jobs: int,
    console: Console,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Train the tasks whose data set has a folder (by ``data.name``; spoken words need none), say which have none.

    Raises as :meth:`~pqk_fast.experiments.runner.Runs.train_all` does.
    """
    for name in dict.fromkeys(task.recipe.data.name for task in tasks):
        same = [task for task in tasks if task.recipe.data.name == name]
        runs = Runs(out, folders.get(name), device, **options)
        if runs.data is not None or name == "spoken_words":
            runs.train_all(same, jobs, console)
        elif missing := len(runs.missing(same)):
            console.print(f"{missing} tasks on {name} are not trained yet: give the folder of the data set")


def make_page(targets: Sequence[str], results: Results) -> Page:
    """Tables, pictures and sentences of what has been trained so far."""
    page = Page("The paper's tables, repeated")
    page.text(
        "Accuracy in % of examples classified correctly. Ours are means over seeds ± their standard deviation, with "
        "the number of seeds. Testing was looked at once, when training was over; choices were made on validation. "
        "All figures come from records, one for each stage and seed, by the command below."
    )
    page.items([*_data_and_machines(targets, results)])
    settings = "".join(f" --set {setting}" for setting in results.settings)
    page.code(f"pqk-fast reproduce {' '.join(targets)} --data DIR --seeds {len(results.seeds)}{settings}")
    if "table1" in targets:
        page.heading("Table 1: networks, bits and sparsity")
        page.table(tables.table1(results))
        page.text(
            "Each cell is the paper's figure / ours (number of seeds), on testing after the last epoch. P is the "
            'pruned and quantized student, F the full net; "-" has not been run.'
        )
    if "table2" in targets or "fig2" in targets:
        _table2_and_fig2(targets, results, page)
    if "baselines" in targets:
        _baselines(results, page)
    _inside(results, page)
    page.heading("What the paper leaves open, and what is run here")
    page.items(_choices(results.recipe(BASE)))
    return page


def _table2_and_fig2(targets: Sequence[str], results: Results, page: Page) -> None:
    if "table2" in targets:
        page.heading("Table 2: phase 2 against finetuning")
        page.table(tables.table2(results))
        page.items(tables.verdicts(results))
    if "fig2" in targets:
        page.heading("Fig. 2: phase 2, epoch by epoch")
        phase1, phase2 = (results.records(BASE, stage) for stage in ("phase1", "phase2"))
        finetune = results.records(BASE, "finetune", "finetune.lr=0.1")
        _picture(
            page,
            "fig2",
            lambda: pictures.fig2(phase1, phase2, finetune),
            "Accuracy on validation over the epochs of phase 2: the student, the full net, and finetuning from the "
            "same phase 1 at the same learning rate. Epoch 0 is phase 1's end. Until distillation starts the two "
            "students do the same, on the same batches.",
        )


def _baselines(results: Results, page: Page) -> None:
    page.heading("What one would have picked instead")
    page.text(
        "The same network, data, optimizer and batches for all, and the same number of steps but for vanilla; "
        "quantized ones at 4 bits, pruned ones at 90 %. Passes are forward and backward passes of the network a step: "
        "phase 2 takes two, and the two with a separate teacher need its training too (the vanilla network's)."
    )
    page.table(tables.baselines(results))
    methods = [(m.title, results.sample(m.recipe, m.result)) for m in tables.METHODS]
    _picture(
        page,
        "baselines",
        lambda: pictures.side_by_side(methods, tables.METHODS[-1].title),
        "Testing accuracy by method. Vanilla is neither sparse nor quantized; two of the others are only one of both.",
    )


def _inside(results: Results, page: Page) -> None:
    """The student from inside: its layers over time, and what it takes for what."""
    phase1, phase2 = results.records(BASE, "phase1"), results.records(BASE, "phase2")
    if not phase1 and not phase2:
        return
    page.heading("Inside the student: res8-narrow, 4 bits, 90 % sparse")
    if phase1:
        seed = min(phase1)
        _picture(
            page,
            "layers",
            lambda: pictures.layers_over_time(phase1[seed]),
            f"Phase 1, seed {seed}: the part of each layer that the global threshold keeps, and its step size.",
        )
    matrices = [record["results"]["phase2_p"].get("confusion") for record in phase2.values()]
    if matrices and all(matrices):
        summed = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
        names = next(iter(phase2.values()))["data"]["classes"]
        _picture(
            page,
            "confusion",
            lambda: pictures.confusion_matrix(summed, names, "What the student answers"),
            f"Testing clips by label and answer, the students of {len(matrices)} seeds together.",
        )


def _picture(page: Page, name: str, make: Any, caption: str) -> None:
    """A picture, or a line that says why there is none."""
    try:
        page.picture(name, make(), caption)
    except (ImportError, ValueError) as error:
        page.text(f"No picture: {error}.")


def _data_and_machines(targets: Sequence[str], results: Results) -> list[str]:
    """Data sets and hardware of the records, each once."""
    data: dict[str, None] = {}
    machines: dict[str, None] = {}
    for task in plan(targets, results):
        record = results.runs.record(task)
        if record is None:
            continue
        about, hardware, versions = record["data"], record["hardware"], record["versions"]
        counts = ", ".join(f"{about[split]:,} {split}" for split in ("train", "validation", "testing"))
        data[f"Data: {about['name']}, {counts} (fingerprint `{about['fingerprint']}`)."] = None
        machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores a task"
        machines[f"Trained on: {machine}, torch {versions['torch']}."] = None
    return [*data, *machines] or ["Nothing has been trained yet."]


def _choices(recipe: Recipe) -> list[str]:
    """Each an option of the library."""
    pqk, phase2 = recipe.pqk, recipe.phase2
    return [
        f"Pruning scope: `{pqk.scope}`, one threshold over all convolution and linear weights, the first and the last "
        "layer included.",
        f'Start of the step size S: `step_init = "{pqk.step_init}"`, of the weights at initialization.',
        f'Gradient of clipped weights: `ste = "{pqk.ste}"`; pruned weights '
        f"{'get none' if pqk.mask_gradients else 'learn on and may come back'}. S has no gradient scale; its rate is "
        f"{recipe.phase1.step_lr_scale:g} of the weights'.",
        "The last mask of phase 1 has the target sparsity itself, which Eq. 1 alone would miss.",
        f"The teacher's weights: `{pqk.teacher_weights}` (fp32 everywhere); its BatchNorm starts `{pqk.teacher_bn}`. "
        "Biases follow the student's loss alone.",
        f"In phase 2 both branches learn from the labels alone for {phase2.distill_start} steps, then alpha = "
        f"{phase2.alpha:g}, beta = {phase2.beta:g}, T = {phase2.temperature:g} in both directions; the gradient of the "
        "divergence is scaled by T squared.",
        "Activations, biases and BatchNorm are not quantized. Schedules count steps, so that they are the paper's on "
        "data of any size; weights are those of the last epoch.",
    ]


__all__ = ["TARGETS", "make_page", "plan", "train_missing"]
