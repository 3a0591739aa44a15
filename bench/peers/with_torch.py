"""Plain PyTorch: naive.py's layers eager, with torch's own learnable fake-quantization, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import bench_fake_quant
import naive
import torch
import torch.nn.functional as F
from peer import Objective, Peer, Quantizer, saved_state, set_global_masks
from torch import Tensor, nn

Q = 2 ** (naive.BITS - 1) - 1


def layers_of(model: nn.Module) -> list[naive.Compressed]:
    return [module for module in model.modules() if isinstance(module, naive.Compressed)]


def lsq_step(weight: Tensor) -> Tensor:
    return 2 * weight.abs().mean() / Q**0.5


class Eager(Peer):
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per tensor, learned step, with the mask",
        "masks": "kthvalue of all magnitudes, and a comparison",
        "file": "torch.save of the state_dict",
    }
    masked_quantizer: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(bench_fake_quant.clipped)

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        step = lsq_step(weight[mask]).reshape(1).requires_grad_()
        function = self.masked_quantizer
        return lambda weight: function(weight, mask, step), [step]

    def add_masks(self, model: nn.Module, x: Tensor) -> nn.Module:
        naive.compress(model, quantized=False)
        return model

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        for layer in layers_of(model) or naive.compress(model, masked=False):
            kept = layer.weight.detach()[layer.mask.bool()]
            layer.step = nn.Parameter(lsq_step(kept))
            layer.quantized = True
        return model

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.step for layer in layers_of(model) if layer.quantized]  # type: ignore[misc]

    def set_sparsity(self, model: nn.Module, sparsity: float) -> None:
        layers = layers_of(model)
        set_global_masks([layer.weight for layer in layers], [layer.mask for layer in layers], sparsity)

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        return saved_state(model, folder)


def made_by_torch(layer: naive.Compressed) -> Tensor:
    """Instead of a layer's ``made_weight``."""
    weight = layer.weight * layer.mask if layer.masked else layer.weight
    if not layer.quantized:
        return weight
    step = layer.step.reshape(1)
    zero = torch.zeros_like(step)
    return torch._fake_quantize_learnable_per_tensor_affine(weight, step, zero, -Q, Q, 1.0)


class OwnOp(Eager):
    does: ClassVar[dict[str, str]] = {
        **Eager.does,
        "quantizer": "torch._fake_quantize_learnable_per_tensor_affine, the mask before it",
    }
    masked_quantizer = staticmethod(bench_fake_quant.torchs_own)

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        super()._quantize(model, x)
        for layer in layers_of(model):
            layer.made_weight = partial(made_by_torch, layer)  # type: ignore[method-assign]
        return model


class Compiled(Eager):
    does: ClassVar[dict[str, str]] = {
        **Eager.does,
        "quantizer": "the eager one compiled; in a step forward and loss, compiled whole",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        function, steps = super().quantizer(weight, mask)
        return torch.compile(function), steps

    def objective(self, model: nn.Module) -> Objective:
        return torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True)
