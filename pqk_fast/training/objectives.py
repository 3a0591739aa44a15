"""What a training step minimizes, as modules ``(x, y) -> loss``: one thing to compile, capture, or wrap for ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk_fast.branches import choose_mode, dual_forward
from pqk_fast.config import Phase2Config
from pqk_fast.losses import DistillationLoss, MutualDistillationLoss
from pqk_fast.prepare import convert
from pqk_fast.training.averaging import BATCHES, WeightAverage


class Objective(nn.Module):
    """What the loop knows: ``model`` is the network that is trained. This class is not instantiated itself."""

    mode: str | None = None  # how student and full net are run, where there are both

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def choose_mode(self, x: Tensor) -> None:
        """Decide by the first batch what has to be; before anything is compiled."""

    def set_step(self, step: int) -> bool:
        """Be what the objective is at this step of the stage. True if it now computes something else than it did, so
        that what was compiled, captured or wrapped for ranks is to be made anew."""
        return False

    @property
    def runs_full_net(self) -> bool:
        """Whether the prepared model's full net is part of it; else ranks would wait for its gradients."""
        return False

    def further_parameters(self) -> list[nn.Parameter]:
        """Those that learn besides the model's."""
        return []

    def further_state(self) -> dict[str, Any]:
        """What changes besides the model, for a checkpoint: copies."""
        return {}

    def load_further_state(self, state: dict[str, Any]) -> None:
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
    ``teacher_rest``: in those ``teacher`` is a plain copy of it, in evaluation mode. If it has the mean of weights, it
    is so once its BatchNorm has seen some batches.
    """

    def __init__(self, model: nn.Module, phase: Phase2Config, mode: str) -> None:
        super().__init__(model)
        self.loss = MutualDistillationLoss(phase.alpha, phase.beta, phase.temperature, phase.label_smoothing)
        self.mode: str = mode
        self.teacher: nn.Module | None = None
        self._average = WeightAverage(model) if phase.teacher_average else None
        self._settling: bool | None = None  # whether the frozen teacher's BatchNorm still learns statistics
        self._phase = phase
        self._weights: tuple[tuple[float, float], tuple[float, float]] | None = None

    def choose_mode(self, x: Tensor) -> None:
        """What "auto" means."""
        self.mode = choose_mode(self.model, x, self.mode)

    @property
    def runs_full_net(self) -> bool:
        return self._settling is None

    def set_step(self, step: int) -> bool:
        """Weigh the losses; average the full net and freeze it when it is time."""
        phase = self._phase
        student = teacher = (1.0, 0.0)
        if step >= phase.distill_start:
            student = (phase.alpha, phase.beta)
            teacher = student if phase.distillation == "mutual" else (1.0, 0.0)
        if (student, teacher) != self._weights:
            self.loss.set_weights(*student, teacher=teacher)
            self._weights = student, teacher
        start = phase.steps - phase.teacher_rest
        if self._average is not None and start - phase.teacher_average < step <= start:
            self._average.add()
        if step < start:
            return False
        if self.teacher is None:
            with nullcontext() if self._average is None else self._average.given():
                self.teacher = self._copy_of_full_net()
        settling = self._average is not None and step < start + BATCHES
        changed = settling is not self._settling
        if changed:
            self._settling = settling
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):
                    module.train(settling)
        return changed

    def _copy_of_full_net(self) -> nn.Module:
        return convert(self.model, "teacher").eval().requires_grad_(False)

    def further_state(self) -> dict[str, Any]:
        if self.teacher is not None:
            return {"teacher": {name: value.clone() for name, value in self.teacher.state_dict().items()}}
        return {} if self._average is None else {"average": self._average.state_dict()}

    def load_further_state(self, state: dict[str, Any]) -> None:
        if "teacher" in state:
            self.teacher = self._copy_of_full_net()
            self.teacher.load_state_dict(state["teacher"])
        elif self._average is not None:
            self._average.load_state_dict(state["average"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.teacher is None:
            loss: Tensor = self.loss(*dual_forward(self.model, x, self.mode), y)
            return loss
        with torch.no_grad():
            teacher = self.teacher(x)
        return self.loss.of_student(self.model(x), teacher, y)


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

    def set_step(self, step: int) -> bool:
        self.teacher_learns = step < self._co_study
        self.teacher.train(self.teacher_learns)
        return False

    def further_parameters(self) -> list[nn.Parameter]:
        return list(self.teacher.parameters()) if self._co_study else []

    def further_state(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.teacher.state_dict().items()} if self._co_study else {}

    def load_further_state(self, state: dict[str, Any]) -> None:
        if state:
            self.teacher.load_state_dict(state)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.teacher_learns):
            teacher = self.teacher(x)
        loss: Tensor = (self.mutual if self.teacher_learns else self.one_way)(self.model(x), teacher, y)
        return loss
