"""The selection of the weights to keep where they are spread over ranks (FSDP2's ``fully_shard``).

Each rank holds some rows (dimension 0) of a weight and the whole of its mask. The masks are those of
:mod:`pqk_fast.selection` for the gathered weights, bit for bit, though no weight leaves its rank: three histograms are
all-reduced, the numbers of ties and the bits of the masks gathered. What takes a group is called by all its ranks
together.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pqk_fast import selection

_FIRST_NOT_FINITE = 2040  # bin of level 0, see selection.magnitude_histogram


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor of which this rank holds a part only."""
    tensors = sys.modules.get("torch.distributed.tensor")  # not loaded: nobody can have made one
    if tensors is None or not isinstance(tensor, tensors.DTensor):
        return False
    return not all(placement.is_replicate() for placement in tensor.placements)


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor (some rows, maybe none), or the tensor itself; shares its memory, no gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard(model: nn.Module) -> bool:
    """Bring a model's parameters back into shards if ``fully_shard`` has spread it over ranks; True if it has.

    Its root stays whole after a forward without a backward; what is written to parameters then is lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]
    for module in wrapped:
        module.reshard()
    return bool(wrapped) or any(is_sharded(parameter) for parameter in model.parameters())


def _group_of(name: str, tensor: Any) -> dist.ProcessGroup:
    shards = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(shards) != 1 or not tensor.placements[shards[0]].is_shard(0):
        raise ValueError(
            f"the weight of layer {name!r} lies on the ranks as {tensor.placements}; masks can be made of weights that "
            "are sharded once, along dimension 0: use fully_shard without shard_placement_fn and tensor parallelism"
        )
    group: dist.ProcessGroup = tensor.device_mesh.get_group(shards[0])
    return group


def common_group(weights: Mapping[str, Tensor]) -> dist.ProcessGroup | None:
    """The ranks that the layers' weights are spread over, None if none is; beside them there may be whole ones.

    Raises ValueError, naming the layer, for weights sharded otherwise than by rows or over different ranks.
    """
    found: dist.ProcessGroup | None = None
    for name, weight in weights.items():
        if not is_sharded(weight):
            continue
        group = _group_of(name, weight)
        found = group if found is None else found
        if dist.get_process_group_ranks(group) != dist.get_process_group_ranks(found):
            raise ValueError(
                f"the weight of layer {name!r} is spread over other ranks than those before it: weights that are "
                "ranked together must be sharded over one mesh (fully_shard(..., mesh=mesh))"
            )
    return found


def any_rank(flags: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[bool]:
    """For each flag (bool []) whether it is set on any rank of the group."""
    if group is None:
        return [bool(flag) for flag in flags]
    told = torch.stack(list(flags)).int()
    dist.all_reduce(told, dist.ReduceOp.MAX, group)
    return [bool(flag) for flag in told.tolist()]


def _refuse_not_finite(weights: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """On all ranks, or others would wait for the one that found it."""
    bad = any_rank([~local(weight).isfinite().all() for weight in weights], group)
    if any(bad):
        raise selection.NonFiniteWeightError(bad.index(True), weights[bad.index(True)])


@torch.no_grad()
def topk_mask_(masks: Sequence[Tensor], weights: Sequence[Tensor], k: Tensor, group: dist.ProcessGroup) -> None:
    """:func:`pqk_fast.selection.topk_mask_` for weights of which some or all are spread over the ranks of ``group``.

    ``masks`` are whole and plain, and the same on all ranks afterwards; ``k`` int64 []. Whole weights, which every rank
    holds, count once. NonFiniteWeightError is raised on every rank.
    """
    if not sum(weight.numel() for weight in weights):
        return
    rank = dist.get_rank(group)
    sharded = [is_sharded(weight) for weight in weights]
    parts = [local(weight) for weight in weights]
    counted = [part if spread or rank == 0 else part[:0] for part, spread in zip(parts, sharded, strict=True)]

    def histogram(level: int, prefix: Tensor) -> Tensor:
        counts = selection.magnitude_histogram(counted, level, prefix)
        dist.all_reduce(counts, group=group)
        if level == 0 and bool(counts[_FIRST_NOT_FINITE:].any()):
            _refuse_not_finite(weights, group)
        return counts

    threshold, ties_kept = selection.topk_threshold(histogram, k)
    own = selection.tie_counts(counted, threshold)
    gathered = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(gathered, own, group)
    ties = gathered.view(-1, len(own)).T  # [tensors, ranks]: flat, in the order of the weights' flat indices
    before = ties.flatten().cumsum(0).view(ties.shape) - ties
    kept = (ties_kept - before).clamp(min=torch.zeros_like(ties), max=ties)
    # of a whole weight's ties, all are on rank 0's account
    kept = torch.stack([row[rank if spread else 0] for row, spread in zip(kept, sharded, strict=True)])
    chosen = [
        torch.empty_like(part, dtype=torch.bool) if spread else mask
        for part, spread, mask in zip(parts, sharded, masks, strict=True)
    ]
    selection.mask_at_threshold_(chosen, parts, threshold, kept)
    for mask, part, weight, spread in zip(masks, chosen, weights, sharded, strict=True):
        if spread:
            _gather_(mask, part, weight)


@torch.no_grad()
def group_mask_(mask: Tensor, weight: Tensor, keep: int, size: int, group: dist.ProcessGroup) -> None:
    """:func:`pqk_fast.selection.group_mask_` for a weight that is spread over the ranks of ``group``."""
    _refuse_not_finite([weight], group)
    part = local(weight)
    chosen = torch.empty_like(part, dtype=torch.bool)
    selection.group_mask_(chosen, part, keep, size)
    _gather_(mask, chosen, weight)


def _gather_(mask: Tensor, part: Tensor, weight: Any) -> None:
    """Every rank's rows of a mask into the whole one, in place."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": weight.shape, "stride": weight.stride()}
    mask.copy_(DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, **layout).full_tensor())
