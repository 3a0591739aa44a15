"""Guards: each sign of trouble is found and named, and healthy training raises none."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pqk_fast import (
    MutualDistillationLoss,
    PQKConfig,
    Pruner,
    dual_forward,
    param_groups,
    prepare,
    start_phase2,
)
from pqk_fast.branches import pqk_layers
from pqk_fast.guards import LEAST_KEPT, check_masks, find_problems
from pqk_fast.models.res8 import res8_narrow
from pqk_fast.reference import group_mask

EPOCH = 32


def mlp(seed=0):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 20, 64), nn.BatchNorm1d(64), nn.ReLU())
    return nn.Sequential(*head, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))


def res8(seed=0):
    torch.manual_seed(seed)
    return res8_narrow()


MODELS = pytest.mark.parametrize("make", [mlp, res8])


def batches(seed):
    """Noisy copies of twelve patterns: ``x [16, 16, 20]``, ``y [16]``."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(12, 16, 20, generator=generator)
    while True:
        y = torch.randint(12, (16,), generator=generator)
        yield patterns[y] + torch.randn(16, 16, 20, generator=generator), y


def phase1(model, config, lr=0.05, steps=3 * EPOCH, seed=0, look=lambda: None):
    prepare(model, config)
    optimizer = torch.optim.SGD(param_groups(model, lr, weight_decay=1e-5), momentum=0.9)
    pruner = Pruner(model, steps, 8)
    for _, (x, y) in zip(range(steps), batches(seed), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        look()  # when the mask is at its oldest
        pruner.step()
    return model


CONFIG = PQKConfig(sparsity=0.9, mask_interval=8)
HEALTHY = [
    CONFIG,
    PQKConfig(sparsity=0.9, mask_interval=8, mask_gradients=True),
    PQKConfig(bits=2, sparsity=0.8, mask_interval=8, ste="clipped", per_channel=True),
    PQKConfig(sparsity=0.9, mask_interval=8, mask_end=0.5),
    PQKConfig(sparsity=0.9, mask_interval=8, scope="layer"),
]


@MODELS
@pytest.mark.parametrize("config", HEALTHY, ids=lambda c: f"{c.bits}-{c.ste}-{c.mask_gradients}-{c.mask_end}-{c.scope}")
def test_healthy_training_raises_no_alarm_in_either_phase(make, config):
    model = make()
    looked_at = []

    def look():
        assert find_problems(model) == []
        check_masks(model)
        kept = [(int(layer.weight_mask.sum()), layer.weight.numel()) for layer in pqk_layers(model).values()]
        looked_at.extend(k for k, n in kept if LEAST_KEPT <= k <= n / 3)

    phase1(model, config, look=look)
    assert looked_at, "the masks were really compared"
    start_phase2(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.05, weight_decay=1e-5), momentum=0.9)
    loss = MutualDistillationLoss()
    for _, (x, y) in zip(range(12), batches(1), strict=False):
        optimizer.zero_grad()
        loss(*dual_forward(model, x), y).backward()
        optimizer.step()
        look()


