"""Tasks in a folder: trained once, in the bits of one run, gone on with, refused; and their records."""

import io
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_cli import speech  # noqa: F401

from pqk_fast import gpu
from pqk_fast.checkpoint import Checkpoints, load_checkpoint
from pqk_fast.data.load import load_splits
from pqk_fast.experiments.run import new_model, run_recipe, train_stage
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import tasks_of
from pqk_fast.recipe_files import load_recipe
from pqk_fast.settings import ConfigError, to_dict
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.loop import Loop

STAGES = ("vanilla", "phase1", "finetune", "distill", "phase2")
STEPS = {"vanilla": 16, "phase1": 16, "finetune": 8, "distill": 8, "phase2": 8}
# Much is set that some stage does not depend on, and its task leaves out.
SETTINGS = [
    f"stages={STAGES}", "seed=3", "description=all of it", "data.batch_size=8", "pqk.mask_interval=3",
    "phase1.steps=16", "phase1.epoch_steps=6", "phase1.lr_drops=(9,)", "phase1.step_lr_scale=1e-3",
    "phase2.steps=8", "phase2.epoch_steps=3", "phase2.lr=0.05", "phase2.distill_start=3", "phase2.alpha=0.7",
    "finetune.lr=0.02", "distill.co_study=3",
]  # fmt: skip


def recipe(*more):
    return load_recipe("kws-res8-narrow-w4-p90", [*SETTINGS, *more])


TASKS = tasks_of(recipe())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """And plain PyTorch rather than interpreted kernels where the C++ library is switched off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if gpu.interpreted():
            patch.setattr(gpu, "launcher", lambda name: None)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):  # noqa: F811
    """A folder with every task of the recipe; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("tasks")
    Runs(out, speech).train_all(TASKS.values(), console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "tasks")


@pytest.fixture
def trained_steps(monkeypatch):
    """Counts the optimizer steps of each stage; ``stop[stage] = n`` sends SIGTERM in the n-th."""
    counts, train_on = Counter(), Loop._train_on
    counts.stop = {}

    def count(self, step, x, y):
        train_on(self, step, x, y)
        name = self.stage.name
        counts[name] += 1
        if counts.stop.get(name) == counts[name]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "_train_on", count)
    return counts


def outcome(record, stage, checkpoint):
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in record["curves"][stage]]
    prefix = {"phase1": "phase1_", "phase2": "phase2_"}.get(stage, stage)
    results = {name: result for name, result in record["results"].items() if name.startswith(prefix)}
    assert results
    kept = checkpoint["stages"][stage]
    return rows, results, kept["state"], kept["best"]


def outcome_of(out, task):
    record = json.loads((out / f"{task.folder}.json").read_text())
    return outcome(record, task.stage, load_checkpoint(out / task.folder))


def assert_same(actual, expected):
    assert actual[:2] == expected[:2]
    torch.testing.assert_close(actual[2:], expected[2:], rtol=0, atol=0)


def quiet():
    return Console(file=io.StringIO(), width=200, _environ={})


# ---- what is trained


