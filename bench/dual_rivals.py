"""Phase 2's two branches as they are usually written: what the dual operations are compared with.

The student's weight is masked and quantized with the straight-through gradient of kept weights only; the teacher's is
the latent weight, whose gradient reaches pruned weights only (Eqs 11, 12).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pqk_fast.branches import pqk_layers

BITS, Q = 4, 7


class Student(torch.autograd.Function):
    """``[...] -> [...]``: the weight on its grid."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.clamp(torch.where(mask, weight, 0.0) / step, -Q, Q).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0.0), None, None


def teacher_weight(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight.detach(), weight) if torch.is_grad_enabled() else weight


class StudentWeight(nn.Module):
    """A parametrization of ``weight``."""

    def __init__(self, mask: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("step", step)

    def forward(self, weight: Tensor) -> Tensor:
        out: Tensor = Student.apply(weight, self.mask, self.step)
        return out


class TwoNetworks(nn.Module):
    """Student and teacher run one after the other, from the same weights: what a prepared model in phase 2 does.

    ``plain`` is the network before it was prepared, with the same weights. Forward only: the teacher's gradients are
    not masked.
    """

    def __init__(self, plain: nn.Module, prepared: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = copy.deepcopy(plain), copy.deepcopy(plain)
        for name, layer in pqk_layers(prepared).items():
            module, twin = self.student.get_submodule(name), self.teacher.get_submodule(name)
            module.weight = twin.weight  # one latent weight
            step = layer.weight_step.detach().reshape(-1, *[1] * (layer.weight.dim() - 1)).clone()
            parametrize.register_parametrization(module, "weight", StudentWeight(layer.weight_mask.clone(), step))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(x), self.teacher(x)
