"""The step sizes' own rates: a share of the weights', or LSQ's gradient scale as a rate."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_run import batches, net, recipe
from torch import nn

import pqk_fast as pqk
from pqk_fast.branches import pqk_layers
from pqk_fast.config import PhaseConfig
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer


def prepared(**config):
    return pqk.prepare(net(), pqk.PQKConfig(sparsity=0.5, mask_interval=2, **config))


def rate_of(groups, parameter):
    (group,) = [group for group in groups if any(p is parameter for p in group["params"])]
    assert group["weight_decay"] == 0.0
    return group["lr"], group["lr_scale"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("channels", [False, True], ids=["a layer", "a channel"])
@pytest.mark.parametrize("step_lr", [None, 0.2, 0.05])
def test_lsq_rates_by_hand(bits, channels, step_lr):
    model = prepared(bits=bits, per_channel=channels)
    groups = pqk.param_groups(model, 0.2, step_lr, weight_decay=1e-3, step_lr_rule="lsq")
    for name, weights in {"0": 8 * (1 if channels else 32), "3": 32 * (1 if channels else 3)}.items():
        divided = math.sqrt(weights * (2 ** (bits - 1) - 1))
        scale = 1e-4 if step_lr is None else step_lr / 0.2
        lr, lr_scale = rate_of(groups, model.get_submodule(name).weight_step)
        assert lr == pytest.approx(0.2 * scale / divided)
        assert lr_scale == pytest.approx(scale / divided)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    ), "each once"
    assert (groups[0]["lr"], groups[0]["weight_decay"], groups[0]["lr_scale"]) == (0.2, 1e-3, 1.0)


def test_layers_of_one_rate_share_a_group_and_tied_ones_are_there_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    groups = pqk.param_groups(pqk.prepare(model, pqk.PQKConfig()), 0.1, 0.1, step_lr_rule="lsq")
    assert len(groups) == 2
    assert [id(p) for p in groups[1]["params"]] == [id(model[0].weight_step), id(model[1].weight_step)]


@pytest.mark.parametrize("rule", [{}, {"step_lr_rule": "flat"}], ids=["default", "flat"])
def test_flat_is_two_groups_in_the_order_of_the_parameters(rule):
    model = prepared()
    weights, steps = pqk.param_groups(model, 0.2, 0.05, weight_decay=1e-3, **rule)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in weights["params"]] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"
    ]  # fmt: skip
    assert [names[id(p)] for p in steps["params"]] == ["0.weight_step", "3.weight_step"]
    assert {k: v for k, v in weights.items() if k != "params"} == {"lr": 0.2, "weight_decay": 1e-3, "lr_scale": 1.0}
    assert {k: v for k, v in steps.items() if k != "params"} == {"lr": 0.05, "weight_decay": 0.0, "lr_scale": 0.25}


def test_frozen_step_sizes_have_no_group():
    model = prepared()
    pqk.Pruner(model, 1, 1)
    assert len(pqk.param_groups(pqk.start_phase2(model), 0.1, step_lr_rule="lsq")) == 1


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="step_lr_rule must be one of flat, lsq; got 'LSQ'"):
        pqk.param_groups(prepared(), 0.1, step_lr_rule="LSQ")
    with pytest.raises(ConfigError, match="step_lr_rule must be one of flat, lsq; got 'none'"):
        PhaseConfig(step_lr_rule="none")


class Scaled(torch.autograd.Function):
    """LSQ's ``grad_scale``: the value as it is, the gradient times a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def by_hand(model, lr):
    """SGD with one rate for all, with the step sizes' gradients scaled as in LSQ's paper."""
    momentum = {}
    for number, (x, y) in enumerate(batches(0)):
        learning = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        used = {name: p for name, p in learning.items() if ".teacher_" not in name}
        for name, layer in pqk_layers(model).items():
            weights = layer.weight.numel() / layer.weight_step.numel()
            factor = 1 / math.sqrt(weights * (2 ** (layer.bits - 1) - 1))
            used[f"{name}.weight_step"] = Scaled.apply(learning[f"{name}.weight_step"], factor)
        F.cross_entropy(torch.func.functional_call(model, used, x), y).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (grad := learning[name].grad) is not None:
                    momentum[name] = grad if number == 0 else 0.9 * momentum[name] + grad
                    parameter -= lr * momentum[name]
    return model


@pytest.mark.parametrize("channels", [False, True], ids=["a layer", "a channel"])
def test_with_sgd_the_rates_are_lsqs_gradient_scale(channels):
    model = prepared(step_init="lsq", ste="clipped", per_channel=channels)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = by_hand(copy.deepcopy(model), 0.1)
    optimizer = torch.optim.SGD(pqk.param_groups(model, 0.1, 0.1, step_lr_rule="lsq"), momentum=0.9)
    for x, y in batches(0):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-7)
        if name.endswith("weight_step"):
            moved = (parameter - start[name]).abs().max()
            assert moved > 1e-3 * start[name].abs().max(), "far more than the tolerance"


@pytest.mark.parametrize("rule", ["flat", "lsq"])
def test_the_trainer_takes_the_recipes_rule(rule):
    phase = PhaseConfig(steps=9, epoch_steps=9, lr_drops=(3,), weight_decay=1e-4, step_lr_scale=0.5, step_lr_rule=rule)
    trainer = Trainer(net(), recipe(phase1=phase))
    steps = []
    original = trainer._step
    trainer._step = lambda stage, before: steps.append(original(stage, before)) or steps[-1]
    trainer.phase1(batches(0))
    groups = steps[0].optimizer.param_groups
    for name, weights in {"0": 8 * 32, "3": 32 * 3}.items():
        lr, _ = rate_of(groups, trainer.model.get_submodule(name).weight_step)
        assert lr == pytest.approx(0.1 * 0.1 * 0.5 / (math.sqrt(weights * 7) if rule == "lsq" else 1)), "after the drop"
    assert groups[0]["lr"] == pytest.approx(0.01)
