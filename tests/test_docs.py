"""The committed pages are what the committed records give."""

from pathlib import Path

from cases import package

from pqk_fast.experiments import plus
from pqk_fast.experiments.reproduce import make_page
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.targets import TARGETS

ROOT = Path(__file__).parents[1]


def test_the_results_page_is_made_from_the_records(tmp_path: Path) -> None:
    package("matplotlib")
    results = Results(Runs(ROOT / "bench" / "results" / "reproduce"), 3, ["data.unknown=1.0"])
    markdown, _ = make_page(TARGETS, results).write(tmp_path, "results")
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == markdown.read_text(encoding="utf-8")
    assert {path.name for path in (ROOT / "docs" / "results").iterdir()} == {
        path.name for path in (tmp_path / "results").iterdir()
    }


def test_plus_says_what_the_records_say(tmp_path):
    package("matplotlib")
    results = Results(Runs(ROOT / "bench" / "results" / "reproduce"), 3, ["data.unknown=1.0"])
    markdown, _ = plus.make_page(results).write(tmp_path, "plus")
    assert (ROOT / "docs" / "plus.md").read_text(encoding="utf-8") == markdown.read_text(encoding="utf-8")
