"""The paper's tables and the baselines', from records: the paper's figure, ours, spread and number of seeds."""

from __future__ import annotations

from dataclasses import dataclass

from pqk_fast.experiments import paper
from pqk_fast.experiments.results import Results, Sample
from pqk_fast.pages import Table
from pqk_fast.report import LABELS
from pqk_fast.settings import is_quantized


@dataclass(frozen=True)
class Method:
    """A way to a small network: the recipe, the stage that ends it, what it is called."""

    recipe: str
    result: str
    title: str
    cost: str  # of its steps, in forward and backward passes of the network


BASE = paper.TABLE2_RECIPE
METHODS = (
    Method(BASE, "vanilla", "vanilla, fp32 dense", "1"),
    Method("baseline-lsq", "phase1_p", "quantization alone: LSQ", "1"),
    Method("baseline-pruning", "finetune", "pruning alone, then finetuning", "1"),
    Method("baseline-one-shot", "phase1_p", "one-shot pruning, then finetuning (Han)", "1"),
    Method("baseline-gradual", "finetune", "gradual pruning, hard masks (Zhu, Gupta)", "1"),
    Method("baseline-dpf", "phase1_p", "dynamic pruning with feedback (DPF)", "1"),
    Method(BASE, "finetune", "PQK's phase 1, then finetuning", "1"),
    Method("baseline-kd", "distill", "phase 1, then a separate fp32 teacher (KD)", "1 + teacher"),
    Method("baseline-qkd", "distill", "phase 1, then QKD's co-study and tutoring", "1 + teacher"),
    Method(BASE, "phase2_p", "PQK: phase 1 and phase 2", "1, then 2"),
)


def table1(results: Results) -> Table:
    """The paper's Table 1: each cell "paper / ours", on the testing split after the last epoch."""
    titles = [title for title, _ in paper.COLUMNS.values()]
    table = Table("Table 1: accuracy (%), paper / ours", ("", "bits", *titles))
    rows = [("vanilla", 32), *((result, bits) for bits in (8, 4) for result in paper.RESULTS)]
    for result, bits in rows:
        shown = f"32 (P={bits})" if result == "phase2_f" else str(bits)
        cells = [LABELS[result], shown]
        for name, (_, (vanilla, *by_bits)) in paper.COLUMNS.items():
            figure = vanilla if bits == 32 else by_bits[0 if bits == 8 else 1][paper.RESULTS.index(result)]
            ours = results.sample(name.format(bits=f"w{4 if bits == 32 else bits}"), result)
            count = f" ({len(ours)})" if len(ours) else ""
            cells.append(f"{figure} / {ours.text()}{count}")
        table.rows.append(cells)
    return table


def table2(results: Results) -> Table:
    """The paper's Table 2, with validation beside testing."""
    table = Table(
        "Table 2: res8-narrow, 4 bits, 90 % sparse, accuracy (%)",
        ("", "paper", "validation", "testing", "testing, best epoch", "seeds"),
    )
    for title, figure, result, settings in table2_rows():
        samples = [
            results.sample(BASE, result, *settings, split=split, moment=moment)
            for split, moment in (("validation", "last"), ("testing", "last"), ("testing", "best_dev"))
        ]
        table.rows.append(
            [title, "-" if figure is None else str(figure), *(s.text() for s in samples), str(len(samples[1]))]
        )
    return table


def table2_rows() -> list[tuple[str, float | None, str, tuple[str, ...]]]:
    """Title, the paper's figure, result and settings of each row."""
    finetuned = [
        (f"finetune, rate {rate:g}", figure, "finetune", (f"finetune.lr={rate}",))
        for rate, figure in paper.TABLE2_FINETUNE.items()
    ]
    return [
        ("vanilla, fp32", None, "vanilla", ()),
        ("phase1-P", paper.TABLE2["phase1_p"], "phase1_p", ()),
        *finetuned,
        ("phase2-P", paper.TABLE2["phase2_p"], "phase2_p", ()),
        ("phase2-F, fp32", None, "phase2_f", ()),
    ]


def best_finetune(results: Results) -> float:
    """The first learning rate whose finetuned student is the best on validation, over the seeds."""

    def on_validation(rate: float) -> float:
        sample = results.sample(BASE, "finetune", f"finetune.lr={rate}", split="validation")
        return sample.mean if len(sample) else -1.0

    return max(paper.TABLE2_FINETUNE, key=on_validation)


def verdicts(results: Results) -> list[str]:
    """Whether phase 2 beats phase 1, and the best finetuning, by more than the spread: a sentence each."""
    phase2 = results.sample(BASE, "phase2_p")
    rate = best_finetune(results)
    against = {
        "phase1-P": results.sample(BASE, "phase1_p"),
        f"the best finetune (rate {rate:g}, chosen on validation)": results.sample(
            BASE, "finetune", f"finetune.lr={rate}"
        ),
    }
    return [verdict("phase2-P", name, phase2.minus(other)) for name, other in against.items()]


def verdict(name: str, other: str, difference: Sample) -> str:
    """One sentence on a paired difference, testing accuracy in points."""
    n = len(difference)
    if not n:
        return f"{name} and {other} have no seed in common yet."
    between = f"{difference.text(sign=True)} points on testing (n = {n}, same seeds)"
    if difference.spread is None:
        return f"{name} against {other}: {between}; one seed says nothing of the spread."
    if abs(difference.mean) <= difference.spread:
        return f"{name} against {other}: {between}: **no difference beyond the spread**."
    better, word = difference.mean > 0, "beats it" if difference.mean > 0 else "is beaten"
    same_sign = all((value > 0) == better for value in difference.values.values())
    return f"{name} against {other}: {between}: **{word} by more than the spread**" + (
        ", in every seed." if same_sign else ", though not in every seed."
    )


def baselines(results: Results) -> Table:
    """Every method at the same number of steps, and what PQK's student is above it."""
    table = Table(
        "Baselines at equal steps: res8-narrow, accuracy (%)",
        ("", "bits", "sparse", "steps", "passes", "validation", "testing", "PQK minus it", "seeds"),
    )
    student = results.sample(BASE, "phase2_p")
    for method in METHODS:
        recipe = results.recipe(method.recipe)
        testing = results.sample(method.recipe, method.result)
        vanilla = method.result == "vanilla"
        stage = {"phase1_p": "phase1", "phase2_p": "phase2"}.get(method.result, method.result)
        steps = [str((recipe.vanilla or recipe.phase1).steps)] if vanilla else [str(recipe.phase1.steps)]
        if recipe.phase1_start == "vanilla":
            steps.insert(0, str((recipe.vanilla or recipe.phase1).steps))
        if stage not in ("vanilla", "phase1"):
            steps.append(str(recipe.phase2.steps))
        table.rows.append(
            [
                method.title,
                "32" if vanilla or not is_quantized(recipe.pqk.bits) else str(recipe.pqk.bits),
                "-" if vanilla or not recipe.pqk.sparsity else f"{100 * recipe.pqk.sparsity:.0f} %",
                " + ".join(steps),
                method.cost,
                results.sample(method.recipe, method.result, split="validation").text(),
                testing.text(),
                "" if method.result == "phase2_p" else student.minus(testing).text(sign=True),
                str(len(testing)),
            ]
        )
    return table
