"""What a training step minimizes, as modules ``(x, y) -> loss``: one thing to compile, capture, or wrap for ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast.branches import choose_mode, dual_forward
from pqk_fast.config import Phase2Config
from pqk_fast.losses import DistillationLoss, MutualDistillationLoss


class Objective(nn.Module):
    """What the loop knows: ``model`` is the network that is trained. This class is not instantiated itself."""

    mode: str | None = None  # how student and full net are run, where there are both

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def choose_mode(self, x: Tensor) -> None:
        """Decide by the first batch what has to be; before anything is compiled."""

    def set_step(self, step: int) -> None:
        """Be what the objective is at this step of the stage."""

    def further_parameters(self) -> list[nn.Parameter]:
        """Those that learn besides the model's."""
        return []

    def further_state(self) -> dict[str, Tensor]:
        """What changes besides the model, for a checkpoint: copies."""
        return {}

    def load_further_state(self, state: dict[str, Tensor]) -> None:
        """The inverse."""


class CrossEntropy(Objective):
    """Of the model's own output: phase 1 (Eq. 6), plain training and finetuning."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, label_smoothing=self.label_smoothing)


class MutualDistillation(Objective):
    """Of student and full net (Eqs 9, 10); for the first ``distill_start`` steps their cross-entropy alone.

    What the full net learns from, and until when, is :class:`~pqk_fast.config.Phase2Config`'s ``distillation`` and
    ``teacher_rest``.
    """

    def __init__(self, model: nn.Module, phase: Phase2Config, mode: str) -> None:
        super().__init__(model)
        self.loss = MutualDistillationLoss(phase.alpha, phase.beta, phase.temperature, phase.label_smoothing)
        self.mode: str = mode
        self._phase = phase
        self._weights: tuple[tuple[float, float], tuple[float, float]] | None = None

    def choose_mode(self, x: Tensor) -> None:
        """What "auto" means."""
        self.mode = choose_mode(self.model, x, self.mode)

    def set_step(self, step: int) -> None:
        """Weigh the losses."""
        phase = self._phase
        student = teacher = (1.0, 0.0)
        if step >= phase.distill_start:
            student = (phase.alpha, phase.beta)
            teacher = student if phase.distillation == "mutual" else (1.0, 0.0)
        if step >= phase.steps - phase.teacher_rest:
            teacher = (0.0, 0.0)
        if (student, teacher) != self._weights:
            self.loss.set_weights(*student, teacher=teacher)
            self._weights = student, teacher

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        student, teacher = dual_forward(self.model, x, self.mode)
        loss: Tensor = self.loss(student, teacher, y)
        return loss


class SeparateTeacher(Objective):
    """The baseline to phase 2: the student is taught by a network of its own (Eq. 9), from the first step.

    For ``co_study`` steps the teacher learns from the student as well (Eq. 10); afterwards it is frozen, in evaluation
    mode (QKD's co-studying and tutoring; Kim et al. 2019).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, phase: Phase2Config, co_study: int = 0) -> None:
        super().__init__(model)
        self.teacher = teacher
        weights = (phase.alpha, phase.beta, phase.temperature, phase.label_smoothing)
        self.one_way, self.mutual = DistillationLoss(*weights), MutualDistillationLoss(*weights)
        self._co_study = co_study
        self.set_step(0)

    def set_step(self, step: int) -> None:
        self.teacher_learns = step < self._co_study
        self.teacher.train(self.teacher_learns)

    def further_parameters(self) -> list[nn.Parameter]:
        return list(self.teacher.parameters()) if self._co_study else []

    def further_state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.teacher.state_dict().items()} if self._co_study else {}

    def load_further_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self.teacher.load_state_dict(state)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.teacher_learns):
            teacher = self.teacher(x)
        loss: Tensor = (self.mutual if self.teacher_learns else self.one_way)(self.model(x), teacher, y)
        return loss
