"""Several tasks at once, in processes of their own: their order, errors and signals, and the bits they end in."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from test_cli import speech  # noqa: F401
from test_runner import SETTINGS, TASKS, assert_same, one_thread, outcome_of, quiet, recipe  # noqa: F401

from pqk_fast.checkpoint import Checkpoints, load_checkpoint
from pqk_fast.experiments import runner
from pqk_fast.experiments.runner import Runs, TaskError
from pqk_fast.experiments.tasks import tasks_of
from pqk_fast.record import write_record
from pqk_fast.settings import to_dict
from pqk_fast.training.interrupts import Interrupted, Interrupts


class Pretend(Runs):
    """Notes when tasks begin and end, and does to each stage what ``acts`` says, instead of training."""

    def __init__(self, out, **acts):
        super().__init__(out)
        self.acts = acts

    def train(self, task, callbacks=()):
        self._note("begin", task)
        callbacks[0].on_step(task.stage, 0)
        self.acts.get(task.stage, lambda: time.sleep(0.02))()
        row = {"epoch": 1, "step": task.steps, "loss": 0.5, "lr": 0.1, "validation": 50.0, "seconds": 1.0}
        callbacks[0].on_epoch(task.stage, row)
        (self.out / task.folder / "checkpoints").mkdir(parents=True)
        (self.out / task.folder / "checkpoints" / "step-000000001.pt").touch()
        record = {"versions": {}, "hardware": {}, "seed": 0, "data": {}, "curves": {}, "results": {}}
        write_record(self.out / f"{task.folder}.json", {**record, "recipe": to_dict(task.recipe)})
        self._note("end", task)

    def _note(self, what, task):
        with (self.out / "log").open("a") as file:
            file.write(f"{what} {task.folder} {torch.get_num_threads()}\n")

    def log(self):
        return [tuple(line.split()[:2]) for line in (self.out / "log").read_text().splitlines()]

    def begun(self):
        return sorted(STAGE_OF[folder] for what, folder in self.log() if what == "begin")


ONE_MORE = tasks_of(recipe("seed=4"))["vanilla"]
STAGE_OF = {task.folder: stage for stage, task in TASKS.items()} | {ONE_MORE.folder: "one more"}


@pytest.fixture
def forked(monkeypatch):
    """Processes that start at once, with what the test has put in place; real ones are spawned."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda kind: fork)


@pytest.mark.parametrize("jobs", [2, 20])
def test_parents_come_first_and_as_many_run_at_once_as_may(forked, tmp_path, jobs):
    tasks = [task for seed in range(2) for task in tasks_of(recipe(f"seed={seed}")).values()]
    runs, said = Pretend(tmp_path, **dict.fromkeys(TASKS, lambda: time.sleep(0.15))), quiet()
    runs.train_all(reversed(tasks), jobs=jobs, console=said)
    log = runs.log()
    assert sorted(log) == sorted((what, task.folder) for task in tasks for what in ("begin", "end")), "each once"
    for task in tasks:
        for parent in task.parents:
            assert log.index(("end", parent.folder)) < log.index(("begin", task.folder))
    at_once = [sum(1 if what == "begin" else -1 for what, _ in log[: i + 1]) for i in range(len(log))]
    assert 2 <= max(at_once) <= jobs
    assert "10/10 " in said.file.getvalue()
    assert len(said.file.getvalue().splitlines()) == 10
    assert runs.missing(tasks) == []


@pytest.mark.parametrize(("threads", "jobs", "each"), [(4, 2, "2"), (5, 2, "2"), (1, 2, "1")])
def test_processes_share_the_threads(forked, tmp_path, threads, jobs, each):
    torch.set_num_threads(threads)
    try:
        Pretend(tmp_path).train_all([TASKS["phase1"]], jobs=jobs, console=quiet())
    finally:
        torch.set_num_threads(1)
    assert {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()} == {each}


def fails():
    raise ValueError("bad luck")


ENDS = [
    (fails, "ValueError: bad luck"),
    (lambda: os._exit(7), "its process ended with 7"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "its process ended with -9"),
    (lambda: sys.exit(143), "its process ended with 143"),
]


@pytest.mark.parametrize(("act", "message"), ENDS)
def test_a_failed_task_is_told_when_those_beside_it_have_ended(forked, tmp_path, act, message):
    runs = Pretend(tmp_path, vanilla=act, phase1=lambda: time.sleep(0.3))
    with pytest.raises(TaskError) as error:
        runs.train_all([*TASKS.values(), ONE_MORE], jobs=2, console=quiet())
    assert str(error.value) == f"{TASKS['vanilla'].folder}: {message}"
    assert runs.begun() == ["phase1", "vanilla"], "nothing was begun after it"
    assert runs.record(TASKS["phase1"]) is not None
    again = Pretend(tmp_path)
    again.train_all(TASKS.values(), jobs=2, console=quiet())
    assert Counter(again.begun()) == {"vanilla": 2, "phase1": 1, "finetune": 1, "distill": 1, "phase2": 1}


