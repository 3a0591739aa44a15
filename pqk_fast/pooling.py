"""ReLU and average pooling in one operation: faster on the CPU for channels_last activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk_fast import dispatch, native, reference
from pqk_fast.autograd import quickly_bound


class _ReluAvgPool2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
        out: Tensor = dispatch.relu_avg_pool2d(x, kernel_height, kernel_width)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.kernel = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which torch's own have
            spread = torch.ops.aten.avg_pool2d_backward(grad, x, ctx.kernel, [], [0, 0], False, True, None)
            return torch.ops.aten.threshold_backward(spread, x, 0), None, None
        return dispatch.relu_avg_pool2d_backward(grad, x, *ctx.kernel), None, None


def _is_ours(x: Tensor, kernel: tuple[int, int]) -> bool:
    """True where the C++ library is the faster one. What is unusual, or wrong, is left to torch."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.shape[1] >= 4  # fewer channels fill no vector
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and 0 < kernel[0] <= x.shape[2]
        and 0 < kernel[1] <= x.shape[3]
        and not torch.compiler.is_compiling()  # fuses it with what is around
        and native.library().path is not None
    )


def relu_avg_pool2d(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """``avg_pool2d(relu(x), kernel)``: its arguments, errors and bits, of the gradient too.

    ``x [B, C, H, W]``; the stride is the kernel, and rows and columns that fill no window are left out.
    """
    if not _is_ours(x, kernel):
        return reference.relu_avg_pool2d(x, kernel)
    out: Tensor = _ReluAvgPool2d.apply(x, *kernel)
    return out
