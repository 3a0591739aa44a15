"""Both phases in PyTorch Lightning: a callback each.

Importing this module imports Lightning (the extra ``pqk-fast[lightning]``); nothing else in the library does.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(f"pqk_fast.lightning needs Lightning ({error}): pip install 'pqk-fast[lightning]'") from error

from pqk_fast.branches import require_prepared
from pqk_fast.config import PHASE2_STEPS
from pqk_fast.losses import DistillationLoss
from pqk_fast.masks import Pruner, keep_steps_positive
from pqk_fast.prepare import start_phase2
from pqk_fast.settings import check_choice


class _PhaseCallback(Callback):
    phase: int

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before optimizer states are restored, which do not fit those of the other phase."""
        layers = require_prepared(pl_module).values()
        if any(layer.phase != self.phase for layer in layers):
            raise ValueError(
                f"{type(self).__name__} cannot go on from {trainer.ckpt_path}, a checkpoint of phase "
                f"{3 - self.phase}: give one of phase {self.phase}, or load its weights "
                f"({type(pl_module).__name__}.load_from_checkpoint) and fit without ckpt_path"
            )


class Phase1Callback(_PhaseCallback):
    """Phase 1: runs a :class:`pqk_fast.Pruner` in ``Trainer(callbacks=[Phase1Callback()]).fit(module, loader)``.

    The module calls :func:`pqk_fast.prepare` on its network in ``__init__`` (so that its checkpoints load anywhere) and
    gives its optimizer :func:`pqk_fast.param_groups`. One step of the Pruner follows each optimizer step, whatever
    ``accumulate_grad_batches`` is; a step that fp16's GradScaler skips counts, or the schedule would not be done when
    training is. ``sparsity`` is logged each epoch. Checkpoints hold the schedule's position: with the same Trainer
    settings, ``fit(ckpt_path=...)`` goes on with the masks that an uninterrupted run would have. A network is as sparse
    as asked for only once training is over: save the last one, not the best on validation before it.

    Args:
        steps: optimizer steps of the phase; by default ``trainer.estimated_stepping_batches``.
        epoch_steps: optimizer steps of an epoch, the clock of Eq. 1; by default those of a pass over the loader.

    Raises, when training starts: ValueError for an unprepared module, one in phase 2, several optimizers, a length of
    training that only ``steps`` and ``epoch_steps`` can tell, a checkpoint without the callback's state or with another
    schedule. Warns of step sizes that learn at the weights' rate and of training that ends before its last mask.
    """

    phase = 1

    def __init__(self, steps: int | None = None, epoch_steps: int | None = None) -> None:
        self.steps = steps
        self.epoch_steps = epoch_steps
        self.pruner: Pruner | None = None
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict() if self.pruner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        layers = require_prepared(pl_module).values()
        self._check_optimizers(trainer, {layer.weight_step for layer in layers})
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches if not self.epoch_steps else 0
        epoch_steps = _known("epoch_steps", self.epoch_steps or per_epoch)
        steps = _known("steps", self.steps or trainer.estimated_stepping_batches)
        state, self._loaded = self._loaded or self.state_dict(), {}
        self.pruner = Pruner(pl_module, steps, epoch_steps)
        if trainer.global_step:
            if not state:
                raise ValueError(
                    f"training goes on at step {trainer.global_step}, but the checkpoint holds no state of "
                    "Phase1Callback: give one that was written with it, or load the weights alone and fit from step 0"
                )
            self.pruner.load_state_dict(state)
        self._follow(trainer)

    @staticmethod
    def _check_optimizers(trainer: Any, step_sizes: set[Any]) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"phase 1 counts the steps of one optimizer, the module has {len(trainer.optimizers)}: give all "
                "parameters to one, or run a pqk_fast.Pruner in training_step yourself"
            )
        for group in trainer.optimizers[0].param_groups:
            parameters = set(group["params"])
            if step_sizes & parameters and parameters - step_sizes:
                warnings.warn(
                    "the step sizes are in one parameter group with other parameters, so they learn at the same rate, "
                    "which is far too fast: give the optimizer pqk_fast.param_groups(self, lr)",
                    stacklevel=2,
                )

    def _follow(self, trainer: Any) -> None:
        assert self.pruner is not None
        while self.pruner.iteration < trainer.global_step:
            self.pruner.step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._follow(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.pruner is not None:
            pl_module.log("sparsity", self.pruner.sparsity(), sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.pruner is not None and not self.pruner.finished:
            warnings.warn(
                f"training ends at step {self.pruner.iteration} of {self.pruner.steps}, before the last mask: the "
                f"network is {100 * self.pruner.sparsity():.1f} % sparse, less than was asked for; go on with "
                "fit(ckpt_path=...), or give Phase1Callback(steps=...) the steps there are",
                stacklevel=2,
            )


class Phase2Callback(_PhaseCallback):
    """Phase 2 in a ``fit`` of its own, with the module that phase 1 has trained (or its checkpoint's).

    Calls :func:`pqk_fast.start_phase2` before the optimizers are made, unless the module is in phase 2. Its
    ``training_step`` is now to distil::

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss(*pqk_fast.dual_forward(self.net, x), y)    # self.loss = MutualDistillationLoss()

    With ``fit(ckpt_path=...)`` the phase, masks and step sizes come from the checkpoint.

    Args:
        distill_start: optimizer steps of warm-up, in which every MutualDistillationLoss of the module has the weights 1
            and 0 (cross-entropy alone), and ``alpha`` and ``beta`` afterwards. None leaves the losses as they are.
        alpha, beta: the weights of cross-entropy and distillation after the warm-up.
        step_size: "frozen" or "learned", see :func:`pqk_fast.start_phase2`; None leaves what it was told (frozen).

    Raises ValueError for an unprepared module, one of which nothing is pruned, a checkpoint of phase 1, and
    ``distill_start`` where the module has no such loss.
    """

    phase = 2

    def __init__(
        self,
        distill_start: int | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        step_size: str | None = None,
    ) -> None:
        if step_size is not None:
            check_choice("step_size", step_size, PHASE2_STEPS)
        self.distill_start = distill_start
        self.alpha = alpha
        self.beta = beta
        self.step_size = step_size

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        layers = require_prepared(pl_module).values()
        if stage != "fit":
            return
        if all(layer.weight_mask.all() for layer in layers):
            # A new module, of which nothing is pruned, can only be one that a checkpoint brings into phase 2.
            for layer in layers:
                layer.set_phase2_step(self.step_size or layer.phase2_step)
        else:
            self._start(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(pl_module)  # raises for a new module that no checkpoint has changed

    def _start(self, pl_module: Any) -> None:
        layer = next(iter(require_prepared(pl_module).values()))
        step_size = self.step_size or layer.phase2_step
        if (layer.phase, layer.phase2_step) != (2, step_size):
            start_phase2(pl_module, step_size)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if any(layer.weight_step.requires_grad for layer in require_prepared(pl_module).values()):
            keep_steps_positive(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.distill_start is None:
            return
        losses = [module for module in pl_module.modules() if isinstance(module, DistillationLoss)]
        if not losses:
            raise ValueError(
                f"distill_start={self.distill_start} sets the weights of the module's MutualDistillationLoss, but "
                f"{type(pl_module).__name__} has none: make it an attribute (self.loss = MutualDistillationLoss())"
            )
        warm_up = trainer.global_step < self.distill_start
        for loss in losses:
            loss.set_weights(*((1.0, 0.0) if warm_up else (self.alpha, self.beta)))


def _known(name: str, count: float) -> int:
    """A number of steps that Lightning has counted; it says -1 or infinity where it cannot."""
    if not 1 <= count < math.inf:
        raise ValueError(
            f"Lightning cannot tell how long training is (got {count} for {name}): give Phase1Callback({name}=...)"
        )
    return math.ceil(count)
