"""Beyond the paper: the recipes ``plus``, what each of their ingredients gives, and what was tried and left out.

``pqk-fast reproduce plus``. Choices are made on validation; testing stands in the first table alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pqk_fast.experiments import paper, pictures
from pqk_fast.experiments.results import Results, Sample
from pqk_fast.experiments.tables import verdict
from pqk_fast.experiments.tasks import Task
from pqk_fast.pages import Page, Table
from pqk_fast.report import LABELS
from pqk_fast.settings import nearest, require

PAPER = paper.TABLE2_RECIPE
PLUS = "kws-res8-narrow-plus-w4-p90"
STUDENTS = ("phase1_p", "finetune", "distill", "phase2_p")
ALL_STAGES = ("vanilla", "phase1", "finetune", "distill", "phase2")
WITH_ALL = f"stages={list(ALL_STAGES)}"
SPLITS = ("validation", "testing")


@dataclass(frozen=True)
class Ingredient:
    """A part of ``plus``: the settings that add it to the paper's recipe, and those that take it out of ``plus``."""

    title: str
    text: str
    add: tuple[str, ...]
    leave_out: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """Something that was tried and is no part of ``plus``, on top of it or of it ``without`` some ingredients; its
    phase 1 is ``plus``'s unless it says so."""

    title: str
    settings: tuple[str, ...]
    without: tuple[Ingredient, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the page: a recipe with settings, and the one that it is compared with."""

    title: str
    recipe: str
    settings: tuple[str, ...] = ()
    base: Row | None = None


PAPERS = Row("the paper's recipe", PAPER)
WHOLE = Row("plus", PLUS)


def plus_without(*parts: Ingredient) -> Row:
    """``plus`` with these left out."""
    if not parts:
        return WHOLE
    title = " - ".join(["plus", *(part.title for part in parts)])
    return Row(title, PLUS, tuple(setting for part in parts for setting in part.leave_out), WHOLE)


COPY = Ingredient(
    "a frozen copy teaches",
    "from step 1500 of phase 2 the student distils from a copy of the full net, the mean of its last 750 weights",
    ("phase2.teacher_rest=1623", "phase2.teacher_average=750"),
    ("phase2.teacher_rest=0", "phase2.teacher_average=0"),
)
LEARNED = Ingredient(
    "LSQ's step sizes in phase 2",
    "they learn on, with the gradient's scale of LSQ (Esser et al., ICLR 2020), instead of being frozen",
    ("phase2.step_size=learned", "phase2.step_lr_rule=lsq", "phase2.step_lr_scale=1.0"),
    ("phase2.step_size=frozen", "phase2.step_lr_rule=flat", "phase2.step_lr_scale=1e-4"),
)
INGREDIENTS = (
    Ingredient(
        "cosine decay",
        "of the learning rate in both phases, instead of drops at fixed steps",
        ("phase1.lr_schedule=cosine", "phase2.lr_schedule=cosine"),
        ("phase1.lr_schedule=drops", "phase2.lr_schedule=drops"),
    ),
    Ingredient(
        "MSE step tracking",
        "at every tenth new mask the step size becomes the one of least squared error for the kept weights",
        ("pqk.step_tracking=10",),
        ("pqk.step_tracking=0",),
    ),
    COPY,
    LEARNED,
)
GENTLE = Trial("alpha .8, beta .2", ("phase2.alpha=0.8", "phase2.beta=0.2"))
TRIALS = (
    Trial("distillation one way", ("phase2.distillation=one_way",), (COPY, LEARNED)),
    Trial("the copy has the last weights, not their mean", ("phase2.teacher_average=0",), (LEARNED,)),
    Trial(
        "the copy teaches from step 1000 on",
        ("phase2.distill_start=1000", "phase2.teacher_rest=2123", "phase2.teacher_average=700"),
        (LEARNED,),
    ),
    GENTLE,
    Trial("temperature 4", ("phase2.temperature=4.0",)),
    Trial("phase 2 starts at a rate of .05", ("phase2.lr=0.05",)),
    Trial("mean of the last 350 steps' weights", ("phase2.average_steps=350",), (LEARNED,)),
    Trial("label smoothing .1 in phase 2", ("phase2.label_smoothing=0.1",)),
    Trial("warm-up of 500 steps", ("phase1.lr_warmup=500",)),
    Trial("LSQ's rates in phase 1 too", ("phase1.step_lr_rule=lsq", "phase1.step_lr_scale=1.0")),
    Trial("up to 20 frames hidden (SpecAugment)", ("data.time_mask=20",)),
    Trial(
        "half of the steps for phase 2",
        ("phase1.steps=6045", "phase2.steps=6100", "phase2.distill_start=2930", "phase2.teacher_rest=3170"),
    ),
)


def ablations() -> list[Row]:
    """Each ingredient alone added to the paper's recipe, and alone left out of ``plus``."""
    added = [Row(f"the paper's + {part.title}", PAPER, part.add, PAPERS) for part in INGREDIENTS]
    return [PAPERS, *added, *(plus_without(part) for part in INGREDIENTS), WHOLE]


def trials() -> list[Row]:
    """Everything that was tried, on what it was tried."""
    bases = [plus_without(*trial.without) for trial in TRIALS]
    pairs = zip(TRIALS, bases, strict=True)
    return [Row(trial.title, PLUS, (*base.settings, *trial.settings), base) for trial, base in pairs]


def teachers() -> list[Row]:
    """``plus`` with and without the ingredients of phase 2, and what else was tried on the teacher."""
    rows = [plus_without(*parts) for parts in ((), (COPY,), (LEARNED,), (COPY, LEARNED))]
    return [*rows, Row(f"plus, {GENTLE.title}", PLUS, GENTLE.settings, WHOLE)]


def plan(results: Results, cells: Sequence[str] = ()) -> list[Task]:
    """All tasks of the page, each once; with ``cells`` only rows of these titles' words. ConfigError if one is in no
    title."""
    rows: list[tuple[Row, tuple[str, ...]]] = []
    rows += [(row, ("phase1", "phase2") if row.base else ALL_STAGES) for row in [*ablations(), *trials()]]
    rows += [(row, ("phase1", "finetune", "phase2")) for row in teachers()]
    titles = [row.title for row, _ in rows]
    for word in cells:
        require(any(word in title for title in titles), f"plus has no row of {word!r}{nearest(word, titles)}")
    chosen = [(row, stages) for row, stages in rows if not cells or any(word in row.title for word in cells)]
    tasks = [task for row, stages in chosen for task in results.tasks(row.recipe, stages, WITH_ALL, *row.settings)]
    return list({task.key: task for task in tasks}.values())


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
    page.text(
        "All below phase1-P start from it and train for as many steps. The separate teacher is the vanilla network, "
        "whose own steps are not counted."
    )
    page.items(_verdicts(results))
    page.heading("What plus is")
    page.items([f"{part.title}: {part.text}." for part in INGREDIENTS])
    page.heading("What each ingredient gives")
    page.text("Alone added to the paper's recipe, and alone left out of plus, each against that with the same seeds.")
    page.table(_ablations(results))
    try:
        samples = [(row.title, _sample(results, row, "phase2_p")) for row in ablations()]
        page.picture(
            "ablation",
            pictures.side_by_side(samples, "plus", "Validation accuracy of phase 2's student"),
            "Each ingredient alone added to the paper's recipe, and alone left out of plus: seeds, and their mean.",
        )
    except (ImportError, ValueError) as error:
        page.text(f"No picture: {error}.")
    page.heading("What the teacher gives")
    page.text("phase2-P minus finetuning from the same phase 1, with the same options but a teacher.")
    page.table(_teachers(results))
    page.heading("What was tried, and left out")
    page.text("Each against what it was tried on, with the same seeds.")
    page.table(_trials(results))
    if waiting := [row.title for row in trials() if not _sample(results, row, "phase2_p")]:
        page.text(f"Not trained yet: {'; '.join(waiting)}.")
    return page


def _sample(results: Results, row: Row, result: str, split: str = "validation") -> Sample:
    return results.sample(row.recipe, result, WITH_ALL, *row.settings, split=split)


def _against_the_paper(results: Results) -> Table:
    columns = [f"{name}, {column}" for name in ("paper's", "plus") for column in (*SPLITS, "seeds")]
    table = Table("Accuracy (%)", ("", *columns))
    for result in ("vanilla", *STUDENTS):
        cells = [LABELS[result]]
        for row in (PAPERS, WHOLE):
            samples = [_sample(results, row, result, split) for split in SPLITS]
            cells += [*(sample.text() for sample in samples), str(len(samples[-1]))]
        table.rows.append(cells)
    return table


def _verdicts(results: Results) -> list[str]:
    """The sentences on what phase 2 gives that finetuning and another teacher do not."""
    student = _sample(results, WHOLE, "phase2_p", "testing")
    others = {"finetune": "finetuning", "distill": "the vanilla network as teacher,"}
    return [
        verdict(
            "phase2-P of plus",
            f"{name} from the same phase 1",
            student.minus(_sample(results, WHOLE, result, "testing")),
        )
        for result, name in others.items()
    ]


def _compared(results: Results, row: Row) -> list[str]:
    """Cells: phase 1, phase 2, how much that is above the base's, and seeds; of those that row and base both have."""
    phase1, phase2 = (_sample(results, row, result) for result in ("phase1_p", "phase2_p"))
    above = Sample({}) if row.base is None else phase2.minus(_sample(results, row.base, "phase2_p"))
    seeds = above.values or phase2.values
    return [phase1.of(seeds).text(), phase2.of(seeds).text(), above.text(sign=True), str(len(seeds))]


COMPARED = (LABELS["phase1_p"], LABELS["phase2_p"], "phase2-P above it", "seeds")


def _ablations(results: Results) -> Table:
    table = Table("Validation accuracy (%)", ("", *COMPARED))
    table.rows += [[row.title, *_compared(results, row)] for row in ablations()]
    return table


def _teachers(results: Results) -> Table:
    table = Table("phase2-P minus finetune, validation (points)", ("", "difference", "seeds"))
    for row in teachers():
        student, finetuned = (_sample(results, row, result) for result in ("phase2_p", "finetune"))
        difference = student.minus(finetuned)
        table.rows.append([row.title, difference.text(sign=True), str(len(difference))])
    return table


def _trials(results: Results) -> Table:
    """Of the trials of which at least one seed is trained."""
    table = Table("Validation accuracy (%)", ("", "tried on", *COMPARED))
    for row in trials():
        if row.base is not None and _sample(results, row, "phase2_p"):
            table.rows.append([row.title, row.base.title, *_compared(results, row)])
    return table
