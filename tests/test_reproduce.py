"""Tables, sentences, pictures and the page of `pqk-fast reproduce`, from records that are written here."""

import re
import struct
from dataclasses import replace

import pytest
from cases import package

from pqk_fast import cli
from pqk_fast.experiments import paper, pictures, tables
from pqk_fast.experiments.reproduce import make_page, plan
from pqk_fast.experiments.results import Results, Sample
from pqk_fast.experiments.run import RESULT_NAMES
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.targets import TARGETS, cells_of
from pqk_fast.record import environment, write_record
from pqk_fast.settings import ConfigError, to_dict

BASE = paper.TABLE2_RECIPE
LAYERS = [{"name": name, "shape": [4, 5], "weights": 20, "kept": 2} for name in ("first", "second")]


def write(runs, task, testing, validation=None):
    """A record as the runner leaves it, with these accuracies in percent for each of its results."""
    stage, phase = task.stage, task.recipe.phase1 if task.stage in ("vanilla", "phase1") else task.recipe.phase2
    validation = testing if validation is None else validation
    rows = [
        {
            "epoch": epoch,
            "step": epoch * phase.epoch_steps,
            "validation": validation - 3 + epoch,
            "validation_f": validation - 2 + epoch,
            "sparsity": 0.9,
            "kept": [2, 2],
            "step_size": [0.1 / epoch, 0.2 / epoch],
        }
        for epoch in (1, 2, 3)
    ]
    result = {
        "last": {"validation": validation, "testing": testing},
        "best_dev": {"validation": validation + 1, "testing": testing - 1, "epoch": 2},
        "confusion": [[8, 2], [1, 9]],
    }
    record = {
        "recipe": to_dict(task.recipe),
        **environment(),
        "seed": task.recipe.seed,
        "data": {
            "name": task.recipe.data.name,
            "train": 100,
            "validation": 10,
            "testing": 20,
            "fingerprint": "f" * 16,
            "classes": ["yes", "no"],
        },
        "curves": {stage: rows},
        "results": {name: result for (s, _), name in RESULT_NAMES.items() if s == stage},
        "seconds": {stage: 60.0},
        "layers": LAYERS,
    }
    write_record(runs.out / f"{task.folder}.json", record)


@pytest.fixture
def results(tmp_path):
    return Results(Runs(tmp_path / "records"), 3)


def written(results, name, stage, figures, *settings, validation=None):
    """Records of a stage, one a figure."""
    for seed, figure in enumerate(figures):
        (task,) = [task for task in results.tasks(name, [stage], *settings) if task.recipe.seed == seed]
        write(results.runs, task, figure, validation)


def test_a_sample_has_mean_spread_and_paired_differences():
    sample, other = Sample({0: 80.0, 1: 82.0, 2: 84.0}), Sample({1: 80.0, 2: 83.0, 5: 0.0})
    assert sample.text() == "82.0 ± 2.0"
    assert sample.spread == pytest.approx(2.0)
    assert sample.minus(other).values == {1: 2.0, 2: 1.0}
    assert sample.minus(other).text(sign=True) == "+1.5 ± 0.7"
    assert Sample({3: 1.25}).text() == "1.2"
    assert Sample({3: 1.25}).spread is None
    assert Sample({}).text() == "-"


def test_only_records_of_the_very_recipe_count(results):
    written(results, BASE, "phase1", [70.0, 71.0])
    assert results.sample(BASE, "phase1_p").values == {0: 70.0, 1: 71.0}
    assert not len(results.sample("kws-res8-narrow-w8-p90", "phase1_p"))
    other = Results(results.runs, 3, ["phase1.lr=0.2"])
    assert not len(other.sample(BASE, "phase1_p"))
    assert Results(results.runs, 1).sample(BASE, "phase1_p").values == {0: 70.0}


def test_table1_sets_the_papers_figure_before_ours(results):
    written(results, BASE, "phase1", [70.0, 72.0])
    written(results, "kws-res8-w8-p50", "phase2", [95.0])
    table = tables.table1(results)
    cells = {(row[0], row[1]): row[2:] for row in table.rows}
    assert cells["phase1-P", "4"] == ["66.2 / -", "74.1 / 71.0 ± 1.4 (2)", "91.7 / -", "94.3 / -", "94.1 / -"]
    assert cells["phase2-P", "8"][4] == "94.7 / 95.0 (1)"
    assert cells["phase2-F", "32 (P=8)"][4] == "94.9 / 95.0 (1)"
    assert [row[0] for row in table.rows] == ["vanilla", *["phase1-P", "phase2-P", "phase2-F"] * 2]
    assert len(table.columns) == 2 + len(paper.COLUMNS)


