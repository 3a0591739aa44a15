"""Gradients of :mod:`dual_conv2d`, each in one launch.

The input's is again a convolution. The weight's, ``M g_S x_S + (1 - M) g_T x_T``, is a small result of long sums over
positions: several programs share a tile, each writes what it has summed after choosing by the mask, and the last to
arrive adds the parts up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.reference import levels
from pqk_fast.triton_kernels import launch, operands
from pqk_fast.triton_kernels.dual_conv2d import (
    NOWHERE,
    along,
    convolve,
    divided,
    empty_images,
    index_type,
    is_channels_last,
    reciprocal_of,
)
from pqk_fast.triton_kernels.tile_math import reciprocal, scaled


@triton.jit
def _product(grad, x, total, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``total [BO, BK] + grad.T @ x`` with tiles [BR, .]; for channels_last they are [., BR]."""
    left = grad if CHANNELS_LAST else tl.trans(grad)
    right = tl.trans(x) if CHANNELS_LAST else x
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "positions",
        "span",
        "splits",
        "area_multiplier",
        "area_shift",
        "width_multiplier",
        "width_shift",
    ]
)
def _weight_gradient(
    grad,  # [2 halves, outputs, area] by its strides
    x,  # [2 halves, channels, height_in, width_in] by its strides
    weight,  # [outputs, channels, KERNEL] by its strides, as are mask and out
    mask,
    step,
    out,
    partials,  # fp32 [tiles, splits, BO, BK]
    tickets,
    positions,
    span,  # positions for a program
    splits,
    area_multiplier,
    area_shift,
    width_multiplier,
    width_shift,
    area,
    width,
    height_in,
    width_in,
    channels,
    outputs,
    grad_strides,
    x_strides,
    weight_strides,
    teacher_grad,  # how far the teacher's half is
    teacher_x,
    largest,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FLAT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    CLIPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    R: tl.constexpr = 1 if CHANNELS_LAST else 0  # the dimension of positions in tiles
    tiles_across = tl.cdiv(channels * TAPS, BK)
    count = tl.cdiv(outputs, BO) * tiles_across
    tile, split = tl.program_id(0) % count, tl.program_id(0) // count  # neighbours share positions
    o = tile // tiles_across * BO + tl.arange(0, BO)
    k = tile % tiles_across * BK + tl.arange(0, BK)
    if CHANNELS_LAST:
        c, tap = k % channels, k // channels
    else:
        c, tap = k // TAPS, k % TAPS
    r, t = tap // KERNEL[1], tap % KERNEL[1]
    down, right = r * DILATION[0], t * DILATION[1]
    of_k = along(c.to(INDEX) * x_strides[1] + down.to(INDEX) * x_strides[2] + right.to(INDEX) * x_strides[3], 1 - R)
    of_o = along(o.to(INDEX) * grad_strides[1], 1 - R)
    down, right = along(tl.where(k < channels * TAPS, down, NOWHERE), 1 - R), along(right, 1 - R)

    student, teacher = tl.zeros((BO, BK), tl.float32), tl.zeros((BO, BK), tl.float32)
    end = tl.minimum(split * span + span, positions)
    for start in range(split * span, end, BR):
        m = start + tl.arange(0, BR)
        b = divided(m, area_multiplier, area_shift)
        row = divided(m - b * area, width_multiplier, width_shift)
        column = m - b * area - row * width
        b, there = b.to(INDEX), m < end
        place = b * grad_strides[0] + row.to(INDEX) * grad_strides[2] + column.to(INDEX) * grad_strides[3]
        place = along(place, R) + of_o
        exists = along(there, R) & along(o < outputs, 1 - R)
        g_student = tl.load(grad + place, mask=exists, other=0.0)  # [BR, BO]
        g_teacher = tl.load(grad + teacher_grad + place, mask=exists, other=0.0)

        top, left = row * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1]
        place = b * x_strides[0] + top.to(INDEX) * x_strides[2] + left.to(INDEX) * x_strides[3]
        place = along(place, R) + of_k
        # as unsigned numbers, rows and columns before the first are large
        y = (along(tl.where(there, top, NOWHERE), R) + down).to(tl.uint32)
        inside = (y < height_in) & ((along(left, R) + right).to(tl.uint32) < width_in)
        x_student = tl.load(x + place, mask=inside, other=0.0)  # [BR, BK]
        x_teacher = tl.load(x + teacher_x + place, mask=inside, other=0.0)
        student = _product(g_student, x_student, student, CHANNELS_LAST, PRECISION)
        teacher = _product(g_teacher, x_teacher, teacher, CHANNELS_LAST, PRECISION)

    place = along(o * weight_strides[0], 0)
    place += along(k if FLAT else c * weight_strides[1] + r * weight_strides[2] + t * weight_strides[3], 1)
    exists = along(o < outputs, 0) & along(k < channels * TAPS, 1)
    kept = tl.load(mask + place, mask=exists, other=0)
    if CLIPPED:
        s = along(tl.load(step + o, mask=o < outputs, other=1.0), 0) if PER_CHANNEL else tl.load(step)
        w = tl.load(weight + place, mask=exists, other=0.0)
        student = tl.where(tl.abs(scaled(w, kept, reciprocal(s))) <= largest, student, 0.0)
    total = tl.where(kept, student, teacher)
    if not SPLIT:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)
    else:
        slot = along(tl.arange(0, BO) * BK, 0) + along(tl.arange(0, BK), 1)
        part = partials + tile.to(tl.int64) * splits * (BO * BK)
        tl.store(part + split * (BO * BK) + slot, total)
        tl.debug_barrier()  # before the ticket says so, all threads' sums are written
        if tl.atomic_add(tickets + tile, 1) == splits - 1:
            tl.store(tickets + tile, 0)
            total = tl.zeros((BO, BK), tl.float32)
            for first in range(0, splits, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    more = tl.full((BO, BK), first + i, tl.int32) < splits
                    total += tl.load(part + (first + i) * (BO * BK) + slot, mask=more, other=0.0, cache_modifier=".cg")
            tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


def dual_conv2d_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shared: bool,
    choice: dict[str, int] | None = None,
) -> Tensor:
    """``dL/dx [2B, C, H, W]`` from ``grad [2B, O, OH, OW]`` of any strides. Of ``x`` shape, dtype and layout matter.

    It is the convolution of ``grad``, its rows a stride apart, with the taps in reverse.
    """
    layer = (weight, mask, step, bits, None)
    reverse_padding, reverse_dilation = ([-size for size in sizes] for sizes in (padding, dilation))
    out = empty_images(x.shape, x, weight)
    return convolve(grad, out, *layer, (1, 1), reverse_padding, reverse_dilation, stride, True, shared, choice)


