"""BatchNorm in training as torch has it, faster on the CPU for channels_last activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk_fast import dispatch, native
from pqk_fast.autograd import quickly_bound


class _BatchNorm(torch.autograd.Function):
    """``(y, mean, variance)``; the statistics are for the running ones, without gradient."""

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = dispatch.batch_norm(x, weight, bias, eps)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, variance, rstd = output
        ctx.mark_non_differentiable(mean, variance, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which torch's own has
            settings = (weight, None, None, mean, rstd, True, ctx.eps, ctx.needs_input_grad[:3])
            return *torch.ops.aten.native_batch_norm_backward(grad, x, *settings), None
        made = dispatch.batch_norm_backward(grad, x, weight, mean, rstd)
        return *(each if needed else None for each, needed in zip(made, ctx.needs_input_grad, strict=False)), None


def _is_ours(x: Tensor, *channels: Tensor | None) -> bool:
    """True where the C++ library is the faster one. What is unusual, or wrong, is left to torch."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and all(t is None or _fits(t, x.shape[1]) for t in channels)
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > x.shape[1]  # else torch says what is wrong
        and not torch.compiler.is_compiling()  # fuses it with what is around
        and native.library().path is not None
    )


def _fits(values: Tensor, channels: int) -> bool:
    return values.dtype == torch.float32 and values.shape == (channels,) and values.is_contiguous()


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, with its arguments, errors and results (to rounding)."""
    if not (training and eps > 0 and _is_ours(x, running_mean, running_var, weight, bias)):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    out, mean, variance, _ = _BatchNorm.apply(x, weight, bias, eps)
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))
    return out
