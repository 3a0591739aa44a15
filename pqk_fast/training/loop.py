"""One stage of training, step by step: batches, curves, checkpoints, interrupts, and what goes wrong."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback, Row
from pqk_fast.config import PhaseConfig
from pqk_fast.guards import check_masks, find_problems
from pqk_fast.masks import Pruner
from pqk_fast.ops import NonFiniteWeightError
from pqk_fast.schedule import learning_rate
from pqk_fast.training.averaging import BATCHES, WeightAverage, estimate_batch_norm
from pqk_fast.training.interrupts import Interrupted, Interrupts
from pqk_fast.training.metrics import Forward, accuracy, first_nonfinite, layer_statistics
from pqk_fast.training.objectives import Objective
from pqk_fast.training.random_state import random_state, set_random_state
from pqk_fast.training.ranks import Ranks
from pqk_fast.training.run_state import RunState
from pqk_fast.training.steps import Step
from pqk_fast.training.stream import Batches, Stream

# Reading the loss makes the host wait for a GPU, so there it is looked at only every so often.
GPU_CHECK_STEPS = 32
# Many ranks agree on stopping and saving only every so often.
AGREE_STEPS = 8


class TrainingDivergedError(RuntimeError):
    """NaN or infinity in the loss or the weights: the message names step and layer. Nothing bad was saved."""


@dataclass
class Stage:
    """What one run of the loop trains. ``views`` maps a curve's name to the forward that it measures."""

    name: str
    phase: PhaseConfig
    model: nn.Module
    objective: Objective
    views: dict[str, Forward]
    pruner: Pruner | None = None


@dataclass
class StageResult:
    """What a stage leaves: the model and its views, the curve, and for each view the best epoch's row and state."""

    model: nn.Module
    views: dict[str, Forward]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, tuple[Row, dict[str, Any]]] = field(default_factory=dict)


