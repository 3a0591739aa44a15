"""Masked fake-quantization of every layer of a model in one launch each way (Eqs 2-4 and their gradients).

Bytes a weight, which is the least there is: forward reads ``w`` and ``M`` and writes ``wbar``, 9 in fp32. Backward
reads the gradient, ``w`` and ``M``, 9, and writes ``dL/dw`` where it is not the incoming gradient itself, 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import launch, operands
from pqk_fast.triton_kernels.blocks import (
    FIELDS,
    FIRST,
    LARGEST,
    LAYER,
    SPLITS,
    Layers,
    aligned,
    is_whole,
    place_of,
    steps_of,
    tile_of,
)
from pqk_fast.triton_kernels.tile_math import clip, pick, quantized, read, reciprocal, rounded, scaled, write


@triton.jit
def _quantize_tile(
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
    WHOLE: tl.constexpr,
):
    """Writes a tile's ``wbar``; gives whether a step size is bad. Weights are under way while S is divided by."""
    start, offsets, inside = tile_of(block, place, R, K, VEC, PER_ROW, WHOLE)
    w = read(aligned(weight, ALIGNED) + start + offsets, inside, WHOLE)  # [R, K]
    kept = read(aligned(mask, ALIGNED) + start + offsets, inside, WHOLE)
    s, bad = steps_of(step, place, R, PER_ROW)
    wbar = quantized(w, kept, reciprocal(s), largest) * s
    write(aligned(out, ALIGNED) + start + offsets, wbar, inside, WHOLE)
    return bad


