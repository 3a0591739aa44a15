"""What teaches in phase 2: a full net that learns from labels, from the student, or no more, as a frozen copy."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from small_run import batches, net, recipe
from test_packed import student as pruned_student
from test_resume import SHORT, StopAt, assert_same, outcome, trainer
from test_train_ranks import parts

from pqk_fast.branches import branch, pqk_layers
from pqk_fast.config import Phase2Config
from pqk_fast.losses import DistillationLoss
from pqk_fast.prepare import convert
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer
from pqk_fast.training.averaging import BATCHES
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.objectives import MutualDistillation

FROZEN = replace(SHORT["phase2"], teacher_rest=9)
AVERAGED = replace(FROZEN, teacher_average=4)


def test_what_the_full_net_learns_from_and_until_when():
    """One way it has the labels alone, frozen nothing; its pruned weights show it."""
    x, y = batches(0)[0]

    def gradients(step, **settings):
        """Of weights that only the full net has, and of the student's, by size."""
        torch.manual_seed(0)
        model = pruned_student(net(), sparsity=0.5)
        phase = Phase2Config(steps=10, distill_start=2, lr_drops=(), **settings)
        objective = MutualDistillation(model, phase, "two_pass")
        frozen = objective.set_step(step)
        assert frozen == (step == 7)
        objective(x, y).backward()
        layers = pqk_layers(model).values()
        own = sum(float(layer.weight.grad[~layer.weight_mask].abs().sum()) for layer in layers)
        return own, sum(float(layer.weight.grad[layer.weight_mask].abs().sum()) for layer in layers)

    one_way = {"distillation": "one_way"}
    assert gradients(1, **one_way) == gradients(1), "cross-entropy alone"
    assert gradients(5, **one_way)[1] == gradients(5)[1]
    assert gradients(5, **one_way)[0] == gradients(1)[0] != gradients(5)[0]
    assert gradients(6, teacher_rest=3) == gradients(6)
    assert gradients(7, teacher_rest=3)[0] == 0.0


def test_a_frozen_teacher_is_the_full_net_as_it_was():
    """In evaluation mode, and nothing moves it: not the batches, and not what the student learns."""
    x, y = batches(0)[0]
    torch.manual_seed(0)
    model = pruned_student(net(), sparsity=0.5)
    phase = Phase2Config(steps=10, distill_start=2, lr_drops=(), teacher_rest=4, alpha=0.25, beta=0.75)
    objective = MutualDistillation(model, phase, "two_pass")
    assert not objective.set_step(5)
    assert objective.runs_full_net
    objective(x, y).backward()
    assert objective.set_step(6)
    assert not objective.runs_full_net
    with torch.no_grad():
        model.eval()
        logits = branch(model, "teacher")(x)
        model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6, 10):
        assert not objective.set_step(step)
        optimizer.zero_grad()
        loss = objective(x, y)
        expected = DistillationLoss(0.25, 0.75)(branch(copy.deepcopy(model), "student")(x), logits, y)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        optimizer.step()
    model.eval()
    assert not torch.allclose(branch(model, "teacher")(x), logits)  # the one in the network has moved


def test_where_a_frozen_teacher_is_saved_it_is_gone_on_with():
    x, _ = batches(0)[0]
    torch.manual_seed(0)
    model = pruned_student(net(), sparsity=0.5)
    phase = Phase2Config(steps=10, distill_start=2, lr_drops=(), teacher_rest=4)
    first, again = (MutualDistillation(model, phase, "two_pass") for _ in range(2))
    assert first.further_state() == {}
    first.set_step(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # as training does, later
    again.load_further_state(first.further_state())
    assert again.set_step(8), "what ranks wrap has yet to be made for it"
    torch.testing.assert_close(again.teacher(x), first.teacher(x), rtol=0, atol=0)


def test_a_copy_of_mean_weights():
    """The mean of those that three steps leave; its BatchNorm takes statistics from the batches at first."""
    torch.manual_seed(0)
    model = pruned_student(net(), sparsity=0.5)
    phase = Phase2Config(steps=100, distill_start=2, lr_drops=(), teacher_rest=90, teacher_average=3)
    objective = MutualDistillation(model, phase, "two_pass")
    seen = []
    for step in range(10):
        assert not objective.set_step(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        seen.append(copy.deepcopy(model))
    assert objective.set_step(10)
    mean = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, *values in zip(*(one.parameters() for one in (mean, *seen[-3:])), strict=True):
            parameter.copy_(torch.stack(values).mean(0))
    for name, value in convert(mean, "teacher").state_dict().items():
        torch.testing.assert_close(objective.teacher.state_dict()[name], value)
    torch.testing.assert_close(model.state_dict(), seen[-1].state_dict(), rtol=0, atol=0)
    before = objective.teacher[1].running_mean.clone()
    x, y = batches(0)[0]
    objective(x, y)
    assert not torch.equal(objective.teacher[1].running_mean, before)
    changes = [step for step in range(11, 100) if objective.set_step(step)]
    assert changes == [10 + BATCHES]
    before = objective.teacher[1].running_mean.clone()
    objective(x, y)
    assert torch.equal(objective.teacher[1].running_mean, before)


@pytest.mark.parametrize("average", [0, 4])
def test_a_run_stopped_before_or_after_the_teacher_froze_ends_in_the_same_bits(tmp_path, average):
    phase2 = replace(FROZEN, teacher_average=average)
    whole = trainer(None, phase2=phase2)
    whole.fit(batches(0), batches(1))
    for stop in (25 + 9, 25 + 10, 25 + 11, 25 + 16):
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            trainer(out, phase2=phase2, callbacks=[StopAt(stop, signal.SIGTERM)]).fit(batches(0), batches(1))
        again = trainer(out, phase2=phase2, resume=True, seed=3)
        again.fit(batches(0), batches(1))
        assert_same(outcome(again), outcome(whole))


def test_compiled_steps_know_the_frozen_teacher():
    runs = [Trainer(net(), recipe(**{**SHORT, "phase2": AVERAGED}), compile=compiled) for compiled in (False, True)]
    for run in runs:
        run.fit(batches(0))
    losses = [[row["loss"] for row in run.results["phase2"].rows] for run in runs]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)


def fit_on_rank():
    rank, world = dist.get_rank(), dist.get_world_size()
    run = Trainer(net(), recipe(**{**SHORT, "phase2": AVERAGED}))
    run.fit(parts(batches(0), rank, world))
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def test_a_full_net_that_ends_as_nobodys_teacher_has_no_curve():
    run = Trainer(net(), recipe(**{**SHORT, "phase2": FROZEN}))
    result = run.fit(batches(0), batches(1))["phase2"]
    assert list(result.views) == list(result.best) == ["validation"]
    assert not any("validation_f" in row for row in result.rows)


def test_ranks_do_not_wait_for_a_full_net_that_rests():
    one, other = on_ranks(fit_on_rank)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_more_steps_than_phase_2_has_are_refused():
    most = FROZEN.steps - FROZEN.distill_start
    with pytest.raises(ConfigError, match=f"teacher_rest must be 0 to {most}, the steps with distillation, got 21"):
        replace(FROZEN, teacher_rest=21)
    with pytest.raises(ConfigError, match=f"got {most + 1}"):
        replace(FROZEN, teacher_rest=most + 1)
    with pytest.raises(ConfigError, match="teacher_average must be 0 to 11, the steps before rest, got 12"):
        replace(FROZEN, teacher_average=12)
    with pytest.raises(ConfigError, match="teacher_average must be 0 to 0, "):
        replace(FROZEN, teacher_rest=0, teacher_average=1)
