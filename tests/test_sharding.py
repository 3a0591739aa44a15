"""Masks of weights in shards (fully_shard) are those of the whole weights, bit for bit; four ranks, some empty."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import ops, sharding
from pqk_fast.branches import pqk_layers

WORLD = 4
CONFIGS = {
    "global": {},
    "layer": {"scope": "layer"},
    "group": {"scope": "group", "group_size": 4, "sparsity": 0.5},
    "layer_sparsity": {"layer_sparsity": {"2": 0.3}},
}
# The first layer is left whole on every rank; then rows that do not divide by the ranks, fewer than ranks, one only.
ROWS = (6, 10, 3, 1)


def network(**settings: Any) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(8, ROWS[0]), nn.Conv2d(4, ROWS[1], 2), nn.Linear(8, ROWS[2]), nn.Linear(12, ROWS[3])]
    config = {"sparsity": 0.6, "initial_sparsity": 0.5, "mask_interval": 1} | settings
    return pqk.prepare(nn.Sequential(*layers), pqk.PQKConfig(**config))


def mesh_of(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    shape = {"ranks": (WORLD,), "2 x 2": (2, 2), "4 x 1": (4, 1)}[kind]
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard(model: nn.Module, mesh: str = "ranks", **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    shared_mesh = mesh_of(mesh)
    for child in (model[1], model[2]):
        fully_shard(child, mesh=shared_mesh, **options)
    whole = set(model[0].parameters())
    return fully_shard(model, mesh=shared_mesh, ignored_params=whole, **options)


def write(parameter: Tensor, values: Tensor) -> None:
    """``values`` into a parameter, or this rank's rows of them."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)


def mark_ran(model: nn.Module) -> None:
    for layer in pqk_layers(model).values():
        layer.ran = True


def same_masks(settings: dict, mesh: str) -> int:
    """Compares after every step; gives how many times ties at the threshold had to be broken."""
    whole, sharded = network(**settings), network(**settings)
    shard(sharded, mesh)
    local_rows = [sharding.local(layer.weight).shape[0] for layer in pqk_layers(sharded).values()]
    assert local_rows[0] == ROWS[0]
    if mesh == "ranks":
        assert [sum(rows) for rows in zip(*everywhere(local_rows[1:]), strict=True)] == list(ROWS[1:])
        assert min(rows[3] for rows in everywhere(local_rows)) == 0
    mark_ran(whole)
    mark_ran(sharded)
    pruners = [pqk.Pruner(model, steps=12, epoch_steps=3) for model in (whole, sharded)]
    generator, broken = torch.Generator().manual_seed(2), 0
    for step in range(13):
        masks = [[layer.weight_mask for layer in pqk_layers(model).values()] for model in (whole, sharded)]
        for a, b, name in zip(*masks, pqk_layers(whole), strict=True):
            assert type(b) is Tensor
            assert torch.equal(a, b), (step, name)
        weights = torch.cat([layer.weight.detach().abs().flatten() for layer in pqk_layers(whole).values()])
        kept = torch.cat([mask.flatten() for mask in masks[0]])
        broken += bool((weights[kept].unsqueeze(1) == weights[~kept].unsqueeze(0)).any())
        if step == 12:
            return broken
        levels = 2 if step % 2 else 9
        for a, b in zip(pqk_layers(whole).values(), pqk_layers(sharded).values(), strict=True):
            values = torch.randint(-levels, levels + 1, a.weight.shape, generator=generator) / 7
            write(a.weight, values)
            write(b.weight, values)
        assert len({pruner.step() for pruner in pruners}) == 1
    raise AssertionError("not reached")


@pytest.mark.parametrize("mesh", ["ranks", "2 x 2", "4 x 1"])
@pytest.mark.parametrize("config", CONFIGS)
def test_masks_are_those_of_the_whole_weights_with_ties(config: str, mesh: str) -> None:
    broken = on_ranks(same_masks, CONFIGS[config], mesh, world=WORLD)
    assert min(broken) >= 5


def refused(layer: int, settings: dict, bad: float, on_all: bool) -> str:
    """One value on one rank; the message of the error that every rank raises."""
    model = shard(network(**settings))
    mark_ran(model)
    pruner = pqk.Pruner(model, steps=4, epoch_steps=1)
    masks = [each.weight_mask.clone() for each in pqk_layers(model).values()]
    own = sharding.local(pqk_layers(model)[str(layer)].weight)
    if own.numel() and (on_all or dist.get_rank() == 0):
        own.view(-1)[-1] = bad
    with pytest.raises(ops.NonFiniteWeightError) as caught:
        pruner.step()
    if "scope" not in settings:  # else those of the layers before it are made
        for each, mask in zip(pqk_layers(model).values(), masks, strict=True):
            assert torch.equal(each.weight_mask, mask)
    return f"{caught.value.index} {caught.value}"


