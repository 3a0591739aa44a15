"""The training loop: phase 1, phase 2, and the plain training that vanilla and finetune are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast.branches import branch, config_of, dual_forward, pqk_layers
from pqk_fast.callbacks import Callback, Row
from pqk_fast.checkpoint import save_checkpoint
from pqk_fast.config import PhaseConfig, Recipe, to_dict
from pqk_fast.losses import MutualDistillationLoss
from pqk_fast.masks import Pruner
from pqk_fast.ops import NonFiniteWeightError
from pqk_fast.prepare import param_groups, prepare, start_phase2
from pqk_fast.reference import levels, scaled
from pqk_fast.schedule import learning_rate

Batches = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[Tensor], Tensor]

# Reading the loss makes the host wait for a GPU, so there it is looked at only every so often.
GPU_CHECK_STEPS = 32


class TrainingDivergedError(RuntimeError):
    """NaN or infinity in the loss or the weights: the message names step and layer. Nothing bad was saved."""


def layer_statistics(model: nn.Module) -> list[dict[str, Any]]:
    """For each PQK layer: name, shape, weights, kept, step size (mean over channels), clipped fraction of kept ones.

    Layers that share one weight appear once, by the first's name.
    """
    rows = []
    seen: set[int] = set()
    with torch.no_grad():
        for name, layer in pqk_layers(model).items():
            if id(layer.weight) in seen:
                continue
            seen.add(id(layer.weight))
            kept = int(layer.weight_mask.sum())
            outside = scaled(layer.weight, layer.weight_mask, layer.weight_step).abs() > levels(layer.bits)
            rows.append(
                {
                    "name": name,
                    "shape": list(layer.weight.shape),
                    "weights": layer.weight.numel(),
                    "kept": kept,
                    "step_size": float(layer.weight_step.mean()),
                    "clipped_fraction": int(outside.sum()) / kept if kept else 0.0,
                }
            )
    return rows


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, forward: Forward | None = None) -> float:
    """Percent of samples whose largest logit is the label's; ``model`` is in evaluation mode for it.

    ``forward`` defaults to the model itself. Raises ValueError if ``batches`` is empty.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    right, total = torch.zeros((), dtype=torch.long, device=device), 0
    try:
        model.eval()
        for x, y in batches:
            logits = (forward or model)(x.to(device))
            right += (logits.argmax(-1) == y.to(device)).sum()
            total += y.numel()
    finally:
        for module, training in modes:
            module.training = training
    if not total:
        raise ValueError("nothing to evaluate: the batches are empty")
    return 100.0 * int(right) / total


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ValueError("the training data gives no batch: is the set smaller than one batch, or exhausted?")


def _first_nonfinite(model: nn.Module, x: Tensor, forwards: Iterable[Forward]) -> str:
    """Where NaN or infinity enters: a weight, the input, or the first module whose output holds one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name!r} is not finite"
    if not torch.isfinite(x).all():
        return "the input batch is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            for forward in forwards:
                forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return f"layer {found[0]!r} gives the first output that is not finite" if found else "the loss itself is not finite"


@dataclass
class _Stage:
    """One run of the loop. ``views`` maps a curve's name to the forward that it measures."""

    name: str
    phase: PhaseConfig
    model: nn.Module
    loss: Callable[[Tensor, Tensor, int], Tensor]
    views: dict[str, Forward]
    pruner: Pruner | None = None


@dataclass
class StageResult:
    """What a stage leaves: the model and its views, the curve, and for each view the best epoch's row and state."""

    model: nn.Module
    views: dict[str, Forward]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, tuple[Row, dict[str, Tensor]]] = field(default_factory=dict)


