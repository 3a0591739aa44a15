"""A folder of tasks: trains those that are not trained yet, several at once if wished, and reads their records."""

from __future__ import annotations

import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pqk_fast.callbacks import Callback, Row
from pqk_fast.checkpoint import Checkpoints
from pqk_fast.config import DataConfig, Recipe, recipe_from_dict
from pqk_fast.data.load import Splits, load_splits
from pqk_fast.experiments.board import Board
from pqk_fast.experiments.run import check_classes, new_model, record_of, train_stage
from pqk_fast.experiments.tasks import Task
from pqk_fast.record import read_record, write_record
from pqk_fast.settings import ConfigError, to_dict
from pqk_fast.trainer import Trainer
from pqk_fast.training.interrupts import Interrupted, Interrupts
from pqk_fast.training.run_state import first_difference

POLL_SECONDS = 0.2


class TaskError(RuntimeError):
    """A task failed in a process of its own; the message is that process's."""


class Runs:
    """The tasks in a folder: each one's record, and checkpoints from which others start.

    Args:
        out: the folder. Records alone are enough to read from, to train on their parents' checkpoints are needed too.
        data: the folder of the data set.
        device: where to train.
        options: of :class:`~pqk_fast.trainer.Trainer`.
    """

    def __init__(self, out: str | Path, data: str | Path | None = None, device: str = "cpu", **options: Any) -> None:
        self.out, self.device, self.options = Path(out), device, options
        self.data = None if data is None else Path(data)

    def record(self, task: Task) -> dict[str, Any] | None:
        """A trained task's record, None if there is none.

        Raises ConfigError if its recipe is not the task's (the library's defaults have changed since).
        """
        path = self.out / f"{task.folder}.json"
        if not path.exists():
            return None
        record = read_record(path)
        saved = to_dict(recipe_from_dict(record["recipe"]))
        if difference := first_difference(saved, to_dict(task.recipe), "recipe"):
            raise ConfigError(f"{path} is of another recipe: {difference}; move it away, or choose another folder")
        return record

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of the tasks, and of what they start from, that have to be trained, in an order in which they can be.

        A finished task that left nothing but its record has to be trained again if another one starts from it.
        """
        order: dict[str, Task] = {}
        for task in tasks:
            _add(order, task)
        needed: dict[str, Task] = {}
        starts: set[str] = set()  # what those that have to be trained start from, near or far
        for task in reversed(order.values()):
            if self.record(task) is None or (task.key in starts and not self._checkpoints(task).paths()):
                needed[task.key] = task
            if task.key in starts or task.key in needed:
                starts.update(parent.key for parent in task.parents)
        return list(reversed(needed.values()))

    def train(self, task: Task, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train one task, whose parents are trained; or go on where it was interrupted. Writes and gives the record."""
        splits = self.splits(task.recipe)
        trainer = self._trained(task, splits, callbacks)
        record = {**record_of(trainer, splits), "task": task.key}
        write_record(self.out / f"{task.folder}.json", record)
        return record

    def train_all(self, tasks: Iterable[Task], jobs: int = 1, console: Console | None = None) -> None:
        """Train every task that has to be, those first that others start from.

        ``jobs`` at a time, in processes of their own that share the cores evenly; with one job in this process.

        Raises Interrupted after SIGINT or SIGTERM, when all have saved where they stand; with several jobs TaskError if
        a task failed, when those that were running have ended, else its error itself: ValueError if the folder holds
        records of other data. ConfigError if a finished task was trained in another precision.
        """
        tasks = list(tasks)
        self._check_precision(tasks)
        waiting = self.missing(tasks)
        if not waiting:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with Board([(task.folder, task.steps) for task in waiting], console) as board:
            if jobs > 1:
                self._train_many(waiting, jobs, board)
                return
            for task in waiting:
                self.train(task, [Reporter(task.folder, board.take)])

    def _train_many(self, waiting: list[Task], jobs: int, board: Board) -> None:
        context = multiprocessing.get_context("spawn")
        news: Any = context.Queue()
        threads = max(1, torch.get_num_threads() // jobs)
        running: dict[Any, Task] = {}  # by process
        errors: dict[str, str] = {}  # by the task's folder
        try:
            with Interrupts(patient=True) as interrupts:
                while running or (waiting and not errors and interrupts.requested is None):
                    for task in self._ready(waiting, running.values())[: jobs - len(running)]:
                        if not errors and interrupts.requested is None:
                            waiting.remove(task)
                            process = context.Process(target=_work, args=(self, task, threads, news))
                            process.start()
                            running[process] = task
                    if interrupts.requested is not None:
                        for process in running:
                            process.terminate()
                    connection.wait([process.sentinel for process in running], POLL_SECONDS)
                    ended = [process for process in running if not process.is_alive()]
                    _pass_on(news, board, errors)
                    for process in ended:
                        task = running.pop(process)
                        if process.exitcode and interrupts.requested is None:
                            errors.setdefault(task.folder, f"its process ended with {process.exitcode}")
                if interrupts.requested is not None:
                    number, interrupts.requested = interrupts.requested, None
                    raise Interrupted(number, f"stopped; where tasks stand is saved in {self.out}")
        finally:
            for process in running:
                process.terminate()
        if errors:
            raise TaskError("; ".join(f"{folder}: {error}" for folder, error in errors.items()))

    def _check_precision(self, tasks: list[Task]) -> None:
        wanted = self.options.get("precision", "fp32")
        for task in tasks:
            record = self.record(task)
            if record is not None and (found := record.get("options", {}).get("precision", wanted)) != wanted:
                raise ConfigError(
                    f"{task.folder} was trained in {found}, not in {wanted}: choose another folder, or that precision"
                )

    @staticmethod
    def _ready(waiting: list[Task], running: Iterable[Task]) -> list[Task]:
        """Those of the waiting tasks whose parents are trained."""
        undone = {task.key for task in (*waiting, *running)}
        return [task for task in waiting if not undone & {parent.key for parent in task.parents}]

    def splits(self, recipe: Recipe) -> Splits:
        """The data of a task's recipe. ValueError if the folder holds records of other data."""
        splits = _load(recipe.data, self.data, self.device)
        check_classes(recipe, splits)
        for path in self.out.glob("*.json"):
            other = read_record(path)
            same = replace(DataConfig(**other["recipe"]["data"]), batch_size=recipe.data.batch_size) == recipe.data
            if same and other["data"].get("fingerprint") != splits.fingerprint:
                raise ValueError(f"{path} was trained on other data than {self.data} holds: choose another folder")
        return splits

    def _checkpoints(self, task: Task) -> Checkpoints:
        return Checkpoints(self.out / task.folder)

    def _trained(self, task: Task, splits: Splits, callbacks: Sequence[Callback]) -> Trainer:
        parents = [self._trained(parent, splits, ()) for parent in task.parents]
        teacher = parents[1].results[task.parents[1].stage].model if len(parents) > 1 else None
        trainer = Trainer(
            parents[0].results[task.parents[0].stage].model if parents else new_model(task.recipe),
            task.recipe,
            device=self.device,
            out=self.out / task.folder,
            callbacks=callbacks,
            resume=True,
            keep_checkpoints=1,
            **self.options,
        )
        train_stage(trainer, task.stage, splits, teacher)
        return trainer


class Reporter(Callback):
    """Tells ``tell`` of a task's progress: ``(name, steps done, row or None)``, not at every step."""

    def __init__(self, name: str, tell: Callable[[tuple[str, int, Row | None]], object]) -> None:
        self.name, self.tell = name, tell
        self._told = 0.0

    def on_step(self, stage: str, step: int) -> None:
        if time.monotonic() - self._told > POLL_SECONDS:
            self._told = time.monotonic()
            self.tell((self.name, step + 1, None))

    def on_epoch(self, stage: str, row: Row) -> None:
        self.tell((self.name, row["step"], row))


def _work(runs: Runs, task: Task, threads: int, news: Any) -> None:
    """What a process of its own does."""
    torch.set_num_threads(threads)
    try:
        runs.train(task, [Reporter(task.folder, news.put)])
    except Interrupted as interrupt:
        sys.exit(128 + interrupt.signal)
    except Exception as error:
        news.put((task.folder, 0, f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _pass_on(news: Any, board: Board, errors: dict[str, str]) -> None:
    """Give what processes told to the board, and note errors."""
    while True:
        try:
            name, step, what = news.get_nowait()
        except queue.Empty:
            return
        if isinstance(what, str):
            errors[name] = what
        else:
            board.take((name, step, what))


def _add(order: dict[str, Task], task: Task) -> None:
    for parent in task.parents:
        _add(order, parent)
    order.setdefault(task.key, task)


@lru_cache(maxsize=1)
def _load(data: DataConfig, root: Path | None, device: str) -> Splits:
    return load_splits(Recipe(name="data", model="none", data=data), root, device)
