"""BatchNorm as torch has it: faster on the CPU for channels_last activations in training; and over many ranks."""

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


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: Any = None,
) -> Tensor:
    """:func:`batch_norm` in training with the statistics of all ranks' batches together; called by all of them.

    ``x [B, C, ...]``, B may differ from rank to rank. The gradient of ``x`` is that of the sum of all ranks' losses,
    those of ``weight`` and ``bias`` are the rank's own share. Computed in fp32 at least; the result has x's dtype. Two
    all-reduces, as sums of squares before the mean is known would cost digits where it is far from zero.
    """
    from torch.distributed.nn.functional import all_reduce

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    around = [dim for dim in range(x.dim()) if dim != 1]
    per_channel = [-1] + [1] * (x.dim() - 2)  # a shape that goes beside x
    count = wide.new_full((1,), x.numel() // max(x.shape[1], 1))
    total, count = all_reduce(torch.cat([wide.sum(around), count]), group=group).split([x.shape[1], 1])
    mean = total / count
    centred = wide - mean.view(per_channel)
    squares = all_reduce(centred.square().sum(around), group=group)
    scale = (squares / count + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    out = centred * scale.view(per_channel)
    if bias is not None:
        out = out + bias.view(per_channel)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(squares / (count - 1).clamp_min(1), alpha=momentum)
    return out.to(x.dtype)
