"""What a training step minimizes, as modules ``(x, y) -> loss``: one thing to compile, capture, or wrap for ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast.branches import choose_mode, dual_forward
from pqk_fast.config import Phase2Config
from pqk_fast.losses import MutualDistillationLoss


class CrossEntropy(nn.Module):
    """Of the model's own output: phase 1 (Eq. 6), plain training and finetuning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


class MutualDistillation(nn.Module):
    """Of student and full net (Eqs 9, 10); for the first ``distill_start`` steps their cross-entropy alone."""

    def __init__(self, model: nn.Module, phase: Phase2Config, mode: str) -> None:
        super().__init__()
        self.model = model
        self.loss = MutualDistillationLoss(phase.alpha, phase.beta, phase.temperature)
        self.mode = mode
        self._phase = phase
        self._warm_up: bool | None = None

    def choose_mode(self, x: Tensor) -> None:
        """Decide, by the first batch, what "auto" means; before anything is compiled."""
        self.mode = choose_mode(self.model, x, self.mode)

    def set_step(self, step: int) -> None:
        """Weigh the losses as at this step of the phase."""
        phase = self._phase
        warm_up = step < phase.distill_start
        if warm_up != self._warm_up:
            self.loss.set_weights(*((1.0, 0.0) if warm_up else (phase.alpha, phase.beta)))
            self._warm_up = warm_up

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        student, teacher = dual_forward(self.model, x, self.mode)
        loss: Tensor = self.loss(student, teacher, y)
        return loss
