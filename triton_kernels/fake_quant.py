"""Masked fake-quantization of every layer of a model in one launch each way (Eqs 2-4 and their gradients).

Bytes a weight, which is the least there is: forward reads ``w`` and ``M`` and writes ``wbar``, 9 in fp32. Backward
reads the gradient, ``w`` and ``M``, 9, and writes ``dL/dw`` where it is not the incoming gradient itself, 13.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.reference import levels
from pqk_fast.triton_kernels import launch, operands
from pqk_fast.triton_kernels.tile_math import (
    clip,
    is_bad_step,
    pick,
    quantized,
    read,
    reciprocal,
    rounded,
    scaled,
    write,
)

# A program's row in the table of blocks: where its tile lies, and how many programs share its sum for S.
LAYER, ROW, COLUMN, ROWS, COLUMNS, NUMEL, LARGEST, FIRST, SPLITS = (tl.constexpr(i) for i in range(9))
FIELDS = tl.constexpr(9)


@triton.jit
def tile_of(block, R: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr, PER_ROW: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tile begins, its offsets [R, K] from there, which of them lie in the layer, and whether all do."""
    row, column = tl.load(block + ROW), tl.load(block + COLUMN)
    numel = tl.load(block + NUMEL)
    rows = tl.arange(0, R)[:, None]
    columns = tl.arange(0, K)[None, :]
    if PER_ROW:
        stride = tl.load(block + COLUMNS)
        if ALIGNED:
            stride = tl.multiple_of(stride, 16)
        start = row * stride + tl.multiple_of(column, K)
        inside = (row + rows < tl.load(block + ROWS)) & (column + columns < stride)
        full = (row + R <= tl.load(block + ROWS)) & (column + K <= stride)
        offsets = rows.to(tl.int64) * stride + columns
    else:
        start = row * K
        inside = start + rows * K + columns < numel
        full = start + R * K <= numel
        offsets = rows * K + columns
    # Without the hint masks are read 16 elements a thread, and what was read moves through shared memory.
    return start, tl.max_contiguous(offsets, [1, VEC]), inside, full


@triton.jit
def steps_of(step, block, flags, R: tl.constexpr, PER_ROW: tl.constexpr):
    """S of the tile's rows [R, 1], or of the layer []; raises the device's flag for a bad one."""
    if PER_ROW:
        rows = tl.load(block + ROW) + tl.arange(0, R)[:, None]
        values = tl.load(step + rows, mask=rows < tl.load(block + ROWS), other=1.0)
        bad = tl.max(is_bad_step(values).to(tl.int32))
    else:
        values = tl.load(step)
        bad = is_bad_step(values).to(tl.int32)
    if bad > 0:
        tl.store(flags, 1)
    return values


@triton.jit
def _write_fake_quantized(weight, mask, out, offsets, step, inverse, largest, inside, FULL: tl.constexpr):
    w, kept = read(weight + offsets, inside, FULL), read(mask + offsets, inside, FULL)  # [R, K]
    write(out + offsets, quantized(w, kept, inverse, largest) * step, inside, FULL)


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
    layer = tl.load(block + LAYER)
    start, offsets, inside, full = tile_of(block, R, K, VEC, PER_ROW, ALIGNED)
    step = steps_of(pick(steps, layer, COUNT), block, flags, R, PER_ROW)
    inverse, largest = reciprocal(step), tl.load(block + LARGEST).to(tl.float32)
    weight, mask, out = pick(weights, layer, COUNT), pick(masks, layer, COUNT), pick(outs, layer, COUNT)
    if ALIGNED:
        weight, mask, out = tl.multiple_of(weight, 16), tl.multiple_of(mask, 16), tl.multiple_of(out, 16)
    weight, mask, out = weight + start, mask + start, out + start
    if full:
        _write_fake_quantized(weight, mask, out, offsets, step, inverse, largest, inside, True)
    else:
        _write_fake_quantized(weight, mask, out, offsets, step, inverse, largest, inside, False)