def dual_conv2d_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    clipped: bool,
    choice: tuple[dict[str, int], int] | None = None,
) -> Tensor:
    """``dL/dw = M dL_S/dwbar + (1 - M) dL_T/dw`` in the weight's dtype and layout.

    ``grad [2B, O, OH, OW]`` and ``x [2B, C, H, W]`` of one dtype and any strides. ``clipped``: the student's is zero
    where ``|w M / S| > Q``. ``choice`` replaces launch.convolution_gradient.
    """
    result = torch.empty_like(weight)
    if grad.numel() == 0 or weight.numel() == 0:
        return result.zero_()
    channels_last = is_channels_last(x, weight)
    weight, step = operands.dense(weight), operands.flat_steps(step)
    written = operands.written_like(result, weight)
    outputs, channels, *kernel = weight.shape
    rows, _, height, width = grad.shape
    depth, positions = channels * kernel[0] * kernel[1], rows // 2 * height * width
    tile, splits = choice or launch.convolution_gradient(
        positions, outputs, depth, x.element_size(), operands.multiprocessors(x.device)
    )
    count = triton.cdiv(outputs, tile["BO"]) * triton.cdiv(depth, tile["BK"])
    span = triton.cdiv(triton.cdiv(positions, tile["BR"]), splits) * tile["BR"]
    splits = triton.cdiv(positions, span)
    parts = count * splits * tile["BO"] * tile["BK"] if splits > 1 else 1
    with operands.on(x):
        _weight_gradient[(count * splits,)](
            grad,
            x,
            weight,
            operands.relaid(mask, weight),
            step,
            written,
            torch.empty(parts, dtype=torch.float32, device=x.device),
            operands.counters(x.device, count),
            positions,
            span,
            splits,
            *reciprocal_of(height * width),
            *reciprocal_of(width),
            height * width,
            width,
            *x.shape[2:],
            channels,
            outputs,
            grad.stride(),
            x.stride(),
            weight.stride(),
            rows // 2 * grad.stride(0),
            rows // 2 * x.stride(0),
            float(levels(bits)),
            KERNEL=tuple(kernel),
            STRIDE=tuple(stride),
            PADDING=tuple(padding),
            DILATION=tuple(dilation),
            CHANNELS_LAST=channels_last,
            FLAT=weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format),
            PER_CHANNEL=step.numel() > 1,
            CLIPPED=clipped,
            SPLIT=splits > 1,
            INDEX=index_type(grad, x),
            PRECISION=launch.fp32_products(convolution=True),
            enable_fp_fusion=False,
            **tile,
        )
    operands.copy_back([written], [result])
    return result


def dual_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    clipped: bool,
    shared: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients, a launch each; empty where not needed. ``groups`` is 1."""
    shape = (weight, mask, step, bits, stride, padding, dilation)
    grad_x = dual_conv2d_input_gradient(grad, x, *shape, shared) if need_x else x.new_empty(0)
    grad_weight = dual_conv2d_weight_gradient(grad, x, *shape, clipped) if need_weight else weight.new_empty(0)
    return grad_x, grad_weight
