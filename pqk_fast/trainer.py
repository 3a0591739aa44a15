"""Trains a recipe's stages: phase 1, phase 2, and the plain training that vanilla and finetune are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.branches import branch, config_of, pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.config import PhaseConfig, Recipe
from pqk_fast.dual_batch_norm import DualBatchNorm
from pqk_fast.masks import Pruner
from pqk_fast.prepare import param_groups, prepare, start_phase2
from pqk_fast.training.loop import Loop, Stage, StageResult
from pqk_fast.training.metrics import Forward
from pqk_fast.training.objectives import CrossEntropy, MutualDistillation, SeparateTeacher
from pqk_fast.training.ranks import Ranks
from pqk_fast.training.run_state import Options, RunState
from pqk_fast.training.steps import CapturedStep, Step, why_not_captured
from pqk_fast.training.stream import Batches, Stream


class Trainer:
    """Trains one recipe: ``Trainer(model, recipe).fit(train, val)`` runs phase 1 and phase 2.

    Args:
        model: a plain float model; it is prepared in place by phase 1.
        recipe: schedules, options and seed.
        device: where to train.
        out: a run folder. Its ``checkpoints`` hold, of every stage, the best networks and where training stands; they
            are written at every epoch's end, every ``checkpoint_seconds``, and when SIGINT (Ctrl-C) or SIGTERM stops
            the run, which then raises :class:`~pqk_fast.training.interrupts.Interrupted`. Without a folder nothing is
            written.
        callbacks: see :mod:`pqk_fast.callbacks`; called on rank 0.
        resume: go on from the folder's newest whole checkpoint. Call the same methods as before: stages that are
            finished are read, the one that was interrupted goes on. On the CPU, with as many threads, the run ends with
            bit for bit the weights, masks, step sizes, statistics and curves (but for seconds) of an uninterrupted one.
        keep_checkpoints: how many of the newest checkpoints stay.
        precision: "fp32"; or "bf16", "fp16": autocast around forward and loss (fake-quantization stays in fp32), with a
            GradScaler in fp16. Evaluation is in fp32.
        compile: ``torch.compile(fullgraph=True)`` of forward and loss, once a stage.
        capture: whole steps as CUDA graphs; where that cannot be, a warning says why and steps run as ever.
        sync_batch_norm: with many ranks on GPUs, batch statistics over all of them instead of each rank's own.
        recycle_memory: on the CPU, let glibc keep freed memory for the next tensor (see
            :func:`pqk_fast.allocator.recycle_large_tensors`), for the whole process.

    ``train`` and ``val`` are iterables of ``(x [B, ...], labels int64 [B])``, one pass each time they are iterated (a
    DataLoader, or the batch classes of :mod:`pqk_fast.data`). Where torch.distributed is initialized, each rank gives
    batches of its own (the parts of one batch); gradients are averaged, BatchNorm normalizes by each rank's part, and
    rank 0's running statistics count.

    Raises TrainingDivergedError on NaN, FileExistsError for a folder with another run's checkpoints, ConfigError if the
    run that is resumed was another.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        keep_checkpoints: int = 3,
        checkpoint_seconds: float = 60.0,
        precision: str = "fp32",
        compile: bool = False,
        capture: bool = False,
        sync_batch_norm: bool = False,
        recycle_memory: bool = True,
    ) -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.ranks = Ranks()
        self.options = Options(precision, compile, capture, sync_batch_norm, self.ranks.world)
        if sync_batch_norm and self.ranks.world > 1:
            if self.device.type == "cpu":
                raise ValueError("sync_batch_norm needs GPUs (torch's SyncBatchNorm does); leave it out on the CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device)
        self.callbacks = callbacks if self.ranks.main else ()
        self.checkpoint_seconds = checkpoint_seconds
        self.results: dict[str, StageResult] = {}
        self.state = RunState(recipe, self.options, self.ranks, out, keep_checkpoints, resume)
        self._stream: Stream | None = None
        if recycle_memory and self.device.type == "cpu":
            recycle_large_tensors()

    def fit(self, train: Batches, val: Batches | None = None) -> dict[str, StageResult]:
        """Phase 1, then phase 2; ``trainer.model(x)`` is then the student, ``branch`` gives the full net."""
        self.phase1(train, val)
        self.phase2(train, val)
        return self.results

    def vanilla(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Plain fp32 training, with phase 1's schedule unless the recipe gives it another."""
        return self._run(self._plain("vanilla", self.recipe.vanilla or self.recipe.phase1), train, val)

    def phase1(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Iterative pruning and quantization-aware training (Eqs 1-7), of the model as it is."""
        phase = self.recipe.phase1
        if not pqk_layers(self.model):
            self.model = prepare(self.model, self.recipe.pqk)
        elif config_of(self.model) != self.recipe.pqk:
            raise ValueError("the model was prepared with another config than the recipe's: give the plain float model")
        pruner = Pruner(self.model, phase.steps, phase.epoch_steps)
        return self._run(replace(self._plain("phase1", phase), pruner=pruner), train, val)

    def phase2(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Mutual distillation between the student and the full net (Eqs 8-12)."""
        phase = self.recipe.phase2
        model = start_phase2(self.model, phase.step_size)
        objective = MutualDistillation(model, phase, phase.forward).to(self.device)
        views: dict[str, Forward] = {"validation": model}
        if not phase.teacher_rest:  # the full net in the model ends as nobody's teacher
            views["validation_f"] = branch(model, "teacher")
        return self._run(Stage("phase2", phase, model, objective, views), train, val)

    def finetune(self, train: Batches, val: Batches | None = None) -> StageResult:
        """The baseline to phase 2: the same schedule, masks and step sizes, but the student's cross-entropy alone."""
        start_phase2(self.model, self.recipe.phase2.step_size)
        phase = replace(self.recipe.phase2, lr=self.recipe.finetune.lr)
        return self._run(self._plain("finetune", phase), train, val)

    def distill(self, train: Batches, val: Batches | None, teacher: nn.Module) -> StageResult:
        """The baseline to phase 2 with a ``teacher`` of its own, a float model, which is trained no further.

        Masks and step sizes, schedule, alpha, beta and temperature are phase 2's; ``recipe.distill`` says whether a
        copy of the teacher learns for a while. Raises ValueError if it does with many ranks, or captured.
        """
        phase, co_study = self.recipe.phase2, self.recipe.distill.co_study
        if co_study and (self.ranks.world > 1 or self.options.capture):
            raise ValueError("distill.co_study, a teacher that learns for a while, is for one process, not captured")
        model = start_phase2(self.model, phase.step_size)
        teacher = copy.deepcopy(teacher).requires_grad_(co_study > 0)
        objective = SeparateTeacher(model, teacher, phase, co_study).to(self.device)
        return self._run(replace(self._plain("distill", phase), objective=objective), train, val)

    def copy(self) -> Trainer:
        """A trainer that goes on from here with a model of its own (and writes to the same checkpoints)."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    def _plain(self, name: str, phase: PhaseConfig) -> Stage:
        return Stage(
            name, phase, self.model, CrossEntropy(self.model, phase.label_smoothing), {"validation": self.model}
        )

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        phase = stage.phase
        if pqk_layers(stage.model):
            groups = param_groups(
                stage.model, phase.lr, phase.step_lr_scale * phase.lr, phase.weight_decay, phase.step_lr_rule
            )
        else:
            weights = list(stage.model.parameters())
            groups = [{"params": weights, "lr": phase.lr, "weight_decay": phase.weight_decay, "lr_scale": 1.0}]
        if further := stage.objective.further_parameters():
            groups[0]["params"] = [*groups[0]["params"], *further]
        if self.options.capture:
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
        # The fused one takes a third of the time on the CPU, and a rate that is a tensor.
        optimizer = torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, fused=True)
        if phase.momentum:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # It would come from the first gradient, which fp16's GradScaler may refuse.
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _step(self, stage: Stage, before: Step | None = None) -> Step:
        """What trains the stage's model; it goes on with the optimizer of the step ``before``."""
        kind = Step
        if self.options.capture:
            reason = why_not_captured(self.device, stage.pruner, self.ranks.world)
            if reason is None:
                kind = CapturedStep
            else:
                warnings.warn(f"steps of {stage.name} are not captured: {reason}", stacklevel=4)
        if not stage.objective.runs_full_net:
            for module in stage.model.modules():
                if isinstance(module, DualBatchNorm):
                    module.freeze_teacher()
        objective: Any = stage.objective
        if self.options.compile:
            torch.compiler.reset()  # all objectives of a kind share one limit of compilations
            objective = torch.compile(objective, fullgraph=True, dynamic=False)
        objective = self.ranks.wrap(objective)
        optimizer = self._optimizer(stage) if before is None else before.optimizer
        step = kind(objective, optimizer, stage.pruner, self.options.precision, self.device)
        if before is not None:
            step.scaler = before.scaler
        return step

    def _run(self, stage: Stage, train: Batches, val: Batches | None) -> StageResult:
        # The next stage goes on in the pass over the data in which this one ends.
        if self._stream is None or self._stream.batches is not train:
            self._stream = Stream(train)
        loop = Loop(stage, self._stream, val, self.state, self.ranks, self.device, self.callbacks)
        result = loop.run(partial(self._step, stage), self.checkpoint_seconds)
        self.results[stage.name] = result
        return result
