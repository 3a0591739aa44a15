"""Accuracy against bytes: which tasks, which students are worth training, the page, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cases import package
from test_cli import speech  # noqa: F401
from test_reproduce import write

from pqk_fast import cli
from pqk_fast.experiments import pareto
from pqk_fast.experiments.pareto import Point
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import Task
from pqk_fast.settings import ConfigError

TINY = ["phase1.epoch_steps=2", "data.batch_size=8", "pqk.mask_interval=1"]


def point(size: int, *accuracies: float, bits: int = 4) -> Point:
    return Point("res8_narrow", bits, 0.9, size, dict(enumerate(accuracies)))


def test_students_start_from_one_dense_network_of_a_model_and_seed() -> None:
    tasks = pareto.plan(["res8_narrow", "res8"], [2, 4], [0.5, 0.9], 300, 900, 2, ["data.unknown=1.0"])
    assert len({task.key for task in tasks}) == 2 * 2 * 2 * 2
    assert {(task.stage, task.steps) for task in tasks} == {("phase1", 300)}
    dense = {parent.key: parent for task in tasks for parent in task.parents}
    assert {(task.stage, task.recipe.model, task.recipe.seed, task.steps) for task in dense.values()} == {
        ("vanilla", model, seed, 900) for model in ("res8_narrow", "res8") for seed in (0, 1)
    }
    assert all(parent.recipe.vanilla.lr_schedule == "cosine" for parent in dense.values())
    assert all(task.recipe.data.unknown == 1.0 for task in tasks)


def test_the_front_is_what_none_with_as_few_bytes_beats() -> None:
    small, better, worse, same, best = (
        point(100, 70, 72),
        point(200, 80),
        point(300, 75),
        point(300, 80),
        point(300, 85),
    )
    assert pareto.front([best, same, worse, better, small]) == [small, better, best]
    assert pareto.best_within([best, worse, small], 299) == small
    assert pareto.best_within([best, worse, small], 300) == best
    with pytest.raises(ValueError, match="at most 99 bytes: the smallest has 100"):
        pareto.best_within([best, small], 99)
    with pytest.raises(ValueError, match="none is trained yet"):
        pareto.best_within([], 99)


def test_each_student_is_planned_once() -> None:
    tasks = pareto.plan(["res8", "res8"], [4, 2, 4], [0.5, 0.5], 300, 900, 1)
    assert [task.recipe.pqk.bits for task in tasks] == [4, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["phase1.steps=3"], "--set phase1.steps=3: phase1.steps is each point's own, use --steps"),
        (["vanilla.lr=0.1"], "--set vanilla.lr=0.1: vanilla is each point's own, use --dense-steps, and phase1 for"),
        (["data.unknown=1.0", "seed=1"], "--set seed=1: seed is each point's own, use --seeds"),
        (["stages=['vanilla']"], "use `pqk-fast train` for other stages"),
    ],
)
def test_what_the_commands_options_say_cannot_be_set_otherwise(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        pareto.plan(["res8"], [2], [0.5], 300, 900, 1, settings)


def test_bits_that_cannot_be_packed_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"bits must be an integer in 2\.\.8, got 32"):
        pareto.plan(["res8"], [4, 32], [0.5], 300, 900, 1)


def test_mixed_bits_are_chosen_on_the_student_of_most_bits() -> None:
    tasks = pareto.plan(["res8_narrow"], [2, 8, 4], [0.5, 0.9], 300, 900, 2)
    pairs = list(pareto.with_most_bits(tasks))
    assert len(pairs) == 2 * 2 * 2
    for task, source in pairs:
        assert task.recipe.pqk.bits in (2, 4)
        assert source.recipe == replace(task.recipe, pqk=replace(task.recipe.pqk, bits=8))
    mixed = pareto.with_layer_bits(pairs[0][0], {"conv1": 8})
    assert mixed.recipe.pqk.layer_bits == {"conv1": 8}
    assert mixed.key != pairs[0][0].key
    assert mixed.parents == pairs[0][0].parents


def test_mixed_bits_against_uniform_ones(tmp_path: Path) -> None:
    chosen = Point("res8_narrow", 2, 0.9, 99, {0: 75, 1: 76}, {"conv0": 4, "conv1": 2, "conv2": 4})
    points = [point(100, 70, 72, bits=2), point(200, 80, 80), chosen]
    assert points[2].name == "res8_narrow, mixed, as 2 bits, 90 % sparse"
    record = pareto.as_json(points, {}, {"steps": 300, "command": "pqk-fast pareto"})
    page, _ = pareto.make_page(json.loads(json.dumps(record))).write(tmp_path, "pareto")
    text = page.read_text(encoding="utf-8")
    row = "| res8_narrow | 90 % | 2 | 71.0 ± 1.4 | 100 | 75.5 ± 0.7 | 99 | +4.5 ± 0.7 | 2 |"
    assert row in text[text.index("Bits chosen for each layer") :]
    assert f"- {chosen.name}: 4 bits for conv0, conv2; 2 bits for conv1." in text


def test_the_page_tells_what_records_say(tmp_path: Path) -> None:
    package("matplotlib")
    runs = Runs(tmp_path / "records")
    tasks = pareto.plan(["res8_narrow"], [2, 4], [0.5, 0.9], 300, 900, 2)
    for task in tasks:
        recipe = task.recipe
        for one in (*task.parents, task):
            write(runs, one, 10, 91.0 if one in task.parents else 70 + 4 * recipe.pqk.bits + recipe.seed)
    untrained = pareto.plan(["res8"], [2], [0.5], 300, 900, 1)

    def size_of(task: Task) -> int:
        return int(1000 * (1 - task.recipe.pqk.sparsity)) + task.recipe.seed

    points = list(pareto.points_of(runs, [*tasks, *untrained], size_of))
    assert [(one.bits, one.bytes, one.sample.text()) for one in points] == [
        (2, 501, "78.5 ± 0.7"), (2, 100, "78.5 ± 0.7"), (4, 501, "86.5 ± 0.7"), (4, 100, "86.5 ± 0.7")
    ]  # fmt: skip
    about = {"steps": 300, "command": "pqk-fast pareto --data DIR"}
    record = json.loads(json.dumps(pareto.as_json(points, pareto.dense_of(runs, tasks), about)))
    assert pareto.from_json(record)[0] == points
    markdown, page = pareto.make_page(record).write(tmp_path, "pareto")
    text = markdown.read_text(encoding="utf-8")
    worth = text[text.index("## Worth training") : text.index("## All of them")]
    assert worth.count("| res8_narrow |") == 1
    assert "| res8_narrow | 4 | 90 % | 100 | 86.5 ± 0.7 | 2 |" in worth
    assert "res8_narrow, dense, 32 bits: 91.0 ± 0.0 (seeds: 2)." in text
    assert (tmp_path / "pareto" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<img" in page.read_text(encoding="utf-8")


def test_the_command_trains_what_is_missing(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    out = tmp_path / "out"
    command = ["pareto", "--models", "res8_narrow", "--bits", "2", "4", "--sparsities", "0.9", "--steps", "4"]
    command += ["--dense-steps", "2", "--out", str(out), *(word for one in TINY for word in ("--set", one))]
    assert cli.main(command) != 0
    assert "has none of these 2 students yet: give --data" in capsys.readouterr().err
    assert cli.main([*command, "--data", str(speech), "--device", "cpu", "--jobs", "1", "--bytes", "5000"]) == 0
    said = capsys.readouterr().out
    assert "for 5,000 bytes: res8_narrow, " in said
    record = json.loads((out / "pareto.json").read_text())
    assert [(one["bits"], one["sparsity"]) for one in record["points"]] == [(2, 0.9), (4, 0.9)]
    assert 0 < record["points"][0]["bytes"] < record["points"][1]["bytes"] < 5000
    trained = out / "runs"
    assert len(list(trained.glob("*-vanilla-*.json"))) == 1
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*.json")}
    assert cli.main(command) == 0  # without the data it reads
    assert {path: path.stat().st_mtime_ns for path in trained.glob("*.json")} == before
    capsys.readouterr()
    assert cli.main([*command, "--sparsities", "0.9", "0.95"]) == 0
    assert "2 of 4 are not trained yet" in capsys.readouterr().out
    more = [*command, "--bits", "4", "--sparsities", "0.9", "0.95", "--data", str(speech), "--jobs", "1"]
    assert cli.main([*more, "--device", "cpu"]) == 0
    assert set(before) < set(trained.glob("*.json"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    assert cli.main([*command, "--mixed"]) != 0
    assert "has no sensitivity of [2, 4] bits yet: give --data" in capsys.readouterr().err
    mixed = [*command, "--bits", "2", "3", "4", "--mixed"]
    assert cli.main([*mixed, "--data", str(speech), "--device", "cpu", "--jobs", "1"]) == 0
    assert cli.main(mixed) == 0
    both = json.loads((out / "pareto.json").read_text())["points"]
    assert [(one["bits"], bool(one["layer_bits"])) for one in both] == [
        (2, False), (3, False), (4, False), (3, True)
    ]  # fmt: skip
    assert both[3]["bytes"] < both[2]["bytes"]
    (out / "pareto.md").unlink()
    assert cli.main([*command, "--bytes", "10"]) != 0
    assert (out / "pareto.md").is_file()
    assert "no student's file has at most 10 bytes" in capsys.readouterr().err