@triton.jit
def _write_gradient(
    grad,
    weight,
    mask,
    out,
    offsets,
    inverse,
    largest,
    inside,
    FULL: tl.constexpr,
    CLIPPED: tl.constexpr,
    MASKED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
):
    """Writes a tile's ``dL/dw``; gives its terms of ``dL/dS``, fp32 [R, K]."""
    g = read(grad + offsets, inside, FULL).to(tl.float32)
    kept = read(mask + offsets, inside, FULL)
    unclipped = scaled(read(weight + offsets, inside, FULL), kept, inverse)
    v = clip(unclipped, largest)
    terms = g * (rounded(v) - tl.where(tl.abs(v) < largest, v, 0.0))
    if CLIPPED:
        g = tl.where(tl.abs(unclipped) <= largest, g, 0.0)
    if MASKED:
        g = tl.where(kept, g, 0.0)
    if NEED_WEIGHT:
        write(out + offsets, g, inside, FULL)
    return terms


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
    layer = tl.load(block + LAYER)
    start, offsets, inside, full = tile_of(block, R, K, VEC, PER_ROW, ALIGNED)
    step = steps_of(pick(steps, layer, COUNT), block, flags, R, PER_ROW)
    inverse, largest = reciprocal(step), tl.load(block + LARGEST).to(tl.float32)
    grad, weight, mask = pick(grads, layer, COUNT), pick(weights, layer, COUNT), pick(masks, layer, COUNT)
    out = pick(grad_weights, layer, COUNT)
    if ALIGNED:
        grad, weight = tl.multiple_of(grad, 16), tl.multiple_of(weight, 16)
        mask, out = tl.multiple_of(mask, 16), tl.multiple_of(out, 16)
    grad, weight, mask, out = grad + start, weight + start, mask + start, out + start
    if full:
        terms = _write_gradient(
            grad, weight, mask, out, offsets, inverse, largest, inside, True, CLIPPED, MASKED, NEED_WEIGHT
        )
    else:
        terms = _write_gradient(
            grad, weight, mask, out, offsets, inverse, largest, inside, False, CLIPPED, MASKED, NEED_WEIGHT
        )
    if NEED_STEP:
        # Each program writes its sum; the last of those that share a step adds them up, in the order of the blocks.
        SUMS: tl.constexpr = R if PER_ROW else 1
        place = tl.arange(0, SUMS)
        mine = tl.sum(terms, axis=1)
        if not PER_ROW:
            mine = tl.sum(mine, axis=0)[None]
        tl.store(partials + tl.program_id(0).to(tl.int64) * SUMS + place, mine)
        tl.debug_barrier()  # before the ticket says so, all threads' sums are written
        first, splits = tl.load(block + FIRST), tl.load(block + SPLITS)
        if tl.atomic_add(tickets + first, 1) == splits - 1:
            tl.store(tickets + first, 0)
            total = tl.zeros([CHUNK, SUMS], tl.float32)
            for begin in range(0, splits, CHUNK):
                others = begin + tl.arange(0, CHUNK)[:, None]
                place_of = (first + others) * SUMS + place[None, :]
                total += tl.load(partials + place_of, mask=others < splits, other=0.0, cache_modifier=".cg")
            row = tl.load(block + ROW) if PER_ROW else 0
            inside_rows = row + place < tl.load(block + ROWS) if PER_ROW else place < 1
            tl.store(pick(grad_steps, layer, COUNT) + row + place, tl.sum(total, axis=0), mask=inside_rows)


Shape = tuple[int, int, int]  # rows (step sizes), columns (weights of each), bits


@functools.cache  # without a limit: captured graphs know the tables by their addresses
def _blocks(shapes: tuple[Shape, ...], tile: launch.Tile, per_row: bool, device: torch.device) -> Tensor:
    """The table of blocks, int64 [programs, FIELDS], on the device: made once for the layers of a model."""
    parts, first = [], 0
    for layer, (rows, columns, bits) in enumerate(shapes):
        height, width = (rows, columns) if per_row else (-(-columns // tile.columns), tile.columns)
        down, across = -(-height // tile.rows), -(-width // tile.columns)
        index = torch.arange(down * across)
        splits = across if per_row else down
        part = torch.empty(down * across, FIELDS.value, dtype=torch.int64)
        part[:, LAYER.value] = layer
        part[:, ROW.value] = index // across * tile.rows
        part[:, COLUMN.value] = index % across * tile.columns
        part[:, ROWS.value], part[:, COLUMNS.value], part[:, NUMEL.value] = height, width, rows * columns
        part[:, LARGEST.value] = levels(bits)
        part[:, FIRST.value] = first + index // splits * splits
        part[:, SPLITS.value] = splits
        parts.append(part)
        first += len(part)
    return torch.cat(parts).to(device)


class Layers:
    """The layers of one launch: dense memory, the table of blocks and what the kernels are specialised on."""

    def __init__(
        self,
        part: Sequence[int],
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
        steps: Sequence[Tensor],
        bits: Sequence[int],
        grads: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``part``: indices into the lists. ``dtype``: of what is written, if that is not the weights'."""
        self.weights = tuple(operands.dense(weights[i]) for i in part)
        self.masks = tuple(operands.relaid(masks[i], w) for i, w in zip(part, self.weights, strict=True))
        self.steps = tuple(operands.flat_steps(steps[i]) for i in part)
        upstream = [] if grads is None else [(grads[i], w) for i, w in zip(part, self.weights, strict=True)]
        self.grads = tuple(operands.relaid(grad, weight) for grad, weight in upstream)
        rows = [step.numel() for step in self.steps]
        columns = [w.numel() // r for w, r in zip(self.weights, rows, strict=True)]
        self.per_row = any(r > 1 for r in rows)
        device = self.weights[0].device
        kinds = (self.weights[0].dtype, *(g.dtype for g in self.grads[:1]), dtype)
        itemsize = max(kind.itemsize for kind in kinds if kind)
        tile = launch.element_wise(itemsize, max(columns) if self.per_row else None)
        self.blocks = _blocks(
            tuple(zip(rows, columns, [bits[i] for i in part], strict=True)), tile, self.per_row, device
        )
        lined_up = all(c % 16 == 0 for c, r in zip(columns, rows, strict=True) if r > 1)
        self.options = {
            "COUNT": len(self.weights),
            "R": tile.rows,
            "K": tile.columns,
            "VEC": tile.vector,
            "PER_ROW": self.per_row,
            "ALIGNED": lined_up and operands.aligned((*self.weights, *self.masks, *self.grads)),
            "num_warps": tile.warps,
            "enable_fp_fusion": False,
        }


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