class Trainer:
    """Trains one recipe: ``Trainer(model, recipe).fit(train, val)`` runs phase 1 and phase 2.

    Args:
        model: a plain float model; it is prepared in place by phase 1.
        recipe: schedules, options and seed.
        device: where to train.
        out: a folder; after every epoch its ``checkpoint.pt`` holds the last good state of every stage.
        callbacks: see :mod:`pqk_fast.callbacks`.

    ``train`` and ``val`` are iterables of ``(x [B, ...], labels int64 [B])``, one pass each time they are iterated (a
    DataLoader, or the batch classes of :mod:`pqk_fast.data`). Raises :class:`TrainingDivergedError` on NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model = model.to(device)
        self.recipe = recipe
        self.device = torch.device(device)
        self.checkpoint = None if out is None else Path(out) / "checkpoint.pt"
        self.callbacks = callbacks
        self.results: dict[str, StageResult] = {}
        self._saved: dict[str, dict[str, Any]] = {}

    def fit(self, train: Batches, val: Batches | None = None) -> dict[str, StageResult]:
        """Phase 1, then phase 2; ``trainer.model(x)`` is then the student, ``branch`` gives the full net."""
        self.phase1(train, val)
        self.phase2(train, val)
        return self.results

    def vanilla(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Plain fp32 training with phase 1's schedule."""
        return self._run(self._plain("vanilla", self.recipe.phase1), train, val)

    def phase1(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Iterative pruning and quantization-aware training from scratch (Eqs 1-7)."""
        phase = self.recipe.phase1
        if not pqk_layers(self.model):
            self.model = prepare(self.model, self.recipe.pqk)
        elif config_of(self.model) != self.recipe.pqk:
            raise ValueError("the model was prepared with another config than the recipe's: give the plain float model")
        pruner = Pruner(self.model, phase.steps, phase.epoch_steps)
        return self._run(replace(self._plain("phase1", phase), pruner=pruner), train, val)

    def phase2(self, train: Batches, val: Batches | None = None) -> StageResult:
        """Mutual distillation between the student and the full net (Eqs 8-12)."""
        phase, model = self.recipe.phase2, self.model
        start_phase2(model)
        mutual = MutualDistillationLoss(phase.alpha, phase.beta, phase.temperature).to(self.device)

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            if step in (0, phase.distill_start):
                warm_up = step < phase.distill_start
                mutual.set_weights(*((1.0, 0.0) if warm_up else (phase.alpha, phase.beta)))
            student, teacher = dual_forward(model, x, phase.forward)
            total: Tensor = mutual(student, teacher, y)
            return total

        views: dict[str, Forward] = {"validation": model, "validation_f": branch(model, "teacher")}
        return self._run(_Stage("phase2", phase, model, loss, views), train, val)

    def finetune(self, train: Batches, val: Batches | None = None) -> StageResult:
        """The baseline to phase 2: the same schedule, masks and step sizes, but the student's cross-entropy alone."""
        start_phase2(self.model)
        phase = replace(self.recipe.phase2, lr=self.recipe.finetune.lr)
        return self._run(self._plain("finetune", phase), train, val)

    def copy(self) -> Trainer:
        """A trainer that goes on from here with a model of its own (and writes to the same checkpoint)."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    def _plain(self, name: str, phase: PhaseConfig) -> _Stage:
        model = self.model

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            return F.cross_entropy(model(x), y)

        return _Stage(name, phase, model, loss, {"validation": model})

    def _optimizer(self, stage: _Stage) -> torch.optim.Optimizer:
        phase = stage.phase
        if pqk_layers(stage.model):
            groups = param_groups(stage.model, phase.lr, phase.step_lr_scale * phase.lr, phase.weight_decay)
        else:
            weights = list(stage.model.parameters())
            groups = [{"params": weights, "lr": phase.lr, "weight_decay": phase.weight_decay, "lr_scale": 1.0}]
        return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum)

    def _run(self, stage: _Stage, train: Batches, val: Batches | None) -> StageResult:
        phase, model = stage.phase, stage.model
        optimizer = self._optimizer(stage)
        check_every = 1 if self.device.type == "cpu" else GPU_CHECK_STEPS
        result = StageResult(model, stage.views)
        losses = torch.zeros((), device=self.device)
        stream = _endless(train)
        started, epoch_start = time.perf_counter(), 0
        for callback in self.callbacks:
            callback.on_stage_start(stage.name, phase.steps)
        model.train()
        try:
            for step in range(phase.steps):
                x, y = (t.to(self.device, non_blocking=True) for t in next(stream))
                lr = learning_rate(step, phase)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                loss = stage.loss(x, y, step)
                if step % check_every == 0 and not torch.isfinite(loss):
                    self._diverged(stage, step, f"the loss is {loss.item()}", x)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if stage.pruner is not None:
                    try:
                        stage.pruner.step()
                    except NonFiniteWeightError as error:
                        self._diverged(stage, step, str(error), x)
                losses += loss.detach()
                for callback in self.callbacks:
                    callback.on_step(stage.name, step)
                if (step + 1) % phase.epoch_steps == 0 or step + 1 == phase.steps:
                    row: Row = {
                        "epoch": len(result.rows) + 1,
                        "step": step + 1,
                        "loss": float(losses) / (step + 1 - epoch_start),
                        "lr": lr,
                        "seconds": time.perf_counter() - started,
                    }
                    losses.zero_()
                    epoch_start = step + 1
                    self._end_epoch(stage, row, x, val, result)
        finally:
            result.seconds = time.perf_counter() - started
            for callback in self.callbacks:
                callback.on_stage_end(stage.name, result.seconds)
        self.results[stage.name] = result
        return result

    def _end_epoch(self, stage: _Stage, row: Row, x: Tensor, val: Batches | None, result: StageResult) -> None:
        """Evaluate, keep the best, save the last good state, tell the callbacks."""
        model = stage.model
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            self._diverged(stage, row["step"] - 1, "a weight is NaN or infinite", x)
        layers = layer_statistics(model)
        if layers:
            row["sparsity"] = 1 - sum(layer["kept"] for layer in layers) / sum(layer["weights"] for layer in layers)
            for column in ("kept", "step_size", "clipped_fraction"):
                row[column] = [layer[column] for layer in layers]
        # Before the last mask the network is denser than asked for: such an epoch cannot be the best.
        eligible = stage.pruner is None or stage.pruner.finished
        state: dict[str, Tensor] | None = None
        for view, forward in stage.views.items():
            row[view] = None if val is None else accuracy(model, val, forward)
            if val is None:
                continue
            if eligible and (view not in result.best or row[view] > result.best[view][0][view]):
                state = state or {name: tensor.clone() for name, tensor in model.state_dict().items()}
                result.best[view] = (row, state)
        result.rows.append(row)
        self._saved[stage.name] = {
            "prepared": bool(layers),
            "step": row["step"],
            "state": state or {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "best": {view: {"epoch": r["epoch"], "state": s} for view, (r, s) in result.best.items()},
        }
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, {"recipe": to_dict(self.recipe), "stages": self._saved})
        for callback in self.callbacks:
            callback.on_epoch(stage.name, row)

    def _diverged(self, stage: _Stage, step: int, what: str, x: Tensor) -> None:
        where = _first_nonfinite(stage.model, x, stage.views.values())
        kept = ""
        if self.checkpoint is not None and self.checkpoint.is_file():
            kept = f" The last good checkpoint is {self.checkpoint}."
        raise TrainingDivergedError(
            f"{stage.name} stopped at step {step}: {what}; {where}. Expected finite values: lower the learning rate "
            f"(now {learning_rate(step, stage.phase):g}) or look at the data.{kept}"
        )
