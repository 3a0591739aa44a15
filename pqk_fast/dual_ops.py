"""Student and teacher products of phase 2 as one operation each way, with their gradients.

Defined here for any device: the student's weight is made, and the two halves of the batch are multiplied into one
output. On a GPU a Triton kernel does all of it in one launch where that is the faster way
(:mod:`pqk_fast.triton_kernels.launch` says where).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk_fast import dispatch, reference
from pqk_fast.autograd import DualWeights, quickly_bound
from pqk_fast.triton_kernels import launch, operands


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[0] // 2
    return x[:half], x[half:]


def _weights(
    weight: Tensor, mask: Tensor, step: Tensor, bits: int, shared: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's weight in ``dtype``."""
    student = dispatch.fake_quant(weight, mask, step, bits, dtype)
    return student, torch.where(mask, student, weight.to(dtype)) if shared else weight.to(dtype)


def _multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = x @ weight.T + b``, written in place."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _linear(
    x: Tensor, weight: Tensor, mask: Tensor, step: Tensor, bits: int, bias: Tensor | None, shared: bool
) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    for part, each, written in zip(
        _halves(x), _weights(weight, mask, step, bits, shared, x.dtype), _halves(out), strict=True
    ):
        _multiply(part, each, written, bias)
    return out


def _gradients_of(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of x and the weight, that of x in this layout; empty where not needed."""
    like = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
    grad_x = torch.empty(x.shape, **like) if need_x else x.new_empty(0)  # type: ignore[call-overload]
    return grad_x, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    clipped: bool,
    shared: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _gradients_of(x, weight, need_x, False)
    if need_x:
        weights = _weights(weight, mask, step, bits, shared, x.dtype)
        for part, each, written in zip(_halves(grad), weights, _halves(grad_x), strict=True):
            _multiply(part, each.t(), written)
    if need_weight:
        both = (g.t() @ part for g, part in zip(_halves(grad), _halves(x), strict=True))
        grad_weight = dispatch.dual_weight_backward(*both, weight, mask, step, bits, clipped)
    return grad_x, grad_weight


def _fuses_linear(x: Tensor, weight: Tensor, backward: bool = False) -> bool:
    rows, (outs, ins) = x.shape[0] // 2, weight.shape
    return launch.fuses_linear(rows, outs, ins, x.dtype, launch.capability(x.device), backward)


# x: [2B, in], the student's rows first; the result [2B, out] in x's dtype. The weight may be wider than x (autocast).
dual_linear = dispatch.define(
    "dual_linear(Tensor x, Tensor weight, Tensor mask, Tensor step, int bits, Tensor? bias, bool shared) -> Tensor",
    _linear,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    lambda x, weight, *_: _fuses_linear(x, weight),
)
# Gradients of x and the weight; what is not needed comes back empty.
dual_linear_backward = dispatch.define(
    "dual_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor step, int bits, bool clipped, "
    "bool shared, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    _linear_backward,
    lambda grad, x, weight, mask, step, bits, clipped, shared, *needs: _gradients_of(x, weight, *needs),
    lambda grad, x, weight, *_: _fuses_linear(x, weight, backward=True),
)


def _memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """What a convolution's output has: channels_last if x or the weight has it."""
    like = (torch._prims_common.suggest_memory_format(t) for t in (x, weight))
    return torch.channels_last if torch.channels_last in like else torch.contiguous_format


def _images(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Memory for a convolution's output: ``[2B, C_out, H_out, W_out]``."""
    shape = (x.shape[0], weight.shape[0], *operands.convolved_size(x, weight, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x, weight))


def _by_cudnn(x: Tensor, weight: Tensor, shape: tuple[list[int], ...], groups: int) -> bool:
    """Whether torch's own convolution would be cuDNN's: not on a CPU, of nothing, or depthwise."""
    cudnn = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
    return bool(torch._C._select_conv_backend(x, weight, None, *shape, False, [0, 0], groups, None) == cudnn)


def _convolve(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, *shape: Any) -> None:
    """``out = conv2d(x, weight) + b``, in place where cuDNN does it."""
    *each, groups = shape
    bias = None if bias is None else bias.to(x.dtype)
    if not _by_cudnn(x, weight, tuple(each), groups):
        out.copy_(F.conv2d(x, weight, bias, *shape))
        return
    stride, padding, dilation = each
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    how = (cudnn.benchmark, deterministic, launch.fp32_products(convolution=True) == "tf32")
    torch.ops.aten.cudnn_convolution.out(x, weight, padding, stride, dilation, groups, *how, out=out)
    if bias is not None:
        out += bias.reshape(-1, 1, 1)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    shared: bool,
) -> Tensor:
    out = _images(x, weight, stride, padding, dilation)
    for part, each, written in zip(
        _halves(x), _weights(weight, mask, step, bits, shared, x.dtype), _halves(out), strict=True
    ):
        _convolve(part, each, written, bias, stride, padding, dilation, groups)
    return out


def _conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    clipped: bool,
    shared: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    shape = (None, stride, padding, dilation, False, [0, 0], groups, (need_x, need_weight, False))
    weights = _weights(weight, mask, step, bits, shared, x.dtype)
    made = [
        torch.ops.aten.convolution_backward(g, part, each, *shape)
        for g, part, each in zip(_halves(grad), _halves(x), weights, strict=True)
    ]
    grad_x, grad_weight = _gradients_of(x, weight, need_x, False, _memory_format(x, weight))
    if need_x:
        for written, (of_x, _, _) in zip(_halves(grad_x), made, strict=True):
            written.copy_(of_x)
    if need_weight:
        both = (of_weight for _, of_weight, _ in made)
        grad_weight = dispatch.dual_weight_backward(*both, weight, mask, step, bits, clipped)
    return grad_x, grad_weight


def _fuses_conv2d(x: Tensor, weight: Tensor, *shape: Any) -> bool:
    *each, groups = shape
    image, last = operands.convolved_size(x, weight, *each), _memory_format(x, weight) == torch.channels_last
    how = (groups, x.dtype, last, launch.capability(x.device))
    return launch.fuses_conv2d(tuple(x.shape), tuple(weight.shape), image, *how)


# As dual_linear, for x [2B, C_in, H, W] and weights [C_out, C_in / groups, kh, kw].
dual_conv2d = dispatch.define(
    "dual_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor step, int bits, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool shared) -> Tensor",
    _conv2d,
    lambda x, weight, mask, step, bits, bias, stride, padding, dilation, *_: _images(
        x, weight, stride, padding, dilation
    ),
    lambda x, weight, mask, step, bits, bias, *settings: _fuses_conv2d(x, weight, *settings[:4]),
)
dual_conv2d_backward = dispatch.define(
    "dual_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor step, int bits, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool clipped, bool shared, bool need_x, bool need_weight) "
    "-> (Tensor, Tensor)",
    _conv2d_backward,
    lambda grad, x, weight, *settings: _gradients_of(x, weight, settings[-2], settings[-1], _memory_format(x, weight)),
    lambda grad, x, weight, mask, step, bits, *settings: _fuses_conv2d(x, weight, *settings[:4]),
)
for _operation in (dual_linear, dual_linear_backward, dual_conv2d, dual_conv2d_backward):
    dispatch.one_by_one(_operation)


def _again(
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    grad: Tensor,
    inputs: tuple[Any, ...],
    settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """dx and dw as functions that have gradients themselves; ``gradients`` gives those of one product."""
    x, weight, _, mask, step = inputs
    bits, ste, shared = settings
    student, teacher = DualWeights.apply(weight, mask, step, bits, ste, x.dtype)
    if shared:
        teacher = torch.where(mask, student.detach(), teacher.to(x.dtype))
    halves = zip(_halves(grad), _halves(x), (student, teacher.to(x.dtype)), strict=True)
    (x_student, w_student), (x_teacher, w_teacher) = (gradients(*half) for half in halves)
    passed, _ = reference.fake_quant_backward(w_student, weight, mask, step, bits, ste)
    return torch.cat([x_student, x_teacher]), torch.where(mask, passed, w_teacher.to(weight.dtype))


def _of_linear(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ weight, grad.t() @ x


def _of_conv2d(shape: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = shape
    how = (None, stride, padding, dilation, False, [0, 0], groups, (True, True, False))
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *how)
    return of_x, of_weight


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Biases follow the student's loss alone."""
    student = _halves(grad)[0]
    return student.sum([d for d in range(grad.dim()) if d != 1]).to(dtype)


class DualLinear(torch.autograd.Function):
    """``x [2B, in]`` by the student's weight and the teacher's; S is a constant, dw as in :class:`DualWeights`."""

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, step: Tensor, bits: int, ste: str, shared: bool
    ) -> Tensor:
        out: Tensor = dual_linear(x, weight, mask, step, bits, bias, shared)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, bits, ste, shared = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = bits, ste, shared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask, step = ctx.saved_tensors
        bits, ste, shared = ctx.settings
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            grad_x, grad_weight = _again(_of_linear, grad, ctx.saved_tensors, ctx.settings)
        else:
            layer = (weight, mask, step, bits, ste == "clipped", shared)
            grad_x, grad_weight = dual_linear_backward(grad, x, *layer, need_x, need_weight)
        grad_bias = _bias_gradient(grad, bias.dtype) if need_bias else None
        return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *[None] * 5


class DualConv2d(torch.autograd.Function):
    """:class:`DualLinear` for convolution; ``shape`` is stride, padding, dilation (lists) and groups."""

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        step: Tensor,
        bits: int,
        ste: str,
        shared: bool,
        *shape: Any,
    ) -> Tensor:
        out: Tensor = dual_conv2d(x, weight, mask, step, bits, bias, *shape, shared)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.settings, ctx.shape = inputs[5:8], inputs[8:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask, step = ctx.saved_tensors
        bits, ste, shared = ctx.settings
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grad_x, grad_weight = _again(partial(_of_conv2d, ctx.shape), grad, ctx.saved_tensors, ctx.settings)
        else:
            layer = (weight, mask, step, bits, *ctx.shape, ste == "clipped", shared)
            grad_x, grad_weight = dual_conv2d_backward(grad, x, *layer, need_x, need_weight)
        grad_bias = _bias_gradient(grad, bias.dtype) if need_bias else None
        return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *[None] * 9
