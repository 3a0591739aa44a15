"""How the weights of several layers are divided among the programs of one launch: a row of a table for each program.

A layer is a matrix, a row for each step size; with one step size in all, its rows are pieces of memory as wide as a
tile.
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
from pqk_fast.triton_kernels.tile_math import is_bad_step

# A program's row in the table of blocks: where its tile lies, and how many programs share its sum for S.
LAYER, ROW, COLUMN, ROWS, COLUMNS, NUMEL, LARGEST, FIRST, SPLITS = (tl.constexpr(i) for i in range(9))
FIELDS = tl.constexpr(9)


@triton.jit
def place_of(block):
    """A tile's row and column in its layer, the layer's rows, columns and weights: one trip to the table for all."""
    row, column = tl.load(block + ROW), tl.load(block + COLUMN)
    return row, column, tl.load(block + ROWS), tl.load(block + COLUMNS), tl.load(block + NUMEL)


@triton.jit
def is_whole(place, R: tl.constexpr, K: tl.constexpr, PER_ROW: tl.constexpr):
    """Whether all of the program's tile lies in the layer, and its rows begin where wide loads may."""
    row, column, height, width, numel = place
    of_rows = (row + R <= height) & (column + K <= width) & (width % 16 == 0)
    return of_rows if PER_ROW else row * K + R * K <= numel


@triton.jit
def tile_of(
    block, place, R: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr, PER_ROW: tl.constexpr, WHOLE: tl.constexpr
):
    """Where a tile begins, its offsets [R, K] from there, and which of them lie in the layer."""
    row, column, height, width, numel = place
    rows = tl.arange(0, R)[:, None]
    columns = tl.arange(0, K)[None, :]
    if PER_ROW:
        inside = (row + rows < height) & (column + columns < width)
        if WHOLE:  # loaded again: the compiler forgets hints about values that have other uses
            width = tl.multiple_of(tl.load(block + COLUMNS) // 16 * 16, 16)
        start = row * width + tl.multiple_of(tl.load(block + COLUMN), K)
        offsets = rows.to(tl.int64) * width + columns
    else:
        start = row * K
        inside = start + rows * K + columns < numel
        offsets = rows * K + columns
    # Without the hint masks are read 16 elements a thread, and what was read moves through shared memory.
    return start, tl.max_contiguous(offsets, [1, VEC]), inside


@triton.jit
def aligned(pointer, ALIGNED: tl.constexpr):
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def steps_of(step, place, R: tl.constexpr, PER_ROW: tl.constexpr):
    """S of the tile's rows [R, 1], or of the layer []; and whether one of them is bad."""
    if PER_ROW:
        rows = place[0] + tl.arange(0, R)[:, None]
        values = tl.load(step + rows, mask=rows < place[2], other=1.0)
        bad = tl.max(is_bad_step(values).to(tl.int32))
    else:
        values = tl.load(step)
        bad = is_bad_step(values).to(tl.int32)
    return values, bad


Shape = tuple[int, int, int]  # rows (step sizes), columns (weights of each), bits


@functools.cache  # without a limit: captured graphs know the tables by their addresses
def table_of(shapes: tuple[Shape, ...], tile: launch.Tile, per_row: bool, device: torch.device) -> Tensor:
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
    table = torch.cat(parts)
    return operands.lasting(lambda: table.to(device), device)


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
        self.blocks = table_of(
            tuple(zip(rows, columns, [bits[i] for i in part], strict=True)), tile, self.per_row, device
        )
        self.options = {
            "COUNT": len(self.weights),
            "R": tile.rows,
            "K": tile.columns,
            "VEC": tile.vector,
            "PER_ROW": self.per_row,
            "ALIGNED": operands.aligned((*self.weights, *self.masks, *self.grads)),
            "num_warps": tile.warps,
            "enable_fp_fusion": False,
        }