@triton.jit
def _forward(
    weights,
    masks,
    steps,
    outs,
    blocks,
    flags,
    COUNT: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    PER_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block = blocks + tl.program_id(0) * FIELDS
    layer, place, largest = tl.load(block + LAYER), place_of(block), tl.load(block + LARGEST).to(tl.float32)
    weight, mask = pick(weights, layer, COUNT), pick(masks, layer, COUNT)
    step, out = pick(steps, layer, COUNT), pick(outs, layer, COUNT)
    if is_whole(place, R, K, PER_ROW):
        bad = _quantize_tile(weight, mask, step, out, block, place, largest, R, K, VEC, PER_ROW, ALIGNED, True)
    else:
        bad = _quantize_tile(weight, mask, step, out, block, place, largest, R, K, VEC, PER_ROW, ALIGNED, False)
    if bad > 0:
        tl.store(flags, 1)


@triton.jit
def _gradient_tile(
    grad,
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
    MASKED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Writes a tile's ``dL/dw``; gives the rows' sums of ``dL/dS``, fp32 [R], and whether a step size is bad."""
    start, offsets, inside = tile_of(block, place, R, K, VEC, PER_ROW, WHOLE)
    g = read(aligned(grad, ALIGNED) + start + offsets, inside, WHOLE).to(tl.float32)  # [R, K]
    w = read(aligned(weight, ALIGNED) + start + offsets, inside, WHOLE)
    kept = read(aligned(mask, ALIGNED) + start + offsets, inside, WHOLE)
    s, bad = steps_of(step, place, R, PER_ROW)
    unclipped = scaled(w, kept, reciprocal(s))
    v = clip(unclipped, largest)
    sums = tl.sum(g * (rounded(v) - tl.where(tl.abs(v) < largest, v, 0.0)), axis=1)
    if CLIPPED:
        g = tl.where(tl.abs(unclipped) <= largest, g, 0.0)
    if MASKED:
        g = tl.where(kept, g, 0.0)
    if NEED_WEIGHT:
        write(aligned(out, ALIGNED) + start + offsets, g, inside, WHOLE)
    return sums, bad


@triton.jit
def _backward(
    grads,
    weights,
    masks,
    steps,
    grad_weights,
    grad_steps,
    blocks,
    partials,
    tickets,
    flags,
    COUNT: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    PER_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLIPPED: tl.constexpr,
    MASKED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = blocks + tl.program_id(0) * FIELDS
    layer, place, largest = tl.load(block + LAYER), place_of(block), tl.load(block + LARGEST).to(tl.float32)
    grad, weight, mask = pick(grads, layer, COUNT), pick(weights, layer, COUNT), pick(masks, layer, COUNT)
    step, out = pick(steps, layer, COUNT), pick(grad_weights, layer, COUNT)
    if is_whole(place, R, K, PER_ROW):
        mine, bad = _gradient_tile(
            grad,
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
            MASKED,
            NEED_WEIGHT,
            True,
        )
    else:
        mine, bad = _gradient_tile(
            grad,
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
            MASKED,
            NEED_WEIGHT,
            False,
        )
    if bad > 0:
        tl.store(flags, 1)
    if NEED_STEP:
        # Each program writes its sum; the last of those that share a step adds them up, in the order of the blocks.
        SUMS: tl.constexpr = R if PER_ROW else 1
        slot = tl.arange(0, SUMS)
        if not PER_ROW:
            mine = tl.sum(mine, axis=0)[None]
        tl.store(partials + tl.program_id(0).to(tl.int64) * SUMS + slot, mine)
        tl.debug_barrier()  # before the ticket says so, all threads' sums are written
        first, splits = tl.load(block + FIRST), tl.load(block + SPLITS)
        if tl.atomic_add(tickets + first, 1) == splits - 1:
            tl.store(tickets + first, 0)
            total = tl.zeros([CHUNK, SUMS], tl.float32)
            for begin in range(0, splits, CHUNK):
                others = begin + tl.arange(0, CHUNK)[:, None]
                theirs = (first + others) * SUMS + slot[None, :]
                total += tl.load(partials + theirs, mask=others < splits, other=0.0, cache_modifier=".cg")
            row = place[0] if PER_ROW else 0
            inside_rows = row + slot < place[2] if PER_ROW else slot < 1
            tl.store(pick(grad_steps, layer, COUNT) + row + slot, tl.sum(total, axis=0), mask=inside_rows)


def _split(tensors: Sequence[Tensor], *more: Sequence[Tensor]) -> list[list[int]]:
    """Indices that go into one launch together: of one dtype each, not empty, no more than the parameters hold."""
    kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.dtype, *(each[index].dtype for each in more)), []).append(index)
    most = launch.MOST_LAYERS
    return [kind[begin : begin + most] for kind in kinds.values() for begin in range(0, len(kind), most)]


def fake_quant_all(
    weights: Sequence[Tensor], masks: Sequence[Tensor], steps: Sequence[Tensor], bits: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """``wbar`` of each layer in ``dtype``; a launch for up to 64 layers of one dtype."""
    results = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    for part in _split(weights):
        layers = Layers(part, weights, masks, steps, bits, dtype=dtype)
        written = [operands.written_like(results[i], weight) for i, weight in zip(part, layers.weights, strict=True)]
        with operands.on(layers.blocks):
            _forward[(len(layers.blocks),)](
                layers.weights,
                layers.masks,
                layers.steps,
                tuple(written),
                layers.blocks,
                operands.error_flags(layers.blocks.device),
                **layers.options,
            )
        operands.copy_back(written, [results[i] for i in part])
    return results


def fake_quant(weight: Tensor, mask: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """:func:`fake_quant_all` of one layer."""
    return fake_quant_all([weight], [mask], [step], [bits], dtype)[0]


def fake_quant_all_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    bits: Sequence[int],
    clipped: bool,
    mask_gradients: bool,
    need_weight: bool,
    need_step: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """``dL/dw`` and ``dL/dS`` of each layer; lists that are not needed are empty. As many launches as forward has."""
    grad_weights = [torch.empty_like(weight) for weight in weights] if need_weight else []
    grad_steps = [
        (torch.empty_like if weight.numel() else torch.zeros_like)(step, dtype=torch.float32)
        for step, weight in zip(steps, weights, strict=True)
        if need_step
    ]
    for part in _split(weights, grads):
        layers = Layers(part, weights, masks, steps, bits, grads)
        written = layers.weights
        if need_weight:
            written = tuple(
                operands.written_like(grad_weights[i], w) for i, w in zip(part, layers.weights, strict=True)
            )
        programs = len(layers.blocks)
        sums = programs * (layers.options["R"] if layers.per_row else 1)
        device = layers.blocks.device
        with operands.on(layers.blocks):
            _backward[(programs,)](
                layers.grads,
                layers.weights,
                layers.masks,
                layers.steps,
                written,
                tuple(grad_steps[i] for i in part) if need_step else layers.steps,
                layers.blocks,
                torch.empty(sums if need_step else 1, dtype=torch.float32, device=device),
                operands.counters(device, programs if need_step else 1),
                operands.error_flags(device),
                **layers.options,
                CLIPPED=clipped,
                MASKED=mask_gradients,
                NEED_WEIGHT=need_weight,
                NEED_STEP=need_step,
                CHUNK=launch.sums_at_once(layers.options["R"] if layers.per_row else 1),
            )
        if need_weight:
            operands.copy_back(written, [grad_weights[i] for i in part])
    return grad_weights, grad_steps


def fake_quant_backward(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    clipped: bool,
    mask_gradients: bool,
    need_weight: bool,
    need_step: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quant_all_backward` of one layer; what is not needed comes back as an empty tensor."""
    flags = (clipped, mask_gradients, need_weight, need_step)
    grad_weights, grad_steps = fake_quant_all_backward([grad], [weight], [mask], [step], [bits], *flags)
    return (
        grad_weights[0] if need_weight else weight.new_empty(0),
        grad_steps[0] if need_step else step.new_empty(0, dtype=torch.float32),
    )
