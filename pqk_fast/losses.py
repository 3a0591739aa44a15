"""Losses of both phases as plain modules (Eqs 5-10). Phase 1's is cross-entropy (Eq. 6)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillationLoss(nn.Module):
    """``alpha CE(logits, target) + beta T^2 KL(p^other || p)``: Eq. 9, or Eq. 10 with the roles exchanged.

    ``logits``, ``other`` ``[B, classes]`` (``other`` is a constant), ``target`` int64 ``[B]``; a scalar. ``alpha`` and
    ``beta`` are buffers: changing them by :meth:`set_weights` recompiles nothing. Not part of the state dict.
    ``label_smoothing`` is the cross-entropy's.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.5, temperature: float = 2.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.register_buffer("alpha", torch.zeros(()), persistent=False)
        self.register_buffer("beta", torch.zeros(()), persistent=False)
        self.set_weights(alpha, beta)
        self.temperature = temperature
        self.label_smoothing = label_smoothing

    def set_weights(self, alpha: float, beta: float) -> None:
        """Change alpha and beta in place (warm-up: 1 and 0)."""
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
            raise ValueError(f"alpha and beta must not be negative, and finite; got {alpha} and {beta}")
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)

    def forward(self, logits: Tensor, other: Tensor, target: Tensor) -> Tensor:
        return self._loss(logits, other, target, self.alpha, self.beta)

    def _loss(self, logits: Tensor, other: Tensor, target: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        if logits.dim() != 2 or logits.shape != other.shape:
            raise ValueError(
                f"expected two logits [B, classes], got {tuple(logits.shape)} and {tuple(other.shape)}; bring other "
                "outputs into that form, pixels or tokens as rows of the batch"
            )
        temperature = self.temperature
        # The divergence of neighbours is below bf16's roundings.
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, other = logits.to(wide), other.to(wide)
        log_p = F.log_softmax(logits / temperature, dim=-1)
        log_other = F.log_softmax(other.detach() / temperature, dim=-1)
        distilled = F.kl_div(log_p, log_other, reduction="batchmean", log_target=True)
        labelled = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        loss: Tensor = alpha * labelled + beta * temperature**2 * distilled
        return loss


class MutualDistillationLoss(DistillationLoss):
    """``L^S + L^T`` (Eqs 9 and 10 together): one backward of it gives both branches their own gradients.

    The targets of each branch are constants, and the weight gradients go to complementary sets, so the sum does not mix
    the two. ``teacher_alpha`` and ``teacher_beta``, buffers too, are the teacher's alpha and beta: by default the
    student's.
    """

    teacher_alpha: Tensor
    teacher_beta: Tensor

    def set_weights(self, alpha: float, beta: float, teacher: tuple[float, float] | None = None) -> None:
        """Change alpha and beta in place, and with ``teacher`` give the teacher's loss its own (0 and 0: none)."""
        super().set_weights(alpha, beta)
        teacher_alpha, teacher_beta = (alpha, beta) if teacher is None else teacher
        if "teacher_alpha" not in self._buffers:
            self.register_buffer("teacher_alpha", torch.zeros(()), persistent=False)
            self.register_buffer("teacher_beta", torch.zeros(()), persistent=False)
        self.teacher_alpha.fill_(teacher_alpha)
        self.teacher_beta.fill_(teacher_beta)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        of_teacher = self._loss(teacher, student, target, self.teacher_alpha, self.teacher_beta)
        return self.of_student(student, teacher, target) + of_teacher

    def of_student(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """``L^S`` alone (Eq. 9)."""
        return super().forward(student, teacher, target)
