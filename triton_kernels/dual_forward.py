"""Student and teacher products of phase 2 in one launch: a weight is read once and used as ``wbar`` and as ``w``.

The first half of the rows of ``x`` is the student's, the second the teacher's. A tile of the weight is masked and
fake-quantized in registers (Eqs 2-4) for the student and used as it is for the teacher; no student weight is written.
Backward ``dw = M g_S^T x_S + (1 - M) g_T^T x_T`` (Eqs 11, 12): both products and the selection in one launch.

Bytes a weight: 5 in fp32 each way for products with the weight (``w`` and ``M``), 5 for its gradient (9 if clipped).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.reference import levels
from pqk_fast.triton_kernels import launch, operands
from pqk_fast.triton_kernels.tile_math import is_bad_step, quantized, reciprocal, scaled

# Which index of the product a step size for each row of the weight goes along.
ONE_STEP, ALONG_N, ALONG_K = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=["rows"])  # 1 would become a constant; batch sizes vary
def _product(
    x,  # [2 rows, depth]
    weight,  # [N, depth] by its strides, as is mask
    mask,
    step,
    bias,  # [N]
    out,  # [2 rows, N]
    partials,  # fp32 [SPLITS, 2 rows, N]
    tickets,
    flags,
    rows,
    N,
    depth,
    stride_n,
    stride_k,
    largest,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[m, n] = sum_k x[m, k] W[n, k]``. Tiles are [BN, BM]: the weight's may then stay in registers."""
    pid_m, pid_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, m = pid_n * BN + tl.arange(0, BN), pid_m * BM + tl.arange(0, BM)
    in_n, in_m = n < N, m < rows
    half_x = rows.to(tl.int64) * depth
    if STEPS == ONE_STEP:
        s = tl.load(step)
        bad = is_bad_step(s).to(tl.int32)
    elif STEPS == ALONG_N:
        s = tl.load(step + n, mask=in_n, other=1.0)[:, None]
        bad = tl.max(is_bad_step(s).to(tl.int32))
    else:
        s, bad = 1.0, tl.program_id(0) * 0
    student, teacher = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    length = tl.cdiv(tl.cdiv(depth, BK), SPLITS) * BK
    begin = split * length
    for k0 in range(begin, min(begin + length, depth), BK):
        k = k0 + tl.arange(0, BK)
        in_k = k < depth
        at = n[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k  # [BN, BK]
        inside = in_n[:, None] & in_k[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0)
        kept = tl.load(mask + at, mask=inside, other=0)
        places = m[None, :].to(tl.int64) * depth + k[:, None]  # [BK, BM]
        inside_x = in_m[None, :] & in_k[:, None]
        x_student = tl.load(x + places, mask=inside_x, other=0.0)
        x_teacher = tl.load(x + half_x + places, mask=inside_x, other=0.0)
        if STEPS == ALONG_K:
            steps = tl.load(step + k, mask=in_k, other=1.0)[None, :]
            bad = tl.maximum(bad, tl.max(is_bad_step(steps).to(tl.int32)))
        else:
            steps = s
        q = quantized(w, kept, reciprocal(steps), largest)
        full = w.to(x.dtype.element_ty)
        if SHARED:
            full = tl.where(kept, (q * steps).to(x.dtype.element_ty), full)
        if STEPS == ALONG_K:
            q = q * steps
        student = tl.dot(q.to(x.dtype.element_ty), x_student, student, input_precision=PRECISION)
        teacher = tl.dot(full, x_teacher, teacher, input_precision=PRECISION)
    if bad > 0:
        tl.store(flags, 1)
    if STEPS != ALONG_K:
        student *= s
    places = m[:, None].to(tl.int64) * N + n[None, :]  # [BM, BN]
    inside = in_m[:, None] & in_n[None, :]
    other_half = rows.to(tl.int64) * N
    last = True
    if SPLITS > 1:
        mine = partials + 2 * split * other_half + places
        tl.store(mine, tl.trans(student), mask=inside)
        tl.store(mine + other_half, tl.trans(teacher), mask=inside)
        tl.debug_barrier()  # before the ticket says so, all threads' sums are written
        ticket = tickets + pid_m * tl.num_programs(1) + pid_n
        last = tl.atomic_add(ticket, 1) == SPLITS - 1
        if last:
            tl.store(ticket, 0)
    if last:
        for half in tl.static_range(2):
            total = tl.trans(teacher) if half else tl.trans(student)
            if SPLITS > 1:
                total = tl.zeros([BM, BN], tl.float32)
                for i in range(SPLITS):
                    at = (2 * i + half) * other_half + places
                    total += tl.load(partials + at, mask=inside, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
            tl.store(out + half * other_half + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _weight_gradient(
    grad,  # [2 rows, N]
    x,  # [2 rows, K]
    weight,  # [N, K] by its strides, as are mask and out
    mask,
    step,
    out,
    rows,
    N,
    K,
    stride_n,
    stride_k,
    largest,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CLIPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BN, BK] of the student's and of the teacher's gradient, summed over the rows, and the selection."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    in_n, in_k = n < N, k < K
    half_g, half_x = rows.to(tl.int64) * N, rows.to(tl.int64) * K
    student, teacher = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
    for m0 in range(0, rows, BM):
        m = m0 + tl.arange(0, BM)
        in_m = m < rows
        at_g = m[None, :].to(tl.int64) * N + n[:, None]  # [BN, BM]
        at_x = m[:, None].to(tl.int64) * K + k[None, :]  # [BM, BK]
        inside_g, inside_x = in_m[None, :] & in_n[:, None], in_m[:, None] & in_k[None, :]
        g_student = tl.load(grad + at_g, mask=inside_g, other=0.0)
        x_student = tl.load(x + at_x, mask=inside_x, other=0.0)
        student = tl.dot(g_student, x_student, student, input_precision=PRECISION)
        g_teacher = tl.load(grad + half_g + at_g, mask=inside_g, other=0.0)
        x_teacher = tl.load(x + half_x + at_x, mask=inside_x, other=0.0)
        teacher = tl.dot(g_teacher, x_teacher, teacher, input_precision=PRECISION)
    at = n[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k
    inside = in_n[:, None] & in_k[None, :]
    kept = tl.load(mask + at, mask=inside, other=0)
    if CLIPPED:
        s = tl.load(step + n, mask=in_n, other=1.0)[:, None] if PER_ROW else tl.load(step)
        v = scaled(tl.load(weight + at, mask=inside, other=0.0), kept, reciprocal(s))
        student = tl.where(tl.abs(v) <= largest, student, 0.0)
    tl.store(out + at, tl.where(kept, student, teacher).to(out.dtype.element_ty), mask=inside)


def _dual_product(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None,
    shared: bool,
    transposed: bool,
) -> Tensor:
    """``x @ wbar.T`` of the first half of the rows and ``x @ w.T`` of the second; ``transposed``: with no ``.T``."""
    rows, depth = x.shape[0] // 2, x.shape[1]
    outs = weight.shape[1] if transposed else weight.shape[0]
    out = x.new_empty(x.shape[0], outs)
    if not out.numel():
        return out
    x, weight, step = x.contiguous(), operands.dense(weight), operands.flat_steps(step)
    mask = operands.relaid(mask, weight)
    precision = launch.fp32_products()
    tile = launch.dual_product(rows, x.element_size(), precision == "ieee" and x.dtype == torch.float32)
    down, across = -(-outs // tile.outs), -(-rows // tile.rows)
    splits = launch.splits(down * across, -(-depth // tile.depth), operands.multiprocessors(x.device))
    strides = weight.stride()[::-1] if transposed else weight.stride()
    along = (ALONG_K if transposed else ALONG_N) if step.numel() > 1 else ONE_STEP
    with operands.on(x):
        _product[(across, down, splits)](
            x,
            weight,
            mask,
            step,
            step if bias is None else bias.contiguous(),
            out,
            torch.empty(splits * out.numel() if splits > 1 else 1, dtype=torch.float32, device=x.device),
            operands.counters(x.device, down * across),
            operands.error_flags(x.device),
            rows,
            outs,
            depth,
            *strides,
            float(levels(bits)),
            BM=tile.rows,
            BN=tile.outs,
            BK=tile.depth,
            SPLITS=splits,
            STEPS=along,
            BIAS=bias is not None,
            SHARED=shared,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=launch.most_registers(launch.capability(x.device)),
            enable_fp_fusion=False,
        )
    return out


def dual_linear(
    x: Tensor, weight: Tensor, mask: Tensor, step: Tensor, bits: int, bias: Tensor | None, shared: bool
) -> Tensor:
    """``x [2B, in]`` -> ``[2B, out]`` in x's dtype: the first B rows by ``wbar``, the others by ``w``; one launch."""
    return _dual_product(x, weight, mask, step, bits, bias, shared, False)


def dual_linear_backward(
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
    """``dx [2B, in]`` in x's dtype and ``dw [out, in]`` in the weight's, a launch each; empty where not needed."""
    grad = grad.contiguous()
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = _dual_product(grad, weight, mask, step, bits, None, shared, True)
    if not need_weight:
        return grad_x, weight.new_empty(0)
    grad_weight = torch.empty_like(weight)
    if not weight.numel():
        return grad_x, grad_weight
    x, weight, rows = x.contiguous(), operands.dense(weight), x.shape[0] // 2
    outs, ins = weight.shape
    written = operands.written_like(grad_weight, weight)
    tile = launch.dual_weight_gradient(x.dtype.itemsize)
    step = operands.flat_steps(step)
    with operands.on(x):
        _weight_gradient[(-(-outs // tile.outs), -(-ins // tile.depth))](
            grad,
            x,
            weight,
            operands.relaid(mask, weight),
            step,
            written,
            rows,
            outs,
            ins,
            *weight.stride(),
            float(levels(bits)),
            BM=tile.rows,
            BN=tile.outs,
            BK=tile.depth,
            CLIPPED=clipped,
            PER_ROW=step.numel() > 1,
            PRECISION=launch.fp32_products(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    operands.copy_back([written], [grad_weight])
    return grad_x, grad_weight
