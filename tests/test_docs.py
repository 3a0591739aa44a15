"""The committed pages, and their pictures, are what the committed records give."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import package

from pqk_fast.experiments import pareto, plus
from pqk_fast.experiments.reproduce import make_page
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.targets import TARGETS
from pqk_fast.pages import Page

ROOT = Path(__file__).parents[1]
PAGES: dict[str, tuple[int, Callable[[Results], Page]]] = {  # with the number of seeds
    "results": (3, lambda results: make_page(TARGETS, results)),
    "plus": (5, plus.make_page),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_records_say(name: str, tmp_path: Path) -> None:
    package("matplotlib")
    seeds, made = PAGES[name]
    is_committed(made(results_of(seeds)), name, tmp_path)


def test_the_pareto_page_says_what_its_record_says(tmp_path: Path) -> None:
    package("matplotlib")
    record = json.loads((ROOT / "bench" / "results" / "pareto.json").read_text(encoding="utf-8"))
    is_committed(pareto.make_page(record), "pareto", tmp_path)
    readme = readme_in_one_line()
    points, _ = pareto.from_json(record)
    found = {(one.bits, one.sparsity, one.mixed): one for one in points}
    for bits, sparsity in ((4, 0.95), (2, 0.9)):
        one = found[bits, sparsity, False]
        assert f"{bits} bits at {100 * sparsity:g} % ({one.bytes:,} bytes, {one.sample.text()} %)" in readme
    gains = [found[3, part, True].sample.minus(found[3, part, False].sample).text() for part in (0.8, 0.9, 0.95)]
    assert "by {}, {} and {} points at 80, 90 and 95 % sparsity".format(*gains) in readme


def test_the_readme_says_what_plus_reaches() -> None:
    readme = readme_in_one_line()
    for result, name in {"phase1_p": "phase1-P", "phase2_p": "phase2-P", "finetune": "finetuning"}.items():
        found = [results_of(5).sample(plus.PLUS, result, split=split).text() for split in ("validation", "testing")]
        assert f"{name} {' / '.join(found)}" in readme
    other = [results_of(5).sample(plus.PLUS, "distill", plus.WITH_ALL, split=split) for split in plus.SPLITS]
    assert f"gives {' / '.join(sample.text() for sample in other)}." in readme
    student, finetuned = (results_of(5).sample(plus.PLUS, result) for result in ("phase2_p", "finetune"))
    assert f"on testing phase 2 is {finetuned.minus(student).text()} points below finetuning" in readme


def test_the_readme_says_what_ten_classes_gave() -> None:
    readme = readme_in_one_line()
    folder = ROOT / "bench" / "results" / "reproduce-ten-classes"
    results = {path.stem: json.loads(path.read_text(encoding="utf-8"))["results"] for path in folder.glob("*.json")}

    def last(run: str, result: str, split: str) -> float:
        (found,) = [value for stem, value in results.items() if stem.endswith(run)]
        return found[result]["last"][split]

    vanilla, phase1 = last("ec6ecdbf", "vanilla", "testing"), last("6df65e7f", "phase1_p", "testing")
    student, full_net = (last("16c1022a", result, "testing") for result in ("phase2_p", "phase2_f"))
    assert f"vanilla {vanilla}, phase1-P {phase1}, phase2-P {student}, phase2-F {full_net}." in readme
    runs = {"16c1022a": "phase2_p", "7bac930c": "phase2_p", "fa7ded48": "finetune"}
    paper, beyond, finetuned = (
        " / ".join(str(last(run, result, split)) for split in ("validation", "testing")) for run, result in runs.items()
    )
    assert f"phase2-P {paper}, with `cifar100-resnet32-plus-w4-p90` {beyond}, and finetuning" in readme
    assert f"from the latter's phase 1 {finetuned}." in readme


def test_the_benchmarks_page_and_the_readme_say_what_the_record_says(bench: Callable, tmp_path: Path) -> None:
    package("matplotlib")
    record = bench("figures").read(ROOT / "bench" / "results" / "bench.json")
    is_committed(bench("page").make_page(record), "benchmarks", tmp_path)
    readme, headlines = (ROOT / "README.md").read_text(encoding="utf-8"), bench("headlines")
    assert headlines.table(record) in readme
    assert headlines.latency(record) in readme


def readme_in_one_line() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def results_of(seeds: int) -> Results:
    return Results(Runs(ROOT / "bench" / "results" / "reproduce"), seeds, ["data.unknown=1.0"])


def is_committed(page: Page, name: str, tmp_path: Path) -> None:
    markdown, _ = page.write(tmp_path, name)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == markdown.read_text(encoding="utf-8")
    assert pictures(ROOT / "docs" / name) == pictures(tmp_path / name)


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
