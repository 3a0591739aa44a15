"""Two ranks through both phases, with DistributedDataParallel and with fully_shard, as one process does it.

The process that they are compared with takes the ranks' shards of a batch one after the other, each through BatchNorm
with its own statistics, and adds up half of each gradient. Halves are exact and a sum of two does not depend on the
order, so that there is nothing to round differently: weights are compared bit for bit.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RanksFailedError, everywhere, on_ranks
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import ops, sharding
from pqk_fast.branches import pqk_layers

STEPS = (30, 20)
EPOCH = 5
ROUNDED = (7, 15)  # before these steps' masks all weights are put on a coarse grid, so that many tie
WORLD = 2
CONFIG = pqk.PQKConfig(bits=4, sparsity=0.7, mask_interval=4, layer_sparsity={"3": 0.5})


def network() -> nn.Module:
    """The convolution's 7 rows do not divide by two ranks; the last layer's only row leaves one with none."""
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
    second = (nn.Conv2d(7, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    return pqk.prepare(nn.Sequential(*first, *second, nn.Linear(6 * 25, 8), nn.Linear(8, 1)), CONFIG)


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 2, 5, 5, generator=generator)
    return x, x[:, 0].mean((1, 2)) > 0


def distillation(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    both = [torch.cat([-out, out], 1) for out in (student, teacher)]
    return pqk.MutualDistillationLoss()(*both, y.long())


def loss_of(model: nn.Module, phase: int, rank: int, step: int) -> Tensor:
    x, y = batch_of(rank, step)
    if phase == 1:
        return F.binary_cross_entropy_with_logits(model(x).squeeze(1), y.float())
    return distillation(*pqk.dual_forward(model, x, mode="stacked" if step % 2 else "two_pass"), y)


def one_process(model: nn.Module, phase: int, step: int) -> None:
    """Rank 1's part first: what rank 0's BatchNorm has counted is what stays."""
    before = [buffer.clone() for buffer in model.buffers()]
    (loss_of(model, phase, 1, step) / WORLD).backward()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    (loss_of(model, phase, 0, step) / WORLD).backward()


def on_a_grid(model: nn.Module) -> None:
    for layer in pqk_layers(model).values():
        own = sharding.local(layer.weight)
        own.copy_((own * 16).round() / 16)


def run(model: nn.Module, wrap: Callable[[nn.Module], nn.Module] | None, after: Callable[[int, bool], None]) -> None:
    """Both phases; ``wrap`` is called at the start of each, None is one process with the batches of all ranks."""
    for phase, steps in zip((1, 2), STEPS, strict=True):
        if phase == 2:
            with torch.no_grad():
                model.eval()(batch_of(0, 0)[0])  # after which fully_shard's root is whole
            pqk.start_phase2(model.train())
        pruner = pqk.Pruner(model, steps, EPOCH) if phase == 1 else None
        wrapped = model if wrap is None else wrap(model)
        groups = pqk.param_groups(model, lr=0.1, step_lr=1e-3, weight_decay=1e-3)
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        for step in range(steps):
            optimizer.zero_grad()
            if wrap is None:
                one_process(model, phase, step)
            else:
                loss_of(wrapped, phase, dist.get_rank(), step).backward()
            optimizer.step()
            if step in ROUNDED and pruner is not None:
                on_a_grid(model)
            after(phase, pruner is not None and pruner.step())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: sharding.whole(tensor).clone() for name, tensor in named.items()}


def selected(layers: list[Any], sparsity: float) -> list[Tensor]:
    weights = [sharding.whole(layer.weight) for layer in layers]
    masks = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    ops.topk_mask_(masks, weights, sum(int(layer.weight_mask.sum()) for layer in layers))
    if sparsity:
        assert sum(int((~mask).sum()) for mask in masks) == ops.masked_count(weights, sparsity)
    return masks


def ddp(model: nn.Module) -> nn.Module:
    """Two forwards in a step: the second must not write buffers that the first one's backward needs."""
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(model, FSDPModule):
        for child in (model[0], model[3]):
            fully_shard(child)
        fully_shard(model)
    return model


def train(wrap: Callable[[nn.Module], nn.Module]) -> tuple[int, int, list[str]]:
    """Masks and weights after every step. Gives the masks made, those with ties, and what differs from one process."""
    expected: list[dict[str, Tensor]] = []
    alone = network()
    run(alone, None, lambda *_: expected.append(state_of(alone)))
    model = network()
    found: list[dict[str, Tensor]] = []
    made, tied, final = 0, 0, []

    def compare(phase: int, moved: bool) -> None:
        nonlocal made, tied
        found.append(state_of(model))
        layers = list(pqk_layers(model).values())
        assert [sharding.is_sharded(layer.weight) for layer in layers] == [wrap is fsdp] * 4
        masks = [layer.weight_mask.clone() for layer in layers]
        for theirs in everywhere(masks):
            assert all(torch.equal(a, b) for a, b in zip(theirs, masks, strict=True))
        if phase == 2:
            assert all(torch.equal(a, b) for a, b in zip(final, masks, strict=True))
        elif moved:
            final[:] = masks
            pools = ([layers[0], *layers[2:]], [layers[1]])
            last = len(found) == 28
            for pool, sparsity in zip(pools, (0.7, 0.5), strict=True):
                for layer, mask in zip(pool, selected(pool, sparsity * last), strict=True):
                    assert torch.equal(layer.weight_mask, mask)
            weights = torch.cat([sharding.whole(layer.weight).abs().flatten() for layer in pools[0]])
            kept = torch.cat([layer.weight_mask.flatten() for layer in pools[0]])
            made += 1
            tied += not bool(kept.all()) and bool(weights[kept].min() == weights[~kept].max())

    run(model, wrap, compare)
    assert len(found) == sum(STEPS)
    own = ("running_mean", "running_var")  # each rank's BatchNorm has its own
    differ = []
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if not torch.equal(a[name], value) and not (name.endswith(own) and dist.get_rank()):
                differ.append(f"{name} in step {step} by {float((a[name].double() - value.double()).abs().max()):g}")
    return made, tied, differ


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_fifty_steps_through_both_phases_are_those_of_one_process(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for made, tied, differ in on_ranks(train, wrap):
        assert not differ
        assert made == 7
        assert tied >= 2


def broadcasting() -> str:
    """DistributedDataParallel as it is by default."""
    model = nn.parallel.DistributedDataParallel(network())
    for step in range(3):
        model.module[0].weight_mask.view(-1)[step] = False
    pqk.start_phase2(model.module)
    try:
        pqk.dual_forward(model, batch_of(dist.get_rank(), 0)[0], "two_pass")
    except ValueError as error:
        return str(error)
    return "no error"


def test_two_passes_through_a_wrapper_that_rewrites_the_masks_are_refused() -> None:
    for message in on_ranks(broadcasting):
        assert "wrap the model with broadcast_buffers=False" in message


def fails(how: str) -> str:
    if how == "raise":
        raise ZeroDivisionError("on purpose")
    if how == "hang":
        time.sleep(60)
    return how


def test_the_harness_shows_a_ranks_traceback_and_ends_a_hang() -> None:
    assert on_ranks(fails, "not", world=1) == ["not"]
    with pytest.raises(RanksFailedError, match=r"^rank 0:\nTraceback(.*\n)*.*in fails(.*\n)*.*on purpose"):
        on_ranks(fails, "raise", world=1)
    assert on_ranks(fails, "not", world=1) == ["not"], "a new process"
    with pytest.raises(RanksFailedError, match=r"rank 0:\nno answer within 1 s"):
        on_ranks(fails, "hang", world=1, seconds=1)