def test_every_failed_task_is_told(forked, tmp_path):
    runs = Pretend(tmp_path, vanilla=lambda: (time.sleep(0.2), fails()), phase1=fails)
    with pytest.raises(TaskError) as error:
        runs.train_all(TASKS.values(), jobs=2, console=quiet())
    told = {f"{TASKS[stage].folder}: ValueError: bad luck" for stage in ("vanilla", "phase1")}
    assert set(str(error.value).split("; ")) == told


def children() -> set[multiprocessing.process.BaseProcess]:
    return set(multiprocessing.active_children())


def saves_when_asked(seconds=0.2):
    with Interrupts() as interrupts:
        deadline = time.monotonic() + 20
        while interrupts.requested is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(seconds)  # while it saves, it is asked again
        number, interrupts.requested = interrupts.requested, None
    raise Interrupted(number, "saved")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_that_run_and_nothing_more_begins(forked, tmp_path, monkeypatch, number):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    parent = os.getpid()

    def asks():
        os.kill(parent, number)
        saves_when_asked()

    before, others = signal.getsignal(number), children()
    runs = Pretend(tmp_path, vanilla=asks, phase1=lambda: saves_when_asked(0.5))
    with pytest.raises(Interrupted, match="stopped; where tasks stand is saved in") as caught:
        runs.train_all([*TASKS.values(), ONE_MORE], jobs=2, console=quiet())
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert runs.begun() == ["phase1", "vanilla"]
    assert not children() - others


def test_what_goes_wrong_here_leaves_no_process_behind(forked, tmp_path, monkeypatch):
    def stays():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (tmp_path / "ready").touch()
        time.sleep(60)

    def take(self, news):
        while not (tmp_path / "ready").exists():
            time.sleep(0.005)
        raise RuntimeError("no terminal")

    monkeypatch.setattr(runner.Board, "take", take)
    others = children()
    with pytest.raises(RuntimeError, match="no terminal"):
        Pretend(tmp_path, phase1=stays).train_all([TASKS["phase1"]], jobs=2, console=quiet())
    for process in children() - others:
        process.join(5)
    assert not children() - others


LONG = ["phase1.steps=100", "phase1.epoch_steps=10", "phase2.steps=60", "phase2.epoch_steps=5", "pqk.mask_interval=7"]
PROGRAM = """
import signal, sys
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import tasks_of
from pqk_fast.recipe_files import load_recipe
from pqk_fast.training.interrupts import Interrupted
out, data, *settings = sys.argv[1:]
tasks = tasks_of(load_recipe("kws-res8-narrow-w4-p90", settings))
try:
    Runs(out, data).train_all([tasks["finetune"], tasks["distill"]], jobs=2)
except Interrupted as interrupt:
    sys.exit(128 + interrupt.signal)
"""


@pytest.mark.slow
def test_two_processes_that_were_stopped_end_as_one_that_was_not(speech, tmp_path):  # noqa: F811
    """SIGTERM while two tasks are being trained, and again while their children are."""
    tasks = tasks_of(recipe(*LONG))
    whole, out = Runs(tmp_path / "whole", speech), tmp_path / "stopped"
    whole.train_all([tasks["finetune"], tasks["distill"]], console=quiet())
    command = [sys.executable, "-c", PROGRAM, str(out), str(speech), *SETTINGS, *LONG]
    # a thread for each process, and what one_thread says
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TRITON_INTERPRET": "0"}

    def start():
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )  # fmt: skip

    stopped = 0
    for stages in (("vanilla", "phase1"), ("finetune", "distill")):
        process = start()
        while process.poll() is None and not all(Checkpoints(out / tasks[s].folder).paths() for s in stages):
            time.sleep(0.002)
        process.terminate()
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 128 + signal.SIGTERM, said
        kept = [load_checkpoint(out / tasks[stage].folder)["stages"][stage] for stage in stages]
        stopped += sum(not entry["finished"] for entry in kept)
    assert stopped >= 2, "a task that has ended cannot be stopped"
    process = start()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for stage in ("vanilla", "phase1", "finetune", "distill"):
        assert_same(outcome_of(out, tasks[stage]), outcome_of(whole.out, tasks[stage]))
        assert Runs(out).record(tasks[stage])["hardware"]["threads"] == 1, "they share the two"
