"""The Pruner: exact counts, the schedule's ends, and a set that lasts."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pqk_fast import (
    ConfigError,
    MutualDistillationLoss,
    PQKConfig,
    Pruner,
    dual_forward,
    param_groups,
    prepare,
    start_phase2,
)
from pqk_fast.branches import pqk_layers
from pqk_fast.reference import group_mask, sparsity_at


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 5)
    )


def weights_of(model):
    return [layer.weight for layer in pqk_layers(model).values()]


def masked(model):
    return sum(int((~layer.weight_mask).sum()) for layer in pqk_layers(model).values())


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.randint(5, (8,), generator=generator)


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.29])
def test_exactly_int_p_n_weights_are_masked_after_every_update_and_p_t_at_the_last(target):
    steps, epoch_steps, interval = 200, 20, 8
    model = prepare(small_model(), PQKConfig(sparsity=target, mask_interval=interval))
    total = sum(w.numel() for w in weights_of(model))
    optimizer = torch.optim.SGD(param_groups(model, 0.05, weight_decay=1e-3), momentum=0.9)
    pruner = Pruner(model, steps, epoch_steps)
    assert masked(model) == 0
    moved = []
    for step in range(steps):
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner.step():
            moved.append(step + 1)
            last = step + 1 == 192
            p = target if last else sparsity_at((step + 1) // epoch_steps, 10, target)
            assert masked(model) == int(p * total), step
            weights = torch.cat([w.detach().abs().flatten() for w in weights_of(model)])
            kept = torch.cat([layer.weight_mask.flatten() for layer in pqk_layers(model).values()])
            if not kept.all():
                assert weights[kept].min() >= weights[~kept].max()
    assert moved == list(range(8, 200, 8)), "multiples of the interval, none after the last step"
    assert pruner.finished
    assert masked(model) == int(target * total)
    assert pruner.sparsity() == pytest.approx(int(target * total) / total)


def test_the_set_stays_through_phase2_with_momentum_and_weight_decay():
    model = prepare(small_model(), PQKConfig(sparsity=0.8, mask_interval=4))
    optimizer = torch.optim.SGD(param_groups(model, 0.05, weight_decay=1e-2), momentum=0.9)
    pruner = Pruner(model, 20, 5)
    for step in range(20):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    start_phase2(model)
    masks = [layer.weight_mask.clone() for layer in pqk_layers(model).values()]
    steps = [layer.weight_step.clone() for layer in pqk_layers(model).values()]
    optimizer = torch.optim.SGD(param_groups(model, 0.05, weight_decay=1e-2), momentum=0.9, nesterov=True)
    loss = MutualDistillationLoss()
    for step in range(30):
        x, y = batch(step)
        loss(*dual_forward(model, x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, mask, size in zip(pqk_layers(model).values(), masks, steps, strict=True):
            assert torch.equal(layer.weight_mask, mask)
            assert torch.equal(layer.weight_step, size)
            assert torch.equal(layer.student_weight()[~mask], torch.zeros(int((~mask).sum())))


def test_pruned_weights_keep_learning_and_come_back():
    model = prepare(nn.Linear(4, 1, bias=False), PQKConfig(sparsity=0.5, mask_interval=1, initial_sparsity=0.5))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.9, 0.8, 0.1, 0.2]]))
    pruner = Pruner(model, 10, 1)
    assert model.weight_mask.tolist() == [[True, True, False, False]]
    optimizer = torch.optim.SGD(param_groups(model, 1.0))
    model(torch.tensor([[0.0, 0.0, -1.0, 0.0]])).sum().backward()
    optimizer.step()  # w[2] = .1 + 1 by Eq. 7, pruned as it is
    pruner.step()
    assert model.weight[0, 2].item() == pytest.approx(1.1)
    assert model.weight_mask.tolist() == [[True, False, True, False]]


def test_per_layer_targets_scope_and_exclusion():
    config = PQKConfig(sparsity=0.75, layer_sparsity={"0": 0.25}, mask_interval=1)
    model = prepare(small_model(), config)
    run_to_end(model, Pruner(model, 3, 1))
    conv, linear = pqk_layers(model).values()
    assert int((~conv.weight_mask).sum()) == int(0.25 * conv.weight.numel())
    assert int((~linear.weight_mask).sum()) == int(0.75 * linear.weight.numel())

    model = prepare(small_model(), PQKConfig(sparsity=0.6, scope="layer", mask_interval=1))
    run_to_end(model, Pruner(model, 3, 1))
    for layer in pqk_layers(model).values():
        assert int((~layer.weight_mask).sum()) == int(0.6 * layer.weight.numel())

    model = prepare(small_model(), PQKConfig(exclude=("re:0",)))
    assert list(pqk_layers(model)) == ["4"]
    with pytest.raises(ConfigError, match=r"layer_sparsity names layer '0' by several patterns with \[0.1, 0.2\]"):
        prepare(small_model(), PQKConfig(layer_sparsity={"0": 0.1, "re:.*": 0.2}))


def run_to_end(model, pruner):
    model(batch(0)[0])
    for _ in range(pruner.steps):
        pruner.step()


def test_mask_end_freezes_the_mask_early_at_the_target():
    config = PQKConfig(sparsity=0.8, mask_interval=4, mask_end=0.5)
    model = prepare(small_model(), config)
    total = sum(w.numel() for w in weights_of(model))
    pruner = Pruner(model, 40, 4)
    model(batch(0)[0])
    moved = [step + 1 for step in range(40) if pruner.step()]
    assert moved == [4, 8, 12, 16]
    assert masked(model) == int(0.8 * total)


def test_a_phase_shorter_than_one_interval_still_reaches_the_target():
    model = prepare(small_model(), PQKConfig(sparsity=0.5, mask_interval=32))
    Pruner(model, 5, 5)
    assert masked(model) == int(0.5 * sum(w.numel() for w in weights_of(model)))


def test_step_sizes_stay_positive():
    model = prepare(small_model())
    pruner = Pruner(model, 10, 5)
    model(batch(0)[0])
    with torch.no_grad():
        for layer in pqk_layers(model).values():
            layer.weight_step.fill_(-1.0)
    pruner.step()
    assert all(layer.weight_step.item() == pytest.approx(1e-12) for layer in pqk_layers(model).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_size_that_is_no_number_is_refused_by_the_layers_name(bad: float) -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), PQKConfig(mask_interval=2))
    pruner = Pruner(model, steps=10, epoch_steps=5)
    model(torch.ones(1, 8))
    with torch.no_grad():
        model[1].weight_step.fill_(bad)
    pruner.step()
    with pytest.raises(ValueError, match=rf"the step size of layer '1' is no positive number any more \({bad}"):
        pruner.step()


def test_nan_weights_are_refused_by_the_layers_name():
    model = prepare(small_model(), PQKConfig(mask_interval=1))
    pruner = Pruner(model, 10, 5)
    model(batch(0)[0])
    with torch.no_grad():
        pqk_layers(model)["4"].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the weight of layer '4' of shape .*NaN or infinity"):
        pruner.step()


def test_a_prepared_layer_that_never_ran_is_refused_by_name():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3, 3)
            self.idle = nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = prepare(Idle(), PQKConfig(mask_interval=3))
    pruner = Pruner(model, 10, 5)
    model(torch.randn(2, 3))
    pruner.step()
    pruner.step()  # a layer may run only sometimes
    with pytest.raises(ValueError, match=r"never ran in a forward in 3 steps: idle; .*exclude"):
        pruner.step()


def test_a_layer_pruned_away_whole_is_named():
    model = prepare(small_model(), PQKConfig(sparsity=0.9, mask_interval=1))
    pruner = Pruner(model, 3, 1)
    model(batch(0)[0])
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    pruner.step()
    with pytest.warns(UserWarning, match=r"final mask prunes every weight of layer 0: .*layer_sparsity"):
        pruner.step()


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="no PQK layers: call"):
        Pruner(small_model(), 10, 5)
    model = prepare(small_model(), PQKConfig(sparsity=0.5, mask_interval=1))
    with pytest.raises(ValueError, match="whole numbers of at least 1, got 0 and 5"):
        Pruner(model, 0, 5)
    pruner = Pruner(model, 2, 1)
    model(batch(0)[0])
    pruner.step()
    pruner.step()
    with pytest.raises(ValueError, match="announced with 2 steps"):
        pruner.step()
    start_phase2(model)
    with pytest.raises(ValueError, match="frozen in phase 2"):
        Pruner(model, 10, 5)


def test_tied_weights_are_counted_once_and_share_mask_and_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = prepare(Tied(), PQKConfig(sparsity=0.5, mask_interval=1))
    assert model.second.weight is model.first.weight
    assert model.second.weight_step is model.first.weight_step
    model = copy.deepcopy(model)
    assert model.second.weight is model.first.weight
    # what .to(another device) does to buffers
    model.second._buffers["weight_mask"] = model.second.weight_mask.clone()
    pruner = Pruner(model, 3, 1)
    model(torch.randn(2, 6))
    for _ in range(3):
        pruner.step()
    assert int((~model.first.weight_mask).sum()) == 18
    assert torch.equal(model.first.weight_mask, model.second.weight_mask)


def test_the_config_is_found_in_a_wrapped_model_and_must_be_one():
    inner = prepare(small_model(), PQKConfig(sparsity=0.5, mask_interval=1, teacher_bn="copy"))
    inner[1].running_mean.fill_(3.0)
    wrapped = nn.Sequential(inner)
    run_to_end(wrapped, Pruner(wrapped, 3, 1))
    assert masked(wrapped) == int(0.5 * sum(w.numel() for w in weights_of(wrapped)))
    mean = inner[1].running_mean.clone()
    start_phase2(wrapped)
    assert torch.equal(inner[1].teacher_running_mean, mean)
    apart = nn.ModuleList([prepare(small_model(), PQKConfig(bits=bits)) for bits in (2, 4)])
    with pytest.raises(ValueError, match="prepared with different configs"):
        Pruner(apart, 3, 1)


def test_state_dict_goes_on_where_it_was():
    config = PQKConfig(sparsity=0.8, mask_interval=4)
    model = prepare(small_model(), config)
    pruner = Pruner(model, 40, 4)
    model(batch(0)[0])
    for _ in range(10):
        pruner.step()
    state, saved = copy.deepcopy(model.state_dict()), pruner.state_dict()
    resumed = prepare(small_model(1), config)
    again = Pruner(resumed, 40, 4)
    resumed.load_state_dict(state)
    again.load_state_dict(saved)
    assert masked(resumed) == masked(model) > 0
    resumed(batch(0)[0])
    assert [pruner.step() for _ in range(30)] == [again.step() for _ in range(30)]
    assert masked(resumed) == masked(model)
    with pytest.raises(ValueError, match="steps=40, this one 41"):
        Pruner(prepare(small_model()), 41, 4).load_state_dict(saved)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (2, 3), (3, 10)])
def test_groups_of_inputs_keep_n_of_m(keep: int, group: int) -> None:
    model = nn.Sequential(nn.Conv2d(group, 2 * group, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * group * 4, 5))
    sparsity = 1 - keep / group
    prepare(model, PQKConfig(sparsity=sparsity, scope="group", group_size=group, mask_interval=2))
    optimizer = torch.optim.SGD(param_groups(model, 0.001))
    pruner = Pruner(model, steps=20, epoch_steps=4)
    seen = []
    for _ in range(20):
        model(torch.randn(3, group, 4, 4)).square().sum().backward()
        optimizer.step()
        if pruner.step():
            for layer in pqk_layers(model).values():
                n = int(layer.weight_mask[0, :group].reshape(group, -1)[:, 0].sum())
                assert n == group or torch.equal(layer.weight_mask, group_mask(layer.weight, n, group))
        kept = [
            {int(n) for n in layer.weight_mask.unflatten(1, (-1, group)).sum(2).flatten()}
            for layer in pqk_layers(model).values()
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == 1
        seen.append(kept[0].pop())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == keep


def test_a_layer_that_does_not_divide_into_groups_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    prepare(model, PQKConfig(sparsity=0.5, scope="group"))
    with pytest.raises(ConfigError, match=r"layer '0' has a weight of shape \(8, 6\): .* leave it out by"):
        Pruner(model, 4, 1)
    model = prepare(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), PQKConfig(sparsity=0.5, scope="group", exclude=("0",))
    )
    Pruner(model, 4, 1)


def test_a_layers_own_target_in_groups() -> None:
    config = PQKConfig(sparsity=0.5, scope="group", layer_sparsity={"1": 0.75}, mask_interval=1)
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config)
    Pruner(model, 1, 1)
    assert [int(layer.weight_mask.sum()) for layer in pqk_layers(model).values()] == [32, 8]


def test_groups_that_cannot_be_ranked_are_named() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), PQKConfig(sparsity=0.5, scope="group"))
    with torch.no_grad():
        model[1].weight[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"the weight of layer '1' of shape .* holds NaN or infinity"):
        Pruner(model, 1, 1)


class Wrapped(nn.Module):
    """What Lightning and loops of one's own do: the prepared network is a part of the module."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_a_layers_own_sparsity_holds_within_whatever_the_pruner_is_given():
    config = PQKConfig(sparsity=0.75, layer_sparsity={"0": 0.25}, mask_interval=1)
    for wrap in (Wrapped, torch.compile):
        inner = prepare(small_model(), config)
        pruner = Pruner(wrap(inner), 3, 1)
        run_to_end(inner, pruner)
        conv, linear = pqk_layers(inner).values()
        assert int((~conv.weight_mask).sum()) == int(0.25 * conv.weight.numel())
        assert int((~linear.weight_mask).sum()) == int(0.75 * linear.weight.numel())
    with pytest.raises(ConfigError, match=r"layer_sparsity: 'conv' matches none"):
        Pruner(inner, 3, 1, config=PQKConfig(layer_sparsity={"conv": 0.5}))


