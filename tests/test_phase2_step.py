"""``start_phase2(model, "learned")``: in phase 2 the step size goes on learning, from the student's loss alone."""

import contextlib
from dataclasses import replace

import pytest
import torch
from small_run import batches, net, recipe
from torch import nn

import pqk_fast as pqk
from pqk_fast import reference
from pqk_fast.branches import branch, dual_forward, pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.config import Phase2Config
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer
from pqk_fast.training import steps
from pqk_fast.training.loop import TrainingDivergedError


def in_phase2(model: nn.Module, how: str = "learned", **config) -> nn.Module:
    model = pqk.prepare(model, pqk.PQKConfig(sparsity=0.5, mask_interval=1, **config))
    generator = torch.Generator().manual_seed(3)
    for layer in pqk_layers(model).values():
        layer.weight_mask.copy_(torch.rand(layer.weight.shape, generator=generator) > 0.5)
    return pqk.start_phase2(model, how)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("ste", ["identity", "clipped"])
@pytest.mark.parametrize("mode", ["two_pass", "stacked"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_its_gradient_is_the_students(kind: str, mode: str, ste: str, per_channel: bool) -> None:
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(8, 5), "conv1d": nn.Conv1d(8, 5, 3), "conv2d": nn.Conv2d(8, 5, 3)}[kind]
    shape = {"linear": (4, 8), "conv1d": (4, 8, 7), "conv2d": (4, 8, 7, 6)}[kind]
    model = in_phase2(nn.Sequential(layer), ste=ste, per_channel=per_channel)
    x = torch.randn(shape)
    student, teacher = dual_forward(model, x, mode)
    grad_student, grad_teacher = torch.randn_like(student), torch.randn_like(teacher)
    torch.autograd.backward([student, teacher], [grad_student, grad_teacher])
    layer = model[0]
    made = layer.student_weight().detach().requires_grad_()
    (grad,) = torch.autograd.grad(layer._layer(x, made, layer.bias.detach()), made, grad_student)
    _, expected = reference.fake_quant_backward(
        grad, layer.weight.detach(), layer.weight_mask, layer.weight_step.detach(), layer.bits, ste, True
    )
    torch.testing.assert_close(layer.weight_step.grad, expected, rtol=1e-4, atol=1e-5)
    frozen = in_phase2(nn.Sequential(layer.to_float()), "frozen", ste=ste, per_channel=per_channel)
    frozen.load_state_dict(model.state_dict())
    torch.autograd.backward(list(dual_forward(frozen, x, mode)), [grad_student, grad_teacher])
    assert frozen[0].weight_step.grad is None
    torch.testing.assert_close(layer.weight.grad, frozen[0].weight.grad, rtol=1e-4, atol=1e-5)


def test_it_has_its_own_rate_and_the_teacher_does_not_move_it() -> None:
    model = in_phase2(net())
    steps = [layer.weight_step for layer in pqk_layers(model).values()]
    groups = pqk.param_groups(model, 0.1)
    assert [id(p) for p in groups[1]["params"]] == [id(step) for step in steps]
    branch(model, "teacher")(torch.randn(4, 8)).sum().backward()
    assert all(step.grad is None for step in steps)
    assert len(pqk.param_groups(in_phase2(net(), "frozen"), 0.1)) == 1


@pytest.mark.parametrize("stage", ["phase2", "finetune"])
@pytest.mark.parametrize("how", ["frozen", "learned"])
def test_the_trainer_lets_it_learn(how: str, stage: str) -> None:
    trainer = Trainer(net(), recipe(phase2=replace(recipe().phase2, step_size=how)))
    trainer.phase1(batches())
    before = [layer.weight_step.detach().clone() for layer in pqk_layers(trainer.model).values()]
    getattr(trainer, stage)(batches())
    after = [layer.weight_step.detach() for layer in pqk_layers(trainer.model).values()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [how == "frozen"] * len(after)


def fast(steps: int = 30) -> Phase2Config:
    """Rates by which a step size falls below 0 (without what keeps it above)."""
    return Phase2Config(
        steps=steps, epoch_steps=steps, distill_start=5, lr_drops=(), lr=0.3, step_lr_scale=30.0, step_size="learned"
    )


@pytest.mark.filterwarnings("ignore:phase2, step")  # layers that end as zeros are warned of
@pytest.mark.parametrize("kept", [True, False])
def test_the_trainer_keeps_it_positive(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    least = []

    class Look(Callback):
        def on_step(self, stage: str, step: int) -> None:
            if stage == "phase2":
                least.append(
                    min(float(layer.weight_step.detach().min()) for layer in pqk_layers(trainer.model).values())
                )

    if not kept:
        monkeypatch.setattr(steps, "keep_steps_positive", lambda model: None)
    trainer = Trainer(net(), recipe(phase2=fast()), callbacks=[Look()])
    trainer.phase1(batches())
    with contextlib.nullcontext() if kept else contextlib.suppress(TrainingDivergedError):
        trainer.phase2(batches())
    assert min(least) == pytest.approx(1e-12) if kept else min(least) < 0


def test_a_loop_of_ones_own_keeps_it_positive() -> None:
    model = in_phase2(net())
    first, *others = (layer.weight_step for layer in pqk_layers(model).values())
    before = [step.clone() for step in others]
    first.data.fill_(-0.5)
    pqk.masks.keep_steps_positive(model)
    assert first.item() == pytest.approx(1e-12)
    assert all(torch.equal(a, b) for a, b in zip(others, before, strict=True))
    with pytest.raises(ValueError, match="no PQK layers"):
        pqk.masks.keep_steps_positive(net())


def test_a_loaded_state_goes_on_learning_them_if_it_is_told_so() -> None:
    model = in_phase2(net())
    with torch.no_grad():
        pqk_layers(model)["0"].weight_step.mul_(1.5)
    loaded = pqk.prepare(net(5), pqk.PQKConfig(sparsity=0.5, mask_interval=1))
    loaded.load_state_dict(model.state_dict())
    assert len(pqk.param_groups(loaded, 0.1)) == 1
    assert pqk.start_phase2(loaded, "learned") is loaded
    assert len(pqk.param_groups(loaded, 0.1)) == 2
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(4, 8)
    for one in (model, loaded):
        one.zero_grad()
        dual_forward(one, x)[0].square().sum().backward()
    for one, other in zip(pqk_layers(model).values(), pqk_layers(loaded).values(), strict=True):
        torch.testing.assert_close(one.weight_step.grad, other.weight_step.grad, rtol=0, atol=0)
        assert one.weight_step.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="in phase 2 already, its step sizes learned"):
        pqk.start_phase2(loaded, "learned")
    pqk.start_phase2(loaded)
    assert len(pqk.param_groups(loaded, 0.1)) == 1


def test_another_word_is_an_error() -> None:
    with pytest.raises(ConfigError, match="step_size"):
        Phase2Config(step_size="free")
    with pytest.raises(ValueError, match="step_size"):
        in_phase2(net(), "free")
