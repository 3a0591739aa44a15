"""The mean of a stage's last weights, the statistics that belong to it, and a run that is resumed within."""

import copy
from pathlib import Path

import pytest
import torch
from small_run import batches, net, recipe
from torch import nn

import pqk_fast as pqk
from pqk_fast.branches import branch
from pqk_fast.callbacks import Callback
from pqk_fast.config import PhaseConfig
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer
from pqk_fast.training.averaging import WeightAverage, estimate_batch_norm
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.objectives import CrossEntropy, MutualDistillation

PHASE = {"steps": 30, "epoch_steps": 10, "lr_drops": (20,), "weight_decay": 1e-4}


class Weights(Callback):
    """Every step's weights, and what came of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def on_step(self, stage: str, step: int) -> None:
        self.seen.append(copy.deepcopy(dict(self.model.named_parameters())))


def test_the_mean_is_that_of_the_last_steps() -> None:
    model = net()
    watch = Weights(model)
    trainer = Trainer(model, recipe(vanilla=PhaseConfig(**PHASE, average_steps=7)), callbacks=[watch])
    result = trainer.vanilla(batches(), batches(1))
    plain = Trainer(net(), recipe(vanilla=PhaseConfig(**PHASE))).vanilla(batches(), batches(1))
    last = [*watch.seen[-7:-1], dict(plain.model.named_parameters())]
    for name, value in model.named_parameters():
        mean = torch.stack([weights[name] for weights in last]).double().mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    assert [row["validation"] for row in result.rows[:2]] == [row["validation"] for row in plain.rows[:2]]
    assert result.rows[2]["loss"] == plain.rows[2]["loss"], "training itself is the same"
    assert any((a != b).any() for a, b in zip(model.parameters(), plain.model.parameters(), strict=True))


def test_statistics_are_plain_means_over_batches() -> None:
    model, data = net().train(), batches(count=5)
    norm = model[1]
    norm.running_mean.fill_(9.0)
    seen = [model[0](x) for x, _ in data]
    estimate_batch_norm(CrossEntropy(model), data)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.1, 0)


def test_statistics_of_branches_that_do_not_run_stay() -> None:
    model = pqk.prepare(net(), pqk.PQKConfig(sparsity=0.5))
    model[0].weight_mask[:, ::2] = False
    pqk.start_phase2(model).train()
    norm = model[1]
    norm.teacher_running_mean.fill_(9.0)
    estimate_batch_norm(CrossEntropy(model), batches())
    assert (norm.teacher_running_mean == 9).all()
    assert (norm.running_mean != 0).any()
    alone = norm.running_mean.clone()
    estimate_batch_norm(MutualDistillation(model, recipe().phase2, "two_pass"), batches())
    assert torch.equal(norm.running_mean, alone)
    assert (norm.teacher_running_mean != 9).all()
    model.eval()
    assert model(torch.zeros(2, 8)).isfinite().all()
    assert branch(model, "teacher")(torch.zeros(2, 8)).isfinite().all()


def test_a_run_resumed_among_the_averaged_steps_ends_the_same(tmp_path: Path) -> None:
    class StopAt(Callback):
        def on_step(self, stage: str, step: int) -> None:
            if stage == "phase2" and step == 26:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

    phases = {
        "phase1": PhaseConfig(**PHASE, average_steps=12),
        "phase2": recipe().phase2.__class__(**PHASE, distill_start=10, average_steps=12),
    }
    whole = Trainer(net(), recipe(**phases)).fit(batches(), batches(1))
    with pytest.raises(Interrupted):
        Trainer(net(), recipe(**phases), out=tmp_path, callbacks=[StopAt()]).fit(batches(), batches(1))
    again = Trainer(net(5), recipe(**phases), out=tmp_path, resume=True).fit(batches(), batches(1))
    for name, value in whole["phase2"].model.state_dict().items():
        assert torch.equal(again["phase2"].model.state_dict()[name], value), name
    assert whole["phase2"].rows[-1]["validation"] == again["phase2"].rows[-1]["validation"]


def test_without_a_step_nothing_is_given() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    WeightAverage(model).give()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_steps_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="average_steps must be a number of the 30 steps, got 31"):
        PhaseConfig(**PHASE, average_steps=31)
