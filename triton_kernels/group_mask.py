"""N:M masks: the weights of largest ``|w|`` in every group of inputs. One launch finds NaN and infinity, one ranks.

A weight is read twice and its mask written once: 9 bytes an fp32 weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import operands
from pqk_fast.triton_kernels.segments import keys_of

TILE = 2048  # weights a program holds at once
INFINITE = tl.constexpr(0x7F800000)  # the keys of infinity and NaN start here
NOT_FINITE = tl.constexpr(operands.NOT_FINITE)


@triton.jit(do_not_specialize=["numel"])
def find_not_finite(weight, found, flags, numel, TILE: tl.constexpr):
    """Set ``found`` (int32, zero), and the device's flag, to 1 if a weight is infinite or NaN."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    keys = keys_of(tl.load(weight + begin + lanes, mask=lanes < numel - begin, other=0.0))
    if tl.max(keys, 0) >= INFINITE:
        tl.store(found, 1)
        tl.store(flags + NOT_FINITE, 1)


@triton.jit(do_not_specialize=["groups"])
def write_groups(
    mask,
    weight,
    found,
    status,
    groups,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK groups a program, [BLOCK, WIDTH]: WIDTH is a power of two. INNER: how far apart a group's inputs lie."""
    bad = tl.load(found)
    if tl.program_id(0) == 0:
        tl.store(status, tl.where(bad > 0, 0, -1).to(tl.int64))
    if bad == 0:
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        row = begin // INNER
        place = (begin - row * INNER).to(tl.int32) + tl.arange(0, BLOCK)
        input = tl.arange(0, WIDTH)
        offsets = (place // INNER * (GROUP * INNER) + place % INNER)[:, None] + (input * INNER)[None, :]
        inside = (tl.arange(0, BLOCK) < groups - begin)[:, None] & (input < GROUP)[None, :]
        keys = keys_of(tl.load(weight + row * (GROUP * INNER) + offsets, mask=inside, other=0.0))
        # unique, and the lower input is the larger of two that are equal
        ranked = tl.where(inside, (keys.to(tl.int64) << 4) | (15 - input)[None, :], -1)
        rest = ranked
        for _ in tl.static_range(KEEP - 1):
            rest = tl.where(rest == tl.max(rest, 1)[:, None], -1, rest)
        chosen = ranked >= tl.max(rest, 1)[:, None]
        tl.store(mask + row * (GROUP * INNER) + offsets, chosen, mask=inside)


def group_mask_(mask: Tensor, weight: Tensor, keep: int, group: int) -> Tensor:
    """Keep ``keep`` of every ``group`` (up to 16) inputs of ``weight [out, in, ...]``; see dispatch.group_mask_."""
    status = torch.empty((), dtype=torch.int64, device=weight.device)
    numel = weight.numel()
    if not numel:
        return status.fill_(-1)
    found = torch.zeros((), dtype=torch.int32, device=weight.device)
    values, written = weight.contiguous(), mask.contiguous()
    width = triton.next_power_of_2(group)
    groups, block = numel // group, TILE // width
    flags = operands.error_flags(weight.device)
    with operands.on(weight):
        find_not_finite[(triton.cdiv(numel, TILE),)](values, found, flags, numel, TILE=TILE)
        write_groups[(triton.cdiv(groups, block),)](
            written,
            values,
            found,
            status,
            groups,
            KEEP=keep,
            GROUP=group,
            INNER=weight[0, 0].numel(),
            WIDTH=width,
            BLOCK=block,
        )
    if written is not mask:
        mask.copy_(written)
    return status
