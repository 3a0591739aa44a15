"""Pruning, quantization-aware training and self-distillation as one writes them by hand, in plain PyTorch.

No operation is fused and no gradient written out: masks are multiplied, rounding is bridged by ``detach``, the two
branches of phase 2 are two passes. It computes what pqk_fast does with ``ste="clipped", mask_gradients=True``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = 4
SPARSITY = 0.9


def round_ste(x: Tensor) -> Tensor:
    """Rounds; the gradient passes."""
    return x + (x.round() - x).detach()


class Compressed(nn.Module):
    """A layer whose weight is masked, quantized, both, or, as the ``teacher``, the latent one."""

    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    step: Tensor
    masked = quantized = True
    teacher = False

    def made_weight(self) -> Tensor:
        weight = self.weight
        if self.teacher:  # learns where the student does not
            return weight.detach() * self.mask + weight * (1 - self.mask)
        if self.masked:
            weight = weight * self.mask
        if self.quantized:
            q = 2 ** (BITS - 1) - 1
            weight = round_ste((weight / self.step).clamp(-q, q)) * self.step
        return weight

    def made_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.detach() if self.teacher else self.bias


class Conv2d(Compressed, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.made_weight(), self.made_bias())


class Linear(Compressed, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.made_weight(), self.made_bias())


class TwoBatchNorms(nn.Module):
    """One for each branch."""

    teacher = False

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.of_student = norm
        self.of_teacher = nn.BatchNorm2d(norm.num_features, affine=norm.affine)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.of_teacher if self.teacher else self.of_student)(x)
        return out


def compress(model: nn.Module, masked: bool = True, quantized: bool = True) -> list[Compressed]:
    """Rewrite the layers of ``model`` in place; gives them."""
    layers = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.__class__ = Conv2d if type(module) is nn.Conv2d else Linear
            module.masked, module.quantized = masked, quantized
            weight = module.weight.detach()
            module.register_buffer("mask", torch.ones_like(weight))
            step = 2 * weight.abs().mean() / (2 ** (BITS - 1) - 1) ** 0.5
            module.step = nn.Parameter(step, requires_grad=quantized)
            layers.append(module)
    return layers


@torch.no_grad()
def make_masks(layers: list[Compressed], sparsity: float = SPARSITY) -> None:
    """Keep the largest weights of all layers together."""
    magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers])
    threshold = magnitudes.kthvalue(int(sparsity * magnitudes.numel())).values
    for layer in layers:
        layer.mask.copy_(layer.weight.abs() > threshold)


def start_phase2(model: nn.Module, layers: list[Compressed]) -> None:
    for layer in layers:
        layer.step.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, TwoBatchNorms(child))


class MutualDistillation(nn.Module):
    """``(x, y) -> loss``: two passes, and each branch's cross-entropy and divergence from the other."""

    def __init__(self, model: nn.Module, alpha: float = 0.5, beta: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__()
        self.model, self.alpha, self.beta, self.temperature = model, alpha, beta, temperature
        self.switched = [module for module in model.modules() if hasattr(module, "teacher")]

    def run(self, x: Tensor, teacher: bool) -> Tensor:
        for module in self.switched:
            module.teacher = teacher
        out: Tensor = self.model(x)
        return out

    def one(self, logits: Tensor, other: Tensor, y: Tensor) -> Tensor:
        t = self.temperature
        divergence = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(other.detach() / t, -1), reduction="batchmean")
        return self.alpha * F.cross_entropy(logits, y) + self.beta * t**2 * divergence

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        student, teacher = self.run(x, False), self.run(x, True)
        return self.one(student, teacher, y) + self.one(teacher, student, y)
