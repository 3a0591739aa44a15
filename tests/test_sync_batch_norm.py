"""SyncBatchNorm of prepared models: two ranks with parts of a batch do what one process does with all of it."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast.dual_batch_norm import DualSyncBatchNorm

SPLIT = 5  # of 12 samples rank 0 has 5, rank 1 has 7
SHAPES = [(12, 6), (12, 6, 5), (12, 6, 4, 3), (12, 6, 2, 3, 2)]


def batch(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Input and a gradient of the output, every sample on a scale and around a mean of its own."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    spread = torch.arange(1.0, 1 + shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (x * spread + spread + mean).to(dtype), grad.to(dtype)


def layer(kind: Any, dtype: torch.dtype, **settings: Any) -> Any:
    made = kind(6, **settings)
    generator = torch.Generator().manual_seed(5)
    for tensor in [*made.parameters(), *made.buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return made.to(dtype)


def mine(tensor: Tensor) -> Tensor:
    return tensor[:SPLIT] if dist.get_rank() == 0 else tensor[SPLIT:]


def results(module: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad)
    found = {"out": out.detach(), "x": x.grad}
    found |= {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: value.clone() for name, value in module.named_buffers()}


def compare(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, mean: float, settings: dict) -> None:
    x, grad = batch(shape, dtype, mean)
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    whole = results(layer(kinds[len(shape)], torch.float64, **settings), x.double(), grad.double())
    dual = DualSyncBatchNorm.from_float(layer(nn.SyncBatchNorm, dtype, **settings))
    part = results(dual, mine(x), mine(grad))
    assert part["out"].dtype == dtype
    for name, exact in whole.items():
        value = part[name]
        if name in ("out", "x"):
            exact = mine(exact)
        elif name.startswith("d "):
            dist.all_reduce(value)
        scale = float(exact.abs().max())
        torch.testing.assert_close(
            value.double(),
            exact.double(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# fp32: sums over at most 144 values; far from zero the input itself has fewer digits: 1000 / 10 of 2^-24 more
@pytest.mark.parametrize(
    ("dtype", "tolerance", "mean"),
    [(torch.float64, 1e-13, 0.0), (torch.float32, 2e-6, 0.0), (torch.float32, 2e-4, 1000.0)],
    ids=["fp64", "fp32", "fp32, far from zero"],
)
def test_equals_one_process_with_the_whole_batch(dtype: torch.dtype, tolerance: float, mean: float) -> None:
    for shape in SHAPES:
        on_ranks(compare, shape, dtype, tolerance, mean, {})


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_settings(settings: dict) -> None:
    on_ranks(compare, SHAPES[2], torch.float64, 1e-13, 0.0, settings)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def in_phase2(model: nn.Module) -> nn.Module:
    pqk.prepare(model, pqk.PQKConfig(sparsity=0.5, initial_sparsity=0.5))
    pqk.Pruner(model, 1, 1)
    return pqk.start_phase2(model)


def both_branches(mode: str) -> None:
    """Gradients of the mean loss over all samples, by DistributedDataParallel, which refuses nn.SyncBatchNorm here."""
    x = batch((12, 2, 4, 4), torch.float32)[0]
    whole, sync = in_phase2(network()), in_phase2(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    assert isinstance(sync[1], DualSyncBatchNorm)
    sync = nn.parallel.DistributedDataParallel(sync, broadcast_buffers=False)
    expected = pqk.dual_forward(whole, x, mode="two_pass")
    sum(out.square().sum() for out in expected).backward()
    got = pqk.dual_forward(sync, mine(x), mode=mode)
    (2 * sum(out.square().sum() for out in got)).backward()  # halved by the average over two ranks
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, mine(b), rtol=1e-5, atol=1e-5)
    wanted = dict(whole.named_parameters())
    for name, parameter in sync.module.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None
        else:
            scale = float(wanted[name].grad.abs().max())
            torch.testing.assert_close(
                parameter.grad,
                wanted[name].grad,
                rtol=0,
                atol=1e-5 * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(sync.module.get_buffer(name), buffer, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mode", ["two_pass", "stacked"])
def test_each_branch_has_the_statistics_of_all_ranks(mode: str) -> None:
    on_ranks(both_branches, mode)


def alone_or_evaluated() -> None:
    x, grad = batch(SHAPES[2], torch.float32)
    sync, plain = layer(nn.SyncBatchNorm, torch.float32), layer(nn.BatchNorm2d, torch.float32)
    duals = [DualSyncBatchNorm.from_float(copy.deepcopy(sync)).eval()]
    sync.process_group = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    duals.append(DualSyncBatchNorm.from_float(sync))
    for dual in duals:
        expected = results(copy.deepcopy(plain).train(dual.training), mine(x), mine(grad))
        found = results(dual, mine(x), mine(grad))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    model = nn.Sequential(nn.Linear(6, 6), nn.SyncBatchNorm(6, process_group=sync.process_group))
    student = pqk.convert(pqk.prepare(model))
    assert type(student[1]) is nn.SyncBatchNorm
    assert student[1].process_group is sync.process_group
    student.eval()(torch.randn(2, 6))


def test_in_evaluation_and_in_a_group_of_one_it_is_batch_norm() -> None:
    on_ranks(alone_or_evaluated)


def in_pairs() -> None:
    """Ranks 0 and 2 share one batch, 1 and 3 another."""
    rank = dist.get_rank()
    pairs = [dist.new_group([first, first + 2]) for first in (0, 1)]
    x, grad = (tensor * (1 + rank % 2) for tensor in batch(SHAPES[2], torch.float64))
    rows = slice(SPLIT) if rank < 2 else slice(SPLIT, None)
    whole = results(layer(nn.BatchNorm2d, torch.float64), x, grad)
    sync = layer(nn.SyncBatchNorm, torch.float64, process_group=pairs[rank % 2])
    part = results(DualSyncBatchNorm.from_float(sync), x[rows], grad[rows])
    torch.testing.assert_close(part["out"], whole["out"][rows])
    torch.testing.assert_close(part["x"], whole["x"][rows])
    torch.testing.assert_close(part["running_var"], whole["running_var"])


def test_only_the_groups_ranks_count() -> None:
    on_ranks(in_pairs, world=4)


def half_precision() -> None:
    x = batch(SHAPES[2], torch.bfloat16)[0]
    dual = DualSyncBatchNorm.from_float(layer(nn.SyncBatchNorm, torch.float32))
    out = dual(mine(x))
    assert out.dtype == torch.bfloat16
    exact = layer(nn.BatchNorm2d, torch.float32)(x.float())
    torch.testing.assert_close(out.float(), mine(exact), rtol=2**-8, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        dual(torch.ones(6))


def test_bf16_is_rounded_once() -> None:
    on_ranks(half_precision)


def test_without_torch_distributed_it_is_batch_norm() -> None:
    x, grad = batch(SHAPES[2], torch.float32)
    expected = results(layer(nn.BatchNorm2d, torch.float32), x, grad)
    found = results(DualSyncBatchNorm.from_float(layer(nn.SyncBatchNorm, torch.float32)), x, grad)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert DualSyncBatchNorm(6).process_group is None