def test_the_papers_figures_are_the_papers():
    """A few, by hand, from the paper's Tables 1 and 2."""
    assert paper.COLUMNS["kws-res8-narrow-{bits}-p90"][1] == (91.4, (81.7, 86.4, 90.1), (74.1, 83.1, 85.1))
    assert paper.COLUMNS["cifar100-resnet32-{bits}-p90"][1] == (69.7, (67.4, 69.8, 71.1), (66.2, 67.7, 69.8))
    assert paper.TABLE2_FINETUNE == {0.1: 79.2, 0.01: 78.0, 0.001: 73.8}


def test_table2_has_all_rates_and_both_splits(results):
    written(results, BASE, "finetune", [80.0, 84.0], "finetune.lr=0.01", validation=77.0)
    rows = {row[0]: row[1:] for row in tables.table2(results).rows}
    assert rows["finetune, rate 0.01"] == ["78.0", "77.0 ± 0.0", "82.0 ± 2.8", "81.0 ± 2.8", "2"]
    assert rows["finetune, rate 0.1"] == ["79.2", "-", "-", "-", "0"]


def test_the_best_finetune_is_chosen_on_validation(results):
    written(results, BASE, "finetune", [90.0], "finetune.lr=0.1", validation=70.0)
    written(results, BASE, "finetune", [60.0], "finetune.lr=0.001", validation=80.0)
    assert tables.best_finetune(results) == 0.001


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "have no seed in common yet"),
        ([3.0], "one seed says nothing of the spread"),
        ([5.0, 6.0, 7.0], "**beats it by more than the spread**, in every seed."),
        ([-5.0, -6.0, -7.0], "**is beaten by more than the spread**, in every seed."),
        ([5.0, -1.0, 4.0, 4.0], "**beats it by more than the spread**, though not in every seed."),
        ([1.0, -1.0, 2.0], "**no difference beyond the spread**"),
        ([0.0, 0.0], "**no difference beyond the spread**"),
    ],
)
def test_a_verdict_says_what_the_spread_supports(values, says):
    assert says in tables.verdict("ours", "theirs", Sample(dict(enumerate(values))))


def test_baselines_are_compared_seed_by_seed_at_equal_steps(results):
    written(results, BASE, "phase2", [80.0, 84.0])
    written(results, "baseline-dpf", "phase1", [79.0, 82.0])
    rows = {
        row[0]: dict(zip(tables.baselines(results).columns, row, strict=True)) for row in tables.baselines(results).rows
    }
    dpf = rows["dynamic pruning with feedback (DPF)"]
    assert (dpf["steps"], dpf["testing"], dpf["PQK minus it"], dpf["seeds"]) == (
        "12145",
        "80.5 ± 2.1",
        "+1.5 ± 0.7",
        "2",
    )
    for title, row in rows.items():
        steps = sum(int(part) for part in row["steps"].split(" + "))
        assert steps == (9022 if title.startswith("vanilla") else 12145), title
    assert rows["quantization alone: LSQ"]["sparse"] == "-"
    assert rows["quantization alone: LSQ"]["bits"] == "4"
    assert rows["pruning alone, then finetuning"]["bits"] == "32"


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_has_each_task_once_and_all_seeds(results, target):
    tasks = plan([target], results)
    assert len({task.key for task in tasks}) == len(tasks)
    assert {task.recipe.seed for task in tasks} == {0, 1, 2}
    assert {task.key for task in plan(TARGETS, results)} >= {task.key for task in tasks}


def test_cells_share_what_they_have_in_common(results):
    one = Results(results.runs, 1)
    stages = [task.stage for task in plan(["table2", "fig2"], one)]
    assert sorted(stages) == ["finetune"] * 3 + ["phase1", "phase2", "vanilla"]
    narrow = [cell for cell in cells_of("table1") if "narrow" in cell]
    stages = [task.stage for task in plan(["table1"], one, narrow)]
    assert sorted(stages) == ["phase1"] * 2 + ["phase2"] * 2 + ["vanilla"]