@pytest.mark.parametrize(("layer", "on_all"), [(2, False), (3, False), (0, True)])
@pytest.mark.parametrize("config", ["global", "layer", "group"])
def test_every_rank_refuses_what_one_cannot_rank_by_the_layers_name(layer: int, on_all: bool, config: str) -> None:
    for bad in (math.nan, -math.inf):
        said = on_ranks(refused, layer, CONFIGS[config], bad, on_all, world=WORLD)
        assert len(set(said)) == 1
        assert f"the weight of layer '{layer}' of shape ({ROWS[layer]}, " in said[0]
        assert said[0].startswith(str(layer if config == "global" else 0))


def step_sizes() -> str:
    model = shard(network(per_channel=True))
    mark_ran(model)
    pruner = pqk.Pruner(model, steps=4, epoch_steps=1)
    for layer in pqk_layers(model).values():
        sharding.local(layer.weight_step).fill_(-1.0)
    pruner.step()
    for layer in pqk_layers(model).values():
        assert (sharding.whole(layer.weight_step) == torch.tensor(1e-12)).all()
    assert "sharded (fully_shard)" in str(pruner.why_not_capturable())
    if dist.get_rank() == 1:
        sharding.local(model[1].weight_step).fill_(math.nan)
    with pytest.raises(ValueError, match="the step size") as caught:
        pruner.step()
    return str(caught.value)


def test_step_sizes_stay_positive_and_every_rank_names_one_that_is_no_number() -> None:
    said = on_ranks(step_sizes, world=WORLD)
    assert len(set(said)) == 1
    assert "the step size of layer '1' is no positive number any more (nan to nan)" in said[0]


def what_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    columns = fully_shard(network(), mesh=mesh_of("ranks"), shard_placement_fn=lambda p: Shard(min(1, p.dim() - 1)))
    with pytest.raises(ValueError, match=r"layer '0' lies on the ranks as \(Shard\(dim=1\),\).*along dimension 0"):
        pqk.Pruner(columns, 2, 1)
    apart = network()
    mesh = mesh_of("2 x 2")
    fully_shard(apart[0], mesh=mesh["replicate"])
    fully_shard(apart[1], mesh=mesh["shard"])
    with pytest.raises(ValueError, match="layer '1' is spread over other ranks than those before it"):
        pqk.Pruner(apart, 2, 1)
    with pytest.raises(ValueError, match="in shards: call prepare first, fully_shard after it"):
        pqk.prepare(fully_shard(nn.Sequential(nn.Linear(8, 8)), mesh=mesh_of("ranks")))
    for layers in ([nn.Linear(8, 8)], [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]):
        model = fully_shard(pqk.prepare(nn.Sequential(*layers)), mesh=mesh_of("ranks"))
        model(torch.ones(1, 8)).sum().item()  # the root's parameters stay whole after this
        assert not sharding.is_sharded(model[0].weight)
        with pytest.raises(ValueError, match=r"gather them with .*get_model_state_dict"):
            pqk.convert(model)
        assert sharding.is_sharded(model[0].weight)


def test_what_cannot_work_is_refused_with_the_remedy() -> None:
    on_ranks(what_is_refused, world=WORLD)


def converted() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = network(sparsity=0.5)
    mark_ran(model)
    expected = pqk.convert(copy.deepcopy(model)).state_dict()
    shard(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    fresh = network(sparsity=0.5)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    if dist.get_rank() == 0:
        fresh.load_state_dict(state)
        for name, value in pqk.convert(fresh).state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_gathered_state_dict_loads_into_a_model_that_converts() -> None:
    on_ranks(converted, world=WORLD)


def low_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for dtype in (torch.bfloat16, torch.float16):
        model = shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        with pytest.raises(TypeError, match=rf"as {dtype}.*leave MixedPrecisionPolicy's param_dtype unset.*autocast"):
            model[2](torch.ones(2, 8))
    model = shard(network(), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = model[2](torch.ones(2, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert sharding.whole(model[2].weight.grad).dtype == torch.float32


def test_low_precision_parameters_are_refused_and_autocast_works() -> None:
    on_ranks(low_precision, world=WORLD)
