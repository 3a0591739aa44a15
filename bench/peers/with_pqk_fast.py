"""This library, set to compute what naive.py does: LSQ's estimator and masked gradients."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from peer import BITS, Objective, Peer, Quantizer
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import ops
from pqk_fast.branches import pqk_layers
from pqk_fast.deploy.packed import save_packed


class Ours(Peer):
    does: ClassVar[dict[str, str]] = {
        "quantizer": "per tensor, learned step, with the mask",
        "masks": "exact global top-k",
        "file": "the packed file",
    }

    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        step = (2 * weight[mask].abs().mean() / (2 ** (BITS - 1) - 1) ** 0.5).reshape(1).requires_grad_()
        return lambda weight: ops.fake_quant(weight, mask, step, BITS, ste="clipped", mask_gradients=True), [step]

    def add_masks(self, model: nn.Module, x: Tensor) -> nn.Module:
        """Its layers have masks and step sizes at once."""
        return pqk.prepare(model, pqk.PQKConfig(bits=BITS, sparsity=0.9, ste="clipped", mask_gradients=True))

    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        return model if pqk_layers(model) else self.add_masks(model, x)

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.weight_step for layer in pqk_layers(model).values()]  # type: ignore[misc]

    def set_sparsity(self, model: nn.Module, sparsity: float) -> None:
        layers = pqk_layers(model).values()
        weights = [layer.weight.detach() for layer in layers]
        keep = sum(weight.numel() for weight in weights) - ops.masked_count(weights, sparsity)
        ops.topk_mask_([layer.weight_mask for layer in layers], weights, torch.tensor(keep))

    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        save_packed(model, folder / "student.pqk")
        return folder / "student.pqk"


class OursCompiled(Ours):
    does: ClassVar[dict[str, str]] = {**Ours.does, "quantizer": "ours; in a step forward and loss, compiled whole"}

    def objective(self, model: nn.Module) -> Objective:
        return torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True)