def test_an_unknown_cell_is_refused_with_the_nearest(results):
    with pytest.raises(ConfigError, match="kws-res8-w4-p90"):
        plan(["table1"], results, ["kws-res8-w4-p91"])
    with pytest.raises(ConfigError, match="table2 have no cell"):
        plan(["table2"], results, ["kws-res8-w4-p90"])


def fill(results):
    for offset, (name, stage, settings) in enumerate(
        [(BASE, "vanilla", ()), (BASE, "phase1", ()), (BASE, "phase2", ()), (BASE, "finetune", ("finetune.lr=0.1",))]
    ):
        written(results, name, stage, [70.0 + offset, 72.0 + 2 * offset], *settings)


def test_the_page_without_records_says_so(results, tmp_path):
    markdown, page = make_page(TARGETS, results).write(tmp_path, "results")
    assert "Nothing has been trained yet." in markdown.read_text()
    assert "<h1>" in page.read_text()


def test_the_page_has_tables_and_pictures_and_needs_no_network(results, tmp_path):
    package("matplotlib")
    fill(results)
    markdown, page = make_page(TARGETS, results).write(tmp_path, "results")
    text, html = markdown.read_text(), page.read_text()
    assert "Table 1" in text
    assert "Table 2" in text
    assert "Fig. 2" in text
    named = re.findall(r"\]\((results/\w+\.png)\)", text)
    assert named == [f"results/{name}.png" for name in ("fig2", "baselines", "layers", "confusion")]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert html.count('src="data:image/png;base64,') == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    again = make_page(TARGETS, results).write(tmp_path / "again", "results")
    assert again[0].read_text() == text
    assert again[1].read_text() == html


def test_pictures_refuse_what_cannot_be_drawn(results):
    package("matplotlib")
    with pytest.raises(ValueError, match="no seed has phase 1, phase 2 and finetuning"):
        pictures.fig2({}, {}, {})
    with pytest.raises(ValueError, match="no phase 1"):
        pictures.layers_over_time({"curves": {}, "layers": LAYERS})
    with pytest.raises(ValueError, match="no method"):
        pictures.side_by_side([("a", Sample({}))], "a")


def test_a_confusion_matrix_grows_with_its_classes():
    package("matplotlib")
    small = pictures.confusion_matrix([[1, 0], [0, 0]], ["a", "b"], "t")
    large = pictures.confusion_matrix([[1] * 12] * 12, [str(i) for i in range(12)], "t")
    assert struct.unpack(">I", large[16:20]) > struct.unpack(">I", small[16:20])


SMALL = [
    *("data.name=spoken_words", "phase1.steps=40", "phase1.epoch_steps=40", "phase2.steps=20", "phase2.epoch_steps=20"),
    *("phase2.distill_start=10", "distill.co_study=5"),
]


@pytest.mark.slow
def test_the_command_trains_what_is_missing_and_writes_the_page(tmp_path, capsys):
    package("espeakng_loader")
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = ["reproduce", "fig2", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path), *settings]
    assert cli.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("res8_narrow-") == 4
    assert cli.main(command) == 0
    assert "4/4 res8_narrow-" in capsys.readouterr().out
    assert "Fig. 2" in (tmp_path / "results.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(before) == 4
    assert cli.main(command) == 0
    assert "res8_narrow-" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before


def test_without_a_folder_the_command_only_reads(tmp_path, capsys):
    assert cli.main(["reproduce", "table1", "--out", str(tmp_path / "none"), "--page", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tasks on cifar100 are not trained yet" in out
    assert "tasks on speech_commands are not trained yet" in out
    assert (tmp_path / "results.html").exists()
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "table3"])
    assert "table3" in capsys.readouterr().err


def test_records_of_a_changed_default_are_refused(results):
    (task,) = [task for task in results.tasks(BASE, ["vanilla"]) if task.recipe.seed == 0]
    write(results.runs, replace(task), 88.0)
    path = results.runs.out / f"{task.folder}.json"
    path.write_text(path.read_text().replace('"momentum": 0.9', '"momentum": 0.8'))
    with pytest.raises(ConfigError, match=re.escape("momentum was 0.8, now it is 0.9")):
        results.sample(BASE, "vanilla")
