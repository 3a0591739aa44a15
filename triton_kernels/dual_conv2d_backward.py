"""Gradients of :mod:`dual_conv2d`, each in one launch.

The input's is again a convolution. The weight's, ``M g_S x_S + (1 - M) g_T x_T``, is a small result of long sums over
positions: several programs share a tile, each writes what it has summed after choosing by the mask, and the last to
arrive adds the parts up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import operands
from pqk_fast.triton_kernels.dual_conv2d import (
    NOWHERE,
    TYPES,
    Pair,
    along,
    convolve,
    divided,
    index_type,
    operand_layouts,
    reciprocal_of,
    uses_tf32,
)
from pqk_fast.triton_kernels.tile_math import reciprocal, scaled


@triton.jit
def _product(grad, x, total, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``total [BO, BK] + grad.T @ x`` with tiles [BR, .]; for channels_last they are [., BR]."""
    if CHANNELS_LAST:
        return tl.dot(grad, tl.trans(x), total, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)


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
    grad,
    x,
    weight,
    mask,
    step,
    out,
    partials,
    tickets,
    positions,
    span,
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
    teacher_grad,
    teacher_x,
    largest,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    CLIPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
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
    down, right = along(tl.where(tap < TAPS, down, NOWHERE), 1 - R), along(right, 1 - R)
    if not CHANNELS_LAST:
        down = tl.where(along(c < channels, 1 - R), down, NOWHERE)

    total_s = tl.zeros((BO, BK), tl.float32)
    total_t = tl.zeros((BO, BK), tl.float32)
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
        g_s = tl.load(grad + place, mask=exists, other=0.0).to(DTYPE)  # [BR, BO]
        g_t = tl.load(grad + teacher_grad + place, mask=exists, other=0.0).to(DTYPE)

        top, left = row * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1]
        place = b * x_strides[0] + top.to(INDEX) * x_strides[2] + left.to(INDEX) * x_strides[3]
        place = along(place, R) + of_k
        # as unsigned numbers, rows and columns before the first are large
        y = (along(tl.where(there, top, NOWHERE), R) + down).to(tl.uint32)
        inside = (y < height_in) & ((along(left, R) + right).to(tl.uint32) < width_in)
        x_s = tl.load(x + place, mask=inside, other=0.0).to(DTYPE)  # [BR, BK]
        x_t = tl.load(x + teacher_x + place, mask=inside, other=0.0).to(DTYPE)
        total_s = _product(g_s, x_s, total_s, CHANNELS_LAST, PRECISION)
        total_t = _product(g_t, x_t, total_t, CHANNELS_LAST, PRECISION)

    place = along(o * weight_strides[0], 0)
    place += along(c * weight_strides[1] + r * weight_strides[2] + t * weight_strides[3], 1)
    exists = along(o < outputs, 0) & along(k < channels * TAPS, 1)
    kept = tl.load(mask + place, mask=exists, other=0)
    if CLIPPED:
        s = along(tl.load(step + o, mask=o < outputs, other=1.0), 0) if PER_CHANNEL else tl.load(step)
        w = tl.load(weight + place, mask=exists, other=0.0)
        total_s = tl.where(tl.abs(scaled(w, kept, reciprocal(s))) <= largest, total_s, 0.0)
    total = tl.where(kept, total_s, total_t)
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


def weight_tiles(
    positions: int, outputs: int, depth: int, dtype: torch.dtype, multiprocessors: int
) -> tuple[dict[str, int], int]:
    """Block sizes and warps of a weight gradient [outputs, depth], and among how many programs to divide its sums."""
    down = min(max(triton.next_power_of_2(outputs), 16), 64)
    across = min(max(triton.next_power_of_2(depth), 16), 64)
    choice = {"BO": down, "BK": across, "BR": 32, "AT_ONCE": 4, "num_warps": 8, "num_stages": 2}
    count = triton.cdiv(outputs, down) * triton.cdiv(depth, across)
    # as many programs as run at once; but a part should be worth its way through memory, and few be left to add up
    splits = min(multiprocessors // count, triton.cdiv(positions, 4 * choice["BR"]), 32)
    return choice, max(splits, 1)


def dual_conv2d_input_gradient(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    image: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    shared: bool,
    dtype: torch.dtype,
    choice: dict[str, int] | None = None,
) -> Tensor:
    """``dL/dx [2B, C, *image]`` in ``dtype`` from ``grad [2B, O, OH, OW]``, in whose dtype products are made.

    It is the convolution of ``grad``, its rows a stride apart, with the taps in reverse.
    """
    pad, dil = (-padding[0], -padding[1]), (-dilation[0], -dilation[1])
    settings = (image, (1, 1), pad, dil, stride, True, shared, grad.dtype, dtype, choice)
    return convolve(grad, weight, mask, step, bits, None, *settings)


def dual_conv2d_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    clipped: bool,
    choice: tuple[dict[str, int], int] | None = None,
) -> Tensor:
    """``dL/dw = M dL_S/dwbar + (1 - M) dL_T/dw`` in the weight's dtype and layout.

    ``grad [2B, O, OH, OW]``, in whose dtype products are made, and ``x [2B, C, H, W]`` of any strides. ``clipped``: the
    student's is zero where ``|w M / S| > Q``. ``choice`` replaces :func:`weight_tiles`.
    """
    if grad.numel() == 0:
        return torch.zeros_like(weight)
    weight_, mask, channels_last = operand_layouts(x, weight, mask)
    result = torch.empty_like(weight)
    written = operands.written_like(result, weight_)
    outputs, channels, *kernel = weight.shape
    rows, _, height, width = grad.shape
    depth = channels * kernel[0] * kernel[1]
    positions = rows // 2 * height * width
    choice, splits = choice or weight_tiles(positions, outputs, depth, grad.dtype, operands.multiprocessors(x.device))
    count = triton.cdiv(outputs, choice["BO"]) * triton.cdiv(depth, choice["BK"])
    blocks = triton.cdiv(triton.cdiv(positions, choice["BR"]), splits)
    splits = triton.cdiv(positions, blocks * choice["BR"])
    size = count * splits * choice["BO"] * choice["BK"] if splits > 1 else 1
    with operands.on(x):
        _weight_gradient[(count * splits,)](
            grad,
            x,
            weight_,
            mask,
            operands.flat_steps(step),
            written,
            torch.empty(size, dtype=torch.float32, device=x.device),
            operands.counters(x.device, count),
            positions,
            blocks * choice["BR"],
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
            weight_.stride(),
            rows // 2 * grad.stride(0),
            rows // 2 * x.stride(0),
            2.0 ** (bits - 1) - 1,
            KERNEL=tuple(kernel),
            STRIDE=stride,
            PADDING=padding,
            DILATION=dilation,
            CHANNELS_LAST=channels_last,
            PER_CHANNEL=step.numel() > 1,
            CLIPPED=clipped,
            SPLIT=splits > 1,
            DTYPE=TYPES[grad.dtype],
            INDEX=index_type(grad, x),
            PRECISION="tf32" if uses_tf32(grad.dtype) else "ieee",
            enable_fp_fusion=False,
            **choice,
        )
    operands.copy_back([written], [result])
    return result
