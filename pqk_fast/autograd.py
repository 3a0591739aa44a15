"""Gradients that autograd cannot derive: straight-through, step size, and the complementary split of phase 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk_fast import reference


class FakeQuant(torch.autograd.Function):
    """Eqs 2-4 forward; straight-through weight gradient and step-size gradient backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        mask: Tensor,
        step: Tensor,
        bits: int,
        ste: str,
        mask_gradients: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        return reference.fake_quant(weight, mask, step, bits, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, step, *options, _ = inputs
        ctx.save_for_backward(weight, mask, step)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, step = ctx.saved_tensors
        bits, ste, mask_gradients = ctx.options
        need_weight, _, need_step = ctx.needs_input_grad[:3]
        if need_step or ste == "clipped":
            grad_weight, grad_step = reference.fake_quant_backward(grad, weight, mask, step, bits, ste, mask_gradients)
            return grad_weight if need_weight else None, None, grad_step if need_step else None, *[None] * 4
        passed = torch.where(mask, grad, 0.0) if mask_gradients else grad
        return passed.to(weight.dtype), *[None] * 6


class PrunedOnly(torch.autograd.Function):
    """The teacher's weight in phase 2 (Eq. 12): forward an alias of ``w``, backward ``(1 - M) g``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, 0.0, grad), None