class Loop:
    """Runs a stage once, from its beginning or from where ``state`` says that it stands."""

    def __init__(
        self,
        stage: Stage,
        stream: Stream,
        val: Batches | None,
        state: RunState,
        ranks: Ranks,
        device: torch.device,
        callbacks: Sequence[Callback],
    ) -> None:
        self.stage, self.stream, self.val = stage, stream, val
        self.state, self.ranks, self.device, self.callbacks = state, ranks, device, callbacks
        self.result = StageResult(stage.model, stage.views)
        self.losses = torch.zeros((), device=device)  # summed since the last epoch's end, this rank's
        self.epoch_start = 0
        self.average = WeightAverage(stage.model) if stage.phase.average_steps else None
        self._check_every = 1 if device.type == "cpu" else GPU_CHECK_STEPS
        self._warned: set[tuple[str, str]] = set()

    def run(self, make_step: Callable[[Step | None], Step], checkpoint_seconds: float) -> StageResult:
        """Train to the stage's end. Raises TrainingDivergedError, or Interrupted after a signal, the state saved.

        ``make_step`` is given the step before when the objective has become another one.
        """
        self.state.begin(self.stage.name)
        saved = self.state.stages.get(self.stage.name)
        position = self.state.position_in(self.stage.name)
        if saved is not None:
            self._take_up(saved)
        if saved is not None and saved["finished"]:
            self.stream.load_state_dict(saved["streams"][self.ranks.rank])
            if position is not None:
                set_random_state(position["ranks"][self.ranks.rank]["random"])
            return self.result
        self._make_step = make_step
        self.step = make_step(None)
        first = 0 if position is None else self._resume(position)
        with Interrupts(enabled=self.state.files is not None, patient=self.ranks.world > 1) as interrupts:
            self._run(first, interrupts, checkpoint_seconds)
        return self.result

    def _run(self, first: int, interrupts: Interrupts, checkpoint_seconds: float) -> None:
        stage, phase = self.stage, self.stage.phase
        self._began = time.perf_counter() - self.result.seconds
        saved_at = time.perf_counter()
        for callback in self.callbacks:
            callback.on_stage_start(stage.name, phase.steps)
            if first:
                callback.on_resume(stage.name, first)
        stage.model.train()
        try:
            for step in range(first, phase.steps):
                try:
                    batch = next(self.stream)
                except RuntimeError:
                    if interrupts.requested is None:
                        raise
                    self._stop_without_data(interrupts, step, first)
                x, y = (t.to(self.device, non_blocking=True) for t in batch)
                if step == first:
                    stage.objective.choose_mode(x)
                    if self.ranks.any(stage.objective.mode == "two_pass")[0]:
                        stage.objective.mode = "two_pass"  # each rank chose by a batch of its own
                self._train_on(step, x, y)
                done = step + 1
                if self.average is not None and done > phase.steps - phase.average_steps:
                    self.average.add()
                    if done == phase.steps:
                        self._take_average()
                for callback in self.callbacks:
                    callback.on_step(stage.name, step)
                ended = done % phase.epoch_steps == 0 or done == phase.steps
                if ended:
                    self._end_epoch(step, x)
                if ended or done % AGREE_STEPS == 0 or self.ranks.world == 1:
                    late = time.perf_counter() - saved_at > checkpoint_seconds
                    stop, save = self.ranks.any(interrupts.requested is not None, late)
                    if ended or stop or (save and self.state.files is not None):
                        self._save(step, x)
                        saved_at = time.perf_counter()
                    if stop:
                        self.ranks.wait()  # or a launcher would end rank 0 while it writes
                        self._stop(interrupts, done)
        finally:
            self.result.seconds = time.perf_counter() - self._began
            for callback in self.callbacks:
                callback.on_stage_end(stage.name, self.result.seconds)

    def _train_on(self, step: int, x: Tensor, y: Tensor) -> None:
        stage = self.stage
        if stage.objective.set_step(step):
            self.step = self._make_step(self.step)
        self.step.set_lr(learning_rate(step, stage.phase))
        check = partial(self._check_loss, step, x) if step % self._check_every == 0 else None
        try:
            due = 0 if stage.pruner is None else stage.pruner.advance()
            self.losses += self.step(x, y, due, check)
            if due and stage.pruner is not None and self.device.type == "cpu":
                stage.pruner.check()  # a GPU is asked at the end of an epoch
        except NonFiniteWeightError as error:
            self._diverged(step, str(error), x)

    def _take_average(self) -> None:
        assert self.average is not None
        self.average.give()
        batches = (next(self.stream) for _ in range(BATCHES))
        estimate_batch_norm(self.stage.objective, ((x.to(self.device), y.to(self.device)) for x, y in batches))

    def _end_epoch(self, step: int, x: Tensor) -> None:
        """Evaluate, keep the best, tell the callbacks."""
        stage, model, result = self.stage, self.stage.model, self.result
        if stage.pruner is not None:
            stage.pruner.check()
        self._check_weights(step, x)
        self.ranks.check_same(model)
        self.ranks.same_buffers(model)
        done = step + 1
        losses = self.ranks.sum(self.losses) / self.ranks.world
        row: Row = {
            "epoch": len(result.rows) + 1,
            "step": done,
            "loss": float(losses) / (done - self.epoch_start),
            "lr": learning_rate(step, stage.phase),
            "seconds": time.perf_counter() - self._began,
        }
        self.losses.zero_()
        self.epoch_start = done
        layers = layer_statistics(model)
        if layers:
            row["sparsity"] = 1 - sum(layer["kept"] for layer in layers) / sum(layer["weights"] for layer in layers)
            for column in ("kept", "step_size", "clipped_fraction"):
                row[column] = [layer[column] for layer in layers]
        # Before the last mask the network is denser than asked for: such an epoch cannot be the best.
        eligible = stage.pruner is None or stage.pruner.finished
        state: dict[str, Any] | None = None
        for view, forward in stage.views.items():
            row[view] = None if self.val is None else accuracy(model, self.val, forward, self.ranks)
            if self.val is None:
                continue
            if eligible and (view not in result.best or row[view] > result.best[view][0][view]):
                state = state or copy_of_state(model)
                result.best[view] = (row, state)
        result.rows.append(row)
        for callback in self.callbacks:
            callback.on_epoch(stage.name, row)

    # -- saving and resuming

    def _save(self, step: int, x: Tensor) -> None:
        """A checkpoint of what is finite: a bad network is never saved."""
        stage, result = self.stage, self.result
        if self.state.files is not None:
            self._check_weights(step, x)
        entry = {
            "prepared": bool(pqk_layers(stage.model)),
            "step": step + 1,
            "finished": step + 1 == stage.phase.steps,
            "rows": list(result.rows),
            "seconds": time.perf_counter() - self._began,
            "state": copy_of_state(stage.model),
            "best": {view: {"epoch": row["epoch"], "state": state} for view, (row, state) in result.best.items()},
        }
        position = {
            "step": step + 1,
            "epoch_start": self.epoch_start,
            "training": self.step.state_dict(),
            "pruner": None if stage.pruner is None else stage.pruner.state_dict(),
            "mode": stage.objective.mode,
            "objective": stage.objective.further_state(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        entry["streams"] = self.ranks.gather(self.stream.state_dict())
        position["ranks"] = self.ranks.gather({"losses": self.losses.cpu(), "random": random_state()})
        self.state.save(stage.name, entry, position)

    def _take_up(self, saved: dict[str, Any]) -> None:
        """The stage's model, curve and best networks as they were saved."""
        self.stage.model.load_state_dict(saved["state"])
        self.result.rows, self.result.seconds = list(saved["rows"]), saved["seconds"]
        for view, best in saved["best"].items():
            self.result.best[view] = (self.result.rows[best["epoch"] - 1], best["state"])

    def _resume(self, position: dict[str, Any]) -> int:
        """Everything else as it was saved; the step to go on with."""
        self.step.load_state_dict(position["training"])
        if self.stage.pruner is not None:
            self.stage.pruner.load_state_dict(position["pruner"])
            check_masks(self.stage.model, fresh=not self.stage.pruner.finished or None)
        self.stage.objective.mode = position["mode"]
        self.stage.objective.load_further_state(position.get("objective", {}))
        if self.average is not None:
            self.average.load_state_dict(position["average"])
        self.epoch_start = position["epoch_start"]
        own = position["ranks"][self.ranks.rank]
        self.losses.copy_(own["losses"])
        self.stream.load_state_dict(self.state.stages[self.stage.name]["streams"][self.ranks.rank])
        set_random_state(own["random"])
        step: int = position["step"]
        return step

    def _stop_without_data(self, interrupts: Interrupts, done: int, first: int) -> NoReturn:
        """The signal was for all of the process group: a DataLoader's workers have ended, and nothing more comes."""
        if done > first and self.ranks.world == 1:
            self._save(done - 1, torch.empty(0, device=self.device))
        self._stop(interrupts, done)

    def _stop(self, interrupts: Interrupts, done: int) -> NoReturn:
        where = f"{self.stage.name} stopped after step {done} of {self.stage.phase.steps}"
        raise Interrupted(interrupts.requested, f"{where}; its checkpoint is {self.state.newest}")

    # -- what goes wrong

    def _check_loss(self, step: int, x: Tensor, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self._diverged(step, f"the loss is {loss.item()}", x)

    def _check_weights(self, step: int, x: Tensor) -> None:
        model = self.stage.model
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in model.parameters()])
        if not bool(finite.all()):
            self._diverged(step, "a weight is NaN or infinite", x)
        if not pqk_layers(model):
            return
        for problem in find_problems(model):
            if problem.fatal:
                self._diverged(step, problem.message, x)
            elif (problem.layer, problem.kind) not in self._warned:
                self._warned.add((problem.layer, problem.kind))
                warnings.warn(f"{self.stage.name}, step {step + 1}: {problem.message}", stacklevel=6)

    def _diverged(self, step: int, what: str, x: Tensor) -> NoReturn:
        stage = self.stage
        where = first_nonfinite(stage.model, x, stage.views.values())
        newest = self.state.newest
        kept = "" if newest is None else f" The last good checkpoint is {newest}."
        raise TrainingDivergedError(
            f"{stage.name} stopped at step {step}: {what}; {where}. Expected finite values: lower the learning rate "
            f"(now {learning_rate(step, stage.phase):g}) or look at the data.{kept}"
        )


def copy_of_state(model: nn.Module) -> dict[str, Any]:
    """The state dict, which training does not change any more."""
    state = model.state_dict()
    return {name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()}