@pytest.mark.parametrize("state_first", [True, False])
def test_the_models_state_and_the_position_load_in_any_order(state_first):
    config = PQKConfig(sparsity=0.9, mask_interval=2)
    model = prepare(small_model(), config)
    pruner = Pruner(model, 20, 5)
    for step in range(19):
        model(batch(step)[0])
        pruner.step()
    saved, position = copy.deepcopy(model.state_dict()), pruner.state_dict()
    for used in (False, True):  # a model that was pruned before, too
        other = prepare(small_model(1), config)
        if used:
            Pruner(other, 1, 1)
        if state_first:
            other.load_state_dict(saved)
        again = Pruner(other, 20, 5)
        if not state_first:
            other.load_state_dict(saved)
        again.load_state_dict(position)
        assert again.finished
        assert masked(other) == masked(model) == int(0.9 * sum(w.numel() for w in weights_of(model)))
        torch.testing.assert_close(other.state_dict(), saved, rtol=0, atol=0)
    anew = Pruner(other, 20, 5)
    assert masked(other) == 0, "a new phase 1"
    other(batch(0)[0])
    anew.step()


def test_a_pruner_that_is_kept_does_not_move_masks_in_phase_2():
    model = prepare(small_model(), PQKConfig(sparsity=0.5, initial_sparsity=0.25, mask_interval=1))
    pruner = Pruner(model, 9, 3)
    start_phase2(model)
    before = masked(model)
    with pytest.raises(ValueError, match="masks are frozen in phase 2: step the Pruner in phase 1 alone"):
        pruner.step()
    assert masked(model) == before


@pytest.mark.parametrize(
    ("steps", "epoch_steps", "settings", "at"),
    [(20, 5, {}, 0), (1000, 1000, {}, 992), (1000, 100, {"mask_end": 0.03}, 0), (1000, 100, {}, None)],
)
def test_a_schedule_that_prunes_all_at_once_is_named(steps, epoch_steps, settings, at):
    model = prepare(small_model(), PQKConfig(sparsity=0.5, **settings))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Pruner(model, steps, epoch_steps)
    said = [warning for warning in said if warning.category is UserWarning]  # not Triton's interpreter's
    found = [str(warning.message) for warning in said]
    assert len(found) == (at is not None)
    if found:
        assert f"all pruning happens at once, at step {at} of {steps}: Eq. 1 counts epochs of {epoch_steps}" in found[0]
        assert said[0].filename == __file__
