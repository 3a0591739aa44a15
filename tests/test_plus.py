"""The page of `pqk-fast reproduce plus`, from records that are written here, and its recipes."""

import pytest
from cases import package
from test_reproduce import write

from pqk_fast import cli
from pqk_fast.experiments import plus
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.runner import Runs
from pqk_fast.recipe_files import load_recipe
from pqk_fast.record import RESULTS
from pqk_fast.settings import ConfigError, to_dict


@pytest.fixture
def results(tmp_path):
    return Results(Runs(tmp_path / "records"), 2, ["data.unknown=1.0"])


def test_plus_is_the_papers_recipe_with_all_ingredients_and_each_can_be_left_out():
    paper, whole = load_recipe(plus.PAPER), load_recipe(plus.PLUS)
    every = [setting for part in plus.INGREDIENTS for setting in part.add]
    assert to_dict(load_recipe(plus.PAPER, every)) | {"name": "", "description": ""} == to_dict(whole) | {
        "name": "",
        "description": "",
    }
    nothing = load_recipe(plus.PLUS, [setting for part in plus.INGREDIENTS for setting in part.leave_out])
    for table in ("pqk", "data", "phase1", "phase2"):
        assert getattr(nothing, table) == getattr(paper, table)


def test_what_rows_have_in_common_is_trained_once(results):
    tasks = plus.plan(results)
    assert len({task.key for task in tasks}) == len(tasks)
    assert {task.recipe.seed for task in tasks} == {0, 1}
    after = {trial.title: plus.plan(results, [trial.title]) for trial in plus.TRIALS}
    own = {task.key for task in results.tasks(plus.PLUS, plus.ALL_STAGES, plus.WITH_ALL)}
    for trial in plus.TRIALS:
        phase1, phase2 = (
            [task for task in after[trial.title] if task.stage == stage] for stage in ("phase1", "phase2")
        )
        assert len(phase1) == len(phase2) == 2
        same_start = all(setting.startswith("phase2.") for setting in trial.settings)
        assert all((task.key in own) == same_start for task in phase1), trial
        assert not any(task.key in own for task in phase2)


def test_all_that_the_page_reads_is_planned(results, monkeypatch):
    planned = {task.key for task in plus.plan(results)}
    read = set()
    figures = {result: {"last": {"validation": 80.0, "testing": 81.0}} for result in RESULTS}
    monkeypatch.setattr(results.runs, "record", lambda task: read.add(task.key) or {"results": figures})
    plus.make_page(results)
    assert read == planned


def test_a_row_that_is_not_there_is_refused(results):
    with pytest.raises(ConfigError, match=r"plus has no row of 'temprature 4'; did you mean 'temperature 4'\?"):
        plus.plan(results, ["plus", "temprature 4"])


def test_the_page_tells_what_records_say(results, tmp_path):
    package("matplotlib")
    markdown, page = plus.make_page(results).write(tmp_path / "empty", "plus")
    assert "have no seed in common yet" in markdown.read_text()
    assert "No picture: no method has been trained yet." in markdown.read_text()
    for task in results.tasks(plus.PLUS, plus.ALL_STAGES, plus.WITH_ALL):
        figure = {"phase1": 80, "finetune": 82, "phase2": 85}.get(task.stage, 90) + 2 * task.recipe.seed
        write(results.runs, task, figure + 1, figure)
    (row,) = (row for row in plus.ablations() if row.title == "plus - cosine decay")
    for task in results.tasks(plus.PLUS, ["phase1", "phase2"], plus.WITH_ALL, *row.settings):
        if task.stage == "phase1" or task.recipe.seed == 1:
            write(results.runs, task, 10, 82 + task.recipe.seed if task.stage == "phase1" else 84)
    (trial,) = (trial for trial in plus.TRIALS if trial.title == "temperature 4")
    for task in results.tasks(plus.PLUS, ["phase2"], *trial.settings):
        write(results.runs, task, 10, 88 + task.recipe.seed)
    markdown, page = plus.make_page(results).write(tmp_path, "plus")
    text = markdown.read_text()
    assert "| phase2-P | - | - | 0 | 86.0 ± 1.4 | 87.0 ± 1.4 | 2 |" in text
    assert "| finetune | - | - | 0 | 83.0 ± 1.4 | 84.0 ± 1.4 | 2 |" in text
    assert (
        "+3.0 ± 0.0 points on testing (n = 2, same seeds): **beats it by more than the spread**, in every seed." in text
    )
    assert "| temperature 4 | plus | 81.0 ± 1.4 | 88.5 ± 0.7 | +2.5 ± 0.7 | 2 |" in text
    assert "| plus - cosine decay | 83.0 | 84.0 | -3.0 | 1 |" in text, "of the seed that both have"
    teachers = text[text.index("## What the teacher gives") :]
    assert "| plus | +3.0 ± 0.0 | 2 |" in teachers
    assert "| plus, alpha .8, beta .2 | - | 0 |" in teachers
    assert "Not trained yet: distillation one way; " in text
    assert text.count("![") == 1
    assert "plus" in page.read_text()


def test_the_command_makes_the_page_alone(results, tmp_path, capsys):
    out = ["--out", str(results.runs.out), "--page", str(tmp_path / "docs"), "--seeds", "2"]
    assert cli.main(["reproduce", "plus", *out]) == 0
    assert (tmp_path / "docs" / "plus.md").is_file()
    assert "tasks on speech_commands are not trained yet" in capsys.readouterr().out
    assert cli.main(["reproduce", "plus", "table1", *out]) != 0
    assert "plus makes a page of its own" in capsys.readouterr().err