def small(config=CONFIG):
    """Prepared, in phase 1, the largest quarter of each weight kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.BatchNorm1d(60), nn.LayerNorm(60), nn.Linear(60, 10), nn.Linear(10, 3))
    prepare(model, PQKConfig(**{**config.__dict__, "exclude": ("4",)}))
    for layer in pqk_layers(model).values():
        size = layer.weight.abs()
        layer.weight_mask.copy_(size >= size.flatten().kthvalue(size.numel() * 3 // 4).values)
    return model


def fill(tensor, value, index=None):
    with torch.no_grad():
        (tensor if index is None else tensor.view(-1)[index]).fill_(value)


def prune_all(m):
    m[3].weight_mask.fill_(False)


def scale(layer, mean_over_end):
    """Scale the weight so that the kept magnitudes' mean is this many times the grid's end."""
    with torch.no_grad():
        mean = layer.weight.abs()[layer.weight_mask].mean()
        layer.weight.mul_(mean_over_end * (2 ** (layer.bits - 1) - 1) * layer.weight_step / mean)


# (what happens to `small()`, the layer named, kind, fatal, what the message says)
TROUBLE = [
    (prune_all, "3", "dead", False, "layer '3': the mask prunes every weight.*layer_sparsity"),
    (lambda m: fill(m[0].weight_step, 9.0), "0", "empty", False, "layer '0': every kept weight is quantized to zero"),
    (lambda m: scale(m[0], 8.1), "0", "runaway", False, r"layer '0': kept weights are on average 8\.1 times.*clipped"),
    (lambda m: fill(m[0].weight_step, 1e-12), "0", "runaway", False, "layer '0': kept weights are on average"),
    (lambda m: fill(m[3].weight_step, -1.0), "3", "step", True, "step size of layer '3' is -1 to -1.*step_lr"),
    (lambda m: fill(m[3].weight_step, 0.0), "3", "step", True, "step size of layer '3' is 0 to 0"),
    (lambda m: fill(m[3].weight_step, torch.nan), "3", "step", True, "step size of layer '3' is nan to nan"),
    (lambda m: fill(m[3].weight_step, torch.inf), "3", "step", True, "step size of layer '3' is inf to inf"),
    (lambda m: fill(m[3].weight, torch.nan, 5), "3", "weight", True, r"parameter '3\.weight' holds NaN.*learning rate"),
    (lambda m: fill(m[3].weight, torch.inf), "3", "weight", True, r"parameter '3\.weight' holds NaN or infinity"),
    (lambda m: fill(m[3].bias, torch.inf, 5), "3", "weight", True, r"parameter '3\.bias' holds NaN or infinity"),
    (lambda m: fill(m[4].weight, -torch.inf, 2), "4", "weight", True, r"parameter '4\.weight' holds NaN or infinity"),
    (lambda m: fill(m[2].weight, torch.nan, 2), "2", "weight", True, r"parameter '2\.weight' holds NaN or infinity"),
    (lambda m: fill(m[1].teacher_bias, torch.nan), "1", "weight", True, r"parameter '1\.teacher_bias' holds NaN"),
    (
        lambda m: fill(m[1].running_mean, torch.nan, 3),
        "1",
        "statistics",
        True,
        r"BatchNorm statistics '1\.running_mean'",
    ),
    (lambda m: fill(m[1].running_var, torch.inf, 3), "1", "statistics", True, r"BatchNorm statistics '1\.running_var'"),
    (lambda m: fill(m[1].running_var, -1.0, 3), "1", "statistics", True, "negative variance"),
    (
        lambda m: fill(m[1].teacher_running_var, torch.nan, 3),
        "1",
        "statistics",
        True,
        r"full net's BatchNorm statistics '1\.teacher_running_var'",
    ),
    (lambda m: m[0].set_phase(2), "1", "phase", True, "'1', '3' in phase 1, '0' in phase 2"),
    (lambda m: [m[0].set_phase(2), m[3].set_phase(2)], "1", "phase", True, "'1' in phase 1, '0' in phase 2"),
]


@pytest.mark.parametrize(("happens", "name", "kind", "fatal", "message"), TROUBLE)
def test_trouble_is_named_with_its_kind_and_remedy(happens, name, kind, fatal, message):
    model = small()
    assert find_problems(model) == []
    happens(model)
    (problem,) = find_problems(model)
    assert (problem.layer, problem.kind, problem.fatal) == (name, kind, fatal)
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(str(problem))


def test_several_problems_are_all_told():
    model = small()
    fill(model[0].weight, torch.nan, 0)
    fill(model[3].weight_step, -1.0)
    fill(model[1].running_var, torch.nan)
    assert {(p.layer, p.kind) for p in find_problems(model)} == {("0", "weight"), ("1", "statistics"), ("3", "step")}


def test_what_comes_close_is_no_alarm():
    model = small()
    scale(model[0], 7.9)
    fill(model[3].weight_step, 1.9 * float(model[3].weight.detach().abs().max()))
    model[3].weight_mask.fill_(False)
    model[3].weight_mask.view(-1)[int(model[3].weight.abs().argmax())] = True
    assert find_problems(model) == []


def test_one_bad_channel_is_found_and_some_empty_ones_are_no_alarm():
    model = small(PQKConfig(per_channel=True))
    fill(model[0].weight_step, 9.0, slice(0, 59))
    model[0].weight_mask[3] = False
    assert find_problems(model) == []
    fill(model[0].weight_step, torch.nan, 4)
    assert [problem.kind for problem in find_problems(model)] == ["step"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)
        self.b.weight = self.a.weight


def test_layers_of_one_weight_must_share_mask_and_step():
    torch.manual_seed(0)
    model = prepare(Tied())
    model.b._buffers["weight_mask"] = model.b.weight_mask.clone()
    assert find_problems(model) == [], "equal is enough"
    model.b.weight_mask[0, 0] = False
    (problem,) = find_problems(model)
    assert (problem.layer, problem.kind, problem.fatal) == ("b", "twins", True)
    assert "'a' and 'b' share a weight but not weight_mask:" in problem.message
    model.b.weight_step = nn.Parameter(2 * model.a.weight_step.detach())
    assert "not weight_mask and weight_step:" in find_problems(model)[0].message
    model = prepare(Tied())
    model.load_state_dict(model.state_dict(), assign=True)
    (problem,) = find_problems(model)
    assert "'a' and 'b' hold one weight as two parameters" in problem.message
    model = prepare(Tied())
    fill(model.a.weight, torch.nan)
    assert [(p.layer, p.kind) for p in find_problems(model)] == [("a", "weight")], "told once"
    model = prepare(Tied())
    model.a.weight_mask.copy_(torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.2)
    with pytest.raises(ValueError, match=r"layer 'a' \([^']*$"):
        check_masks(model)
    model.a.weight_mask.fill_(False)
    assert [(p.layer, p.kind) for p in find_problems(model)] == [("a", "dead")]


def test_an_unprepared_model_is_refused():
    for guard in (find_problems, check_masks):
        with pytest.raises(ValueError, match=r"call pqk_fast\.prepare"):
            guard(nn.Linear(2, 2))


def test_layers_without_weights_are_healthy():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))
    prepare(model)
    assert find_problems(model) == []
    check_masks(model)


class CountReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_numbers_are_not_read_one_by_one():
    model = small()
    with CountReads() as count:
        bool(model[0].weight_mask.any())
        assert count.reads == 1
        find_problems(model)
        assert count.reads == 1


def masks_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("weight_mask")}


@MODELS
def test_masks_of_another_checkpoint_are_refused_by_the_layers_names(make):
    config = PQKConfig(sparsity=0.8, mask_interval=8, scope="layer")
    model, other = phase1(make(0), config), phase1(make(1), config, seed=1)
    check_masks(model)
    large = [name for name, layer in pqk_layers(model).items() if layer.weight_mask.sum() >= LEAST_KEPT]
    model.load_state_dict(masks_of(other), strict=False)
    with pytest.raises(ValueError, match="the mask does not belong to the weight of layer") as caught:
        check_masks(model)
    for name in large:
        assert f"{name!r} (" in str(caught.value)
    assert "by chance 20%" in str(caught.value)
    start_phase2(model)
    check_masks(model)  # nothing to compare with


def test_one_foreign_mask_is_enough():
    model = small()
    check_masks(model)
    shuffled = torch.randperm(1200, generator=torch.Generator().manual_seed(1))
    model[0].weight_mask.copy_(model[0].weight_mask.view(-1)[shuffled].view(60, 20))
    with pytest.raises(
        ValueError, match=r"layer '0' \(2\d% of those kept are among the largest, by chance 25%\): load"
    ):
        check_masks(model)


def test_masks_are_not_judged_where_that_cannot_be():
    foreign = torch.rand(60, 20, generator=torch.Generator().manual_seed(1))
    for share in (1.0, 0.4, 0.09):  # all kept, more than a third, fewer than 128
        model = small()
        model[0].weight_mask.copy_(foreign < share)
        check_masks(model)
    frozen = small(PQKConfig(mask_end=0.5))
    frozen[0].weight_mask.copy_(foreign < 0.3)
    check_masks(frozen)
    check_masks(frozen, fresh=False)
    with pytest.raises(ValueError, match="does not belong to the weight of layer '0'"):
        check_masks(frozen, fresh=True)
    moving = small()
    moving[0].weight_mask.copy_(foreign < 0.3)
    check_masks(moving, fresh=False)
    with pytest.raises(ValueError, match="does not belong"):
        check_masks(moving)


def test_masks_in_groups_are_compared_in_groups():
    """Half of the inputs hardly matter, but of each group half is kept."""
    torch.manual_seed(0)
    model = prepare(nn.Linear(64, 64), PQKConfig(scope="group", sparsity=0.5))
    with torch.no_grad():
        model.weight[:, 32:] *= 1e-3
    model.weight_mask.copy_(group_mask(model.weight, 2, 4))
    check_masks(model)
    model.weight_mask.copy_(group_mask(torch.randn(64, 64), 2, 4))
    with pytest.raises(ValueError, match=r"layer '' \((4|5)\d% of those kept are among the largest, by chance 50%\)"):
        check_masks(model)


def test_weights_that_are_no_numbers_are_left_to_the_other_guard():
    model = small()
    fill(model[0].weight, torch.nan, 0)
    check_masks(model)


def test_a_stale_mask_is_told_from_a_foreign_one():
    """Weights moved by as much as they are large, far more than between two masks, are not taken for another's."""
    model = small()
    with torch.no_grad():
        model[0].weight += model[0].weight.std() * torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    check_masks(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(60, 20, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="does not belong"):
        check_masks(model)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_sharded_models_are_looked_at_whole():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small()
        expected = copy.deepcopy(model)
        fully_shard(model)
        assert find_problems(model) == []
        check_masks(model)
        for layer in (model[0], expected[0]):
            fill(layer.weight_step.to_local() if layer is model[0] else layer.weight_step, 9.0)
            layer.weight_mask.copy_(torch.rand(60, 20, generator=torch.Generator().manual_seed(1)) < 0.3)
        assert find_problems(model) == find_problems(expected) != []
        with pytest.raises(ValueError, match="layer '0'"):
            check_masks(model)
    finally:
        dist.destroy_process_group()
