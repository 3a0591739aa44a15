"""Beyond the paper: the recipes ``plus``, what each of their ingredients gives, and what was tried and left out.

``pqk-fast reproduce plus``. Choices are made on validation; testing stands in the first table alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pqk_fast.experiments import paper, pictures
from pqk_fast.experiments.results import Results, Sample
from pqk_fast.experiments.tables import verdict
from pqk_fast.experiments.tasks import Task
from pqk_fast.pages import Page, Table
from pqk_fast.report import LABELS

PAPER = paper.TABLE2_RECIPE
PLUS = "kws-res8-narrow-plus-w4-p90"
STUDENTS = ("phase1_p", "finetune", "phase2_p", "phase2_f")


SPLITS = ("validation", "testing")


@dataclass(frozen=True)
class Ingredient:
    """A part of ``plus``: the settings that add it to the paper's recipe, and those that take it out of ``plus``."""

    title: str
    add: tuple[str, ...]
    leave_out: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """Something that was tried on top of ``plus`` and is no part of it; its phase 1 is ``plus``'s unless it says so."""

    title: str
    settings: tuple[str, ...]


INGREDIENTS = (
    Ingredient(
        "cosine decay in both phases",
        ("phase1.lr_schedule=cosine", "phase2.lr_schedule=cosine"),
        ("phase1.lr_schedule=drops", "phase2.lr_schedule=drops"),
    ),
    Ingredient("step sizes follow the kept weights", ("pqk.step_tracking=10",), ("pqk.step_tracking=0",)),
)
TRIALS = (
    Trial("distillation one way", ("phase2.distillation=one_way",)),
    Trial("teacher at rest for the last 1500 steps", ("phase2.teacher_rest=1500",)),
    Trial("phase 2 starts at a rate of .05", ("phase2.lr=0.05",)),
    Trial("one way, and the teacher at rest", ("phase2.distillation=one_way", "phase2.teacher_rest=1500")),
    Trial("step sizes learn on in phase 2", ("phase2.step_size=learned",)),
    Trial("mean of phase 2's last 1000 weights", ("phase2.average_steps=1000",)),
    Trial("label smoothing .1", ("phase1.label_smoothing=0.1", "phase2.label_smoothing=0.1")),
    Trial("warm-up of 500 steps", ("phase1.lr_warmup=500",)),
    Trial("LSQ's rates of the step sizes", ("phase1.step_lr_rule=lsq", "phase1.step_lr_scale=1.0")),
    Trial("up to 20 frames hidden (SpecAugment)", ("data.time_mask=20",)),
    Trial("weight decay 1e-4", ("phase1.weight_decay=1e-4", "phase2.weight_decay=1e-4")),
    Trial("mask at rest after 70 % of phase 1", ("pqk.mask_end=0.7",)),
    Trial(
        "half of the passes for phase 2",
        ("phase1.steps=6045", "phase2.steps=6100", "phase2.distill_start=2930"),
    ),
)


def ablations() -> list[tuple[str, str, tuple[str, ...]]]:
    """Title, recipe and settings of each row of the ablation's table."""
    added = [(f"the paper's + {part.title}", PAPER, part.add) for part in INGREDIENTS]
    left_out = [(f"plus - {part.title}", PLUS, part.leave_out) for part in INGREDIENTS]
    return [("the paper's recipe", PAPER, ()), *added, *left_out, ("plus", PLUS, ())]


def plan(results: Results, cells: Sequence[str] = ()) -> list[Task]:
    """All tasks of the page, each once; with ``cells`` only rows of these titles' words."""
    return list({task.key: task for task in _tasks(results, cells)}.values())


def _tasks(results: Results, cells: Sequence[str]) -> Iterator[Task]:
    for title, recipe, settings in [*ablations(), *_trials()]:
        if cells and not any(word in title for word in cells):
            continue
        bare = not settings
        stages = ("vanilla", "phase1", "finetune", "phase2") if bare else ("phase1", "phase2")
        yield from results.tasks(recipe, stages, *settings)


def make_page(results: Results) -> Page:
    page = Page("Beyond the paper: plus")
    page.text(
        "res8-narrow at 4 bits and 90 % sparsity, with as many passes over the data as the paper's schedule. Accuracy "
        "in % of examples classified correctly: means over seeds ± their standard deviation, after the last epoch. "
        "Every choice was made on validation; testing was looked at once, for the first table."
    )
    settings = "".join(f" --set {setting}" for setting in results.settings)
    page.code(f"pqk-fast reproduce plus --data DIR --seeds {len(results.seeds)}{settings}")
    page.heading("The recipe against the paper's")
    page.table(_against_the_paper(results))
    page.items([_teacher_or_not(results)])
    page.heading("What each ingredient gives")
    page.table(_table("Validation accuracy (%)", results, ablations()))
    try:
        samples = [(title, _sample(results, row, "phase2_p", *settings)) for title, row, settings in ablations()]
        page.picture(
            "ablation",
            pictures.side_by_side(samples, "plus", "Validation accuracy of phase 2's student"),
            "Each ingredient alone added to the paper's recipe, and alone left out of plus: seeds, and their mean.",
        )
    except (ImportError, ValueError) as error:
        page.text(f"No picture: {error}.")
    page.heading("What was tried on top, and left out")
    page.table(_table("Validation accuracy (%), and what it is above plus", results, _trials(), compared=True))
    return page


def _trials() -> list[tuple[str, str, tuple[str, ...]]]:
    return [("plus", PLUS, ()), *((trial.title, PLUS, trial.settings) for trial in TRIALS)]


def _sample(results: Results, recipe: str, result: str, *settings: str, split: str = "validation") -> Sample:
    return results.sample(recipe, result, *settings, split=split)


def _against_the_paper(results: Results) -> Table:
    table = Table(
        "Accuracy (%)", ("", *(f"{name}, {split}" for name in ("paper's", "plus") for split in SPLITS), "seeds")
    )
    for result in ("vanilla", *STUDENTS):
        samples = [_sample(results, recipe, result, split=split) for recipe in (PAPER, PLUS) for split in SPLITS]
        table.rows.append([LABELS[result], *(sample.text() for sample in samples), str(len(samples[-1]))])
    return table


def _teacher_or_not(results: Results) -> str:
    """The sentence on what phase 2 gives that finetuning does not."""
    student, finetuned = (_sample(results, PLUS, result, split="testing") for result in ("phase2_p", "finetune"))
    return verdict("phase2-P of plus", "finetuning from the same phase 1", student.minus(finetuned))


def _table(
    title: str, results: Results, rows: Sequence[tuple[str, str, tuple[str, ...]]], compared: bool = False
) -> Table:
    shown = ("phase1_p", "phase2_p", "phase2_f")
    above = ("phase2-P above plus",) if compared else ()
    table = Table(title, ("", *(LABELS[result] for result in shown), *above, "seeds"))
    plus = _sample(results, PLUS, "phase2_p")
    for name, recipe, settings in rows:
        samples = [_sample(results, recipe, result, *settings) for result in shown]
        difference = [samples[1].minus(plus).text(sign=True) if settings else ""] if compared else []
        table.rows.append([name, *(sample.text() for sample in samples), *difference, str(len(samples[1]))])
    return table