def test_tasks_end_as_the_stages_of_one_run(trained, speech, tmp_path):  # noqa: F811
    """In the same bits: weights, masks, step sizes, curves, accuracies, of the best epochs too."""
    whole = run_recipe(recipe(), load_splits(recipe(), speech), tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    for stage, task in TASKS.items():
        assert_same(outcome_of(trained, task), outcome(whole, stage, checkpoint))
        record = Runs(trained).record(task)
        assert record["task"] == task.key
        assert record["data"] == whole["data"]
        assert record["recipe"] == json.loads(json.dumps(to_dict(task.recipe)))
        assert [*record["curves"]] == [stage]
        assert ("layers" in record) == (stage != "vanilla")
        assert [row["step"] for row in record["curves"][stage]][-1] == STEPS[stage] == task.steps
    assert json.loads((trained / f"{TASKS['phase2'].folder}.json").read_text())["layers"] == whole["layers"]
    assert {path.name for path in trained.iterdir()} == {
        name for task in TASKS.values() for name in (task.folder, f"{task.folder}.json")
    }
    assert all(len(Checkpoints(trained / task.folder).paths()) == 1 for task in TASKS.values())


def test_a_student_of_a_phase_1_that_starts_from_the_plain_network(speech, tmp_path, trained_steps):  # noqa: F811
    made = recipe("phase1_start=vanilla", "stages=('vanilla', 'phase1', 'finetune')")
    tasks, runs = tasks_of(made), Runs(tmp_path / "tasks", speech)
    runs.train_all([tasks["finetune"]], console=quiet())
    assert trained_steps == {stage: STEPS[stage] for stage in tasks}
    whole = run_recipe(made, load_splits(made, speech), tmp_path / "run")
    for stage, task in tasks.items():
        assert_same(outcome_of(runs.out, task), outcome(whole, stage, load_checkpoint(tmp_path / "run")))
    (runs.out / f"{tasks['finetune'].folder}.json").unlink()
    shutil.rmtree(runs.out / tasks["vanilla"].folder)
    assert runs.missing(tasks.values()) == [tasks["vanilla"], tasks["finetune"]], "phase 1 is read by way of it"


def test_what_is_finished_is_not_trained_again(folder, speech, trained_steps):  # noqa: F811
    runs = Runs(folder, speech)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = quiet()
    runs.train_all(TASKS.values(), console=said)
    assert not trained_steps
    assert said.file.getvalue() == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other = tasks_of(recipe("finetune.lr=0.01", "name=other", "description=other"))
    runs.train_all(other.values(), console=said)
    assert trained_steps == {"finetune": STEPS["finetune"]}
    assert f"1/1 {other['finetune'].folder}: " in said.file.getvalue()
    assert outcome_of(folder, other["finetune"])[0] != outcome_of(folder, TASKS["finetune"])[0]


def test_a_task_that_lacks_but_its_record_gets_it_without_training(folder, speech, trained_steps):  # noqa: F811
    """As after an end between the last checkpoint and the record."""
    expected = outcome_of(folder, TASKS["phase2"])
    (folder / f"{TASKS['phase2'].folder}.json").unlink()
    Runs(folder, speech).train_all(TASKS.values(), console=quiet())
    assert not trained_steps
    assert_same(outcome_of(folder, TASKS["phase2"]), expected)


@pytest.mark.parametrize(
    ("records", "checkpoints", "missing"),
    [
        ((), (), ()),
        (("finetune",), (), ("finetune",)),
        (("phase1",), (), ("phase1",)),  # the children have theirs
        ((), STAGES, ()),  # records are enough
        (("phase2",), ("phase1", "vanilla"), ("phase1", "phase2")),
        (("distill",), ("phase1", "vanilla"), ("vanilla", "phase1", "distill")),
        (("distill",), ("vanilla", "phase2"), ("vanilla", "distill")),
        (("vanilla",), ("phase1", "vanilla"), ("vanilla",)),
        (STAGES, (), STAGES),
    ],
)
def test_what_is_missing_in_an_order_in_which_it_can_be_trained(folder, records, checkpoints, missing):
    for stage in records:
        (folder / f"{TASKS[stage].folder}.json").unlink()
    for stage in checkpoints:
        shutil.rmtree(folder / TASKS[stage].folder)
    runs = Runs(folder)
    assert [task.stage for task in runs.missing(TASKS.values())] == list(missing)
    backwards = [task.stage for task in runs.missing(reversed(TASKS.values()))]
    assert sorted(backwards) == sorted(missing)
    for stage in backwards:
        needs = {parent.stage for parent in TASKS[stage].parents} & set(missing)
        assert needs <= set(backwards[: backwards.index(stage)])
    assert runs.missing([TASKS["vanilla"]]) == ([TASKS["vanilla"]] if "vanilla" in records else [])


def test_a_parent_of_which_a_record_is_left_is_trained_again_to_the_same_end(folder, speech, trained_steps):  # noqa: F811
    expected = {stage: outcome_of(folder, TASKS[stage]) for stage in ("phase1", "phase2")}
    (folder / f"{TASKS['phase2'].folder}.json").unlink()
    for stage in expected:
        shutil.rmtree(folder / TASKS[stage].folder)
    Runs(folder, speech).train_all(TASKS.values(), console=quiet())
    assert trained_steps == {stage: STEPS[stage] for stage in expected}
    for stage, whole in expected.items():
        assert_same(outcome_of(folder, TASKS[stage]), whole)


@pytest.mark.parametrize(("stage", "step"), [("vanilla", 5), ("phase1", 13), ("distill", 2), ("phase2", 6)])
def test_an_interrupted_task_goes_on(folder, trained, speech, trained_steps, stage, step):  # noqa: F811
    again = [stage, *(child for child, task in TASKS.items() if TASKS[stage] in task.parents)]
    for name in again:
        shutil.rmtree(folder / TASKS[name].folder)
        (folder / f"{TASKS[name].folder}.json").unlink()
    runs = Runs(folder, speech)
    trained_steps.stop[stage] = step
    with pytest.raises(Interrupted, match=f"{stage} stopped after step {step} of {STEPS[stage]}") as caught:
        runs.train_all(TASKS.values(), console=quiet())
    assert caught.value.signal == signal.SIGTERM
    assert runs.record(TASKS[stage]) is None
    runs.train_all(TASKS.values(), console=quiet())
    assert trained_steps == {name: STEPS[name] for name in again}, "no step twice"
    for name in again:
        assert_same(outcome_of(folder, TASKS[name]), outcome_of(trained, TASKS[name]))


# ---- what is refused


def test_a_record_of_another_recipe_is_refused(folder, speech):  # noqa: F811
    runs, path = Runs(folder, speech), folder / f"{TASKS['phase1'].folder}.json"
    record = json.loads(path.read_text())
    del record["recipe"]["phase1"]["step_lr_rule"], record["recipe"]["distill"]  # settings of a later version
    path.write_text(json.dumps(record))
    assert runs.record(TASKS["phase1"])["task"] == TASKS["phase1"].key
    record["recipe"]["phase1"]["momentum"] = 0.8
    path.write_text(json.dumps(record))
    for use in (lambda: runs.record(TASKS["phase1"]), lambda: runs.train_all([TASKS["phase2"]], console=quiet())):
        with pytest.raises(ConfigError, match=r"phase1.* of another recipe: recipe.phase1.momentum was 0.8, now it"):
            use()


def test_other_data_in_the_same_folder_are_refused(folder, speech, tmp_path, trained_steps):  # noqa: F811
    other = shutil.copytree(speech, tmp_path / "other")
    clip = other / "yes" / "a0_nohash_0.wav"
    clip.write_bytes(clip.read_bytes()[:-2] + b"\x01\x00")  # one sample
    for more in ("seed=4", "data.batch_size=4"):
        vanilla = tasks_of(recipe(more))["vanilla"]
        with pytest.raises(ValueError, match=rf"json was trained on other data than {other} holds: choose"):
            Runs(folder, other).train_all([vanilla], console=quiet())
    assert not trained_steps
    same = shutil.copytree(speech, tmp_path / "same")
    Runs(folder, same).train_all([vanilla], console=quiet())
    different = tasks_of(recipe("data.unknown=0.5"))["vanilla"]
    Runs(folder, other).train_all([different], console=quiet())
    assert trained_steps == {"vanilla": 2 * STEPS["vanilla"]}


def test_classes_that_the_data_do_not_have_are_refused(tmp_path, speech):  # noqa: F811
    with pytest.raises(ConfigError, match=r"data.classes is 5, but speech_commands has 12 classes"):
        Runs(tmp_path, speech).train_all(tasks_of(recipe("data.classes=5")).values(), console=quiet())


# ---- records and networks


def test_a_record_has_the_students_confusion_matrix_and_the_datas_fingerprint(trained, speech, monkeypatch):  # noqa: F811
    record = Runs(trained).record(TASKS["phase2"])
    splits = load_splits(recipe(), speech)
    counts = torch.bincount(torch.cat([y for _, y in splits.testing]), minlength=12)
    assert set(record["results"]) == {"phase2_p", "phase2_f"}
    for result in record["results"].values():
        matrix = torch.tensor(result["confusion"])
        assert torch.equal(matrix.sum(1), counts)
        assert 100.0 * int(matrix.trace()) / int(counts.sum()) == result["last"]["testing"]
    assert record["data"] == {
        "name": "speech_commands", **splits.sizes, "fingerprint": splits.fingerprint, "classes": list(splits.names)
    }  # fmt: skip


def test_with_many_classes_the_record_has_no_confusion_matrix(folder, speech, monkeypatch):  # noqa: F811
    monkeypatch.setattr("pqk_fast.experiments.run.MOST_CLASSES", 11)
    expected = outcome_of(folder, TASKS["vanilla"])[1]["vanilla"]["last"]
    (folder / f"{TASKS['vanilla'].folder}.json").unlink()
    Runs(folder, speech).train_all([TASKS["vanilla"]], console=quiet())
    record = Runs(folder).record(TASKS["vanilla"])
    assert set(record["results"]["vanilla"]) == {"last", "best_dev"}
    assert record["results"]["vanilla"]["last"] == expected
    assert set(record["data"]) == {"name", "train", "validation", "testing", "fingerprint"}


def test_the_testing_split_is_what_results_are_of(speech, tmp_path):  # noqa: F811
    x, y = next(iter(load_splits(recipe(), speech).testing))
    splits = replace(load_splits(recipe(), speech), testing=[(x[:5], y[:5])])
    result = run_recipe(recipe("stages=('vanilla',)"), splits, tmp_path)["results"]["vanilla"]
    assert torch.equal(torch.tensor(result["confusion"]).sum(1), torch.bincount(y[:5], minlength=12))
    assert {result[moment]["testing"] % 20 for moment in ("last", "best_dev")} == {0}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_draw_by_the_seed_what_they_compare_alike(stage):
    """The order of the data, and dropout: vanilla and phase 1 have the same, and what starts from phase 1."""
    told = []

    def runs(train, validation, *teacher):
        told.append((train, validation, teacher, torch.initial_seed()))

    splits = SimpleNamespace(train=lambda seed: seed, validation="validation")
    for seed, rank in ((3, 0), (3, 1), (4, 0)):
        trainer = SimpleNamespace(recipe=recipe(f"seed={seed}"), ranks=SimpleNamespace(rank=rank), **{stage: runs})
        torch.rand(3)
        train_stage(trainer, stage, splits, *(["teacher"] if stage == "distill" else []))
    offset = 0 if stage in ("vanilla", "phase1") else 1
    teacher = ("teacher",) if stage == "distill" else ()
    assert told == [
        (seed, "validation", teacher, seed + 1_000_003 * rank)
        for seed, rank in ((6 + offset, 0), (6 + offset, 1), (8 + offset, 0))
    ]


def test_a_new_network_depends_on_the_seed_alone():
    torch.manual_seed(99)
    first = new_model(recipe()).state_dict()
    torch.rand(5)
    torch.testing.assert_close(new_model(recipe("pqk.bits=8")).state_dict(), first, rtol=0, atol=0)
    assert not torch.equal(new_model(recipe("seed=4")).state_dict()["conv0.weight"], first["conv0.weight"])


def test_a_task_of_another_precision_is_refused(trained, speech):  # noqa: F811
    with pytest.raises(ConfigError, match="was trained in fp32, not in bf16"):
        Runs(trained, speech, precision="bf16").train_all([TASKS["vanilla"]])
