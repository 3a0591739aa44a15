"""The gradient of a weight that two branches share: ``M g_S + (1 - M) g_T`` (Eqs 11, 12), in one launch.

For layers whose products are a library's; dual_forward.py and dual_conv2d_backward.py select as they go. Bytes a weight
in fp32: both gradients, M and what is written, 13, and w where the estimator is clipped, 17.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import operands
from pqk_fast.triton_kernels.blocks import FIELDS, LARGEST, Layers, aligned, is_whole, place_of, steps_of, tile_of
from pqk_fast.triton_kernels.tile_math import read, reciprocal, scaled, write


@triton.jit
def _select_tile(
    grad_student,
    grad_teacher,
    weight,
    mask,
    step,
    out,
    block,
    place,
    largest,
    R: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    PER_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLIPPED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    start, offsets, inside = tile_of(block, place, R, K, VEC, PER_ROW, WHOLE)
    kept = read(aligned(mask, ALIGNED) + start + offsets, inside, WHOLE)  # [R, K]
    student = read(aligned(grad_student, ALIGNED) + start + offsets, inside, WHOLE).to(tl.float32)
    teacher = read(aligned(grad_teacher, ALIGNED) + start + offsets, inside, WHOLE).to(tl.float32)
    if CLIPPED:
        w = read(aligned(weight, ALIGNED) + start + offsets, inside, WHOLE)
        s, _ = steps_of(step, place, R, PER_ROW)
        student = tl.where(tl.abs(scaled(w, kept, reciprocal(s))) <= largest, student, 0.0)
    write(aligned(out, ALIGNED) + start + offsets, tl.where(kept, student, teacher), inside, WHOLE)


@triton.jit
def _select(
    grad_student,
    grad_teacher,
    weight,
    mask,
    step,
    out,
    blocks,
    R: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    PER_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """``M g_S + (1 - M) g_T`` of one layer; the weight is read only if clipped."""
    block = blocks + tl.program_id(0) * FIELDS
    place, largest = place_of(block), tl.load(block + LARGEST).to(tl.float32)
    if is_whole(place, R, K, PER_ROW):
        _select_tile(
            grad_student,
            grad_teacher,
            weight,
            mask,
            step,
            out,
            block,
            place,
            largest,
            R,
            K,
            VEC,
            PER_ROW,
            ALIGNED,
            CLIPPED,
            True,
        )
    else:
        _select_tile(
            grad_student,
            grad_teacher,
            weight,
            mask,
            step,
            out,
            block,
            place,
            largest,
            R,
            K,
            VEC,
            PER_ROW,
            ALIGNED,
            CLIPPED,
            False,
        )


def dual_weight_backward(
    grad_student: Tensor, grad_teacher: Tensor, weight: Tensor, mask: Tensor, step: Tensor, bits: int, clipped: bool
) -> Tensor:
    """``M g_S + (1 - M) g_T`` in the weight's dtype; the student's only where it is not clipped, if asked for."""
    result = torch.empty_like(weight)
    if not weight.numel():
        return result
    layer = Layers([0], [weight], [mask], [step], [bits], [grad_student])
    (dense,) = layer.weights
    written = operands.written_like(result, dense)
    teacher = operands.relaid(grad_teacher, dense)
    options = {**layer.options, "ALIGNED": layer.options["ALIGNED"] and operands.aligned([teacher])}
    del options["COUNT"]
    with operands.on(dense):
        _select[(len(layer.blocks),)](
            layer.grads[0],
            teacher,
            dense,
            layer.masks[0],
            layer.steps[0],
            written,
            layer.blocks,
            **options,
            CLIPPED=clipped,
        )
    operands.copy_back([written], [result])
    return result
