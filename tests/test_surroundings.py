"""What people do with a model beside training it: average, copy, pickle, accumulate, clip, mix precisions, export."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pqk_fast as pqk
from pqk_fast import reference
from pqk_fast.models import create_model

STEPS, EPOCH = 24, 6
MASKED = int(0.7 * (8 * 27 + 5 * 288))
Batch = tuple[Tensor, Tensor]
in_both_phases = pytest.mark.parametrize("phase", [1, 2])


class Training:
    """A model and what trains it in the phase that it is in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.phase = layers(model)[0].phase
        self.distill = pqk.MutualDistillationLoss()
        self.pruner = pqk.Pruner(model, STEPS, EPOCH) if self.phase == 1 else None
        groups = pqk.param_groups(model, lr=0.1, step_lr=1e-3, weight_decay=1e-2)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.scaler: Any = None
        self.dtype: torch.dtype | None = None  # autocast
        self.clip: float | None = None
        self.micro = 1  # batches that a batch is cut into

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype) if self.dtype else nullcontext():
            if self.phase == 1:
                return F.cross_entropy(self.model(x), y)
            return self.distill(*pqk.dual_forward(self.model, x), y)

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        for part in zip(x.chunk(self.micro), y.chunk(self.micro), strict=True):
            loss = self.loss(*part) / self.micro
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.backward(x, y)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.pruner is not None:
            self.pruner.step()

    def run(self, data: Iterable[Batch]) -> None:
        for x, y in data:
            self.step(x, y)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, pqk.PQKConv2d | pqk.PQKLinear)]


def batches(count: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(16, 3, 6, 6, generator=generator) for _ in range(count))
    return [(x, (x[:, :, 0, 0] > 0).long().sum(1)) for x in draw]


def start(phase: int, norm: bool = True) -> Training:
    """At the beginning of the phase; before phase 2, phase 1 is complete."""
    torch.manual_seed(0)
    middle = (nn.BatchNorm2d(8), nn.ReLU()) if norm else (nn.ReLU(),)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *middle, nn.Flatten(), nn.Linear(288, 5))
    training = Training(pqk.prepare(net, pqk.PQKConfig(bits=4, sparsity=0.7, mask_interval=4)))
    if phase == 2:
        training.run(batches(STEPS))
        training = Training(pqk.start_phase2(training.model))
    return training


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: nn.Module, b: nn.Module | dict[str, Tensor]) -> None:
    expected = dict(b.state_dict()) if isinstance(b, nn.Module) else b
    torch.testing.assert_close(dict(a.state_dict()), expected, rtol=0, atol=0)


def check_sparse(model: nn.Module) -> None:
    """As sparse as asked for, to the weight; the student has 4-bit values, and none where its mask has none."""
    assert sum(int((~layer.weight_mask).sum()) for layer in layers(model)) == MASKED
    student = pqk.convert(model)
    for layer, plain in zip(layers(model), (student[0], student[-1]), strict=True):
        assert not plain.weight[~layer.weight_mask].any()
        assert 2 < plain.weight.unique().numel() <= 15


@in_both_phases
def test_an_average_has_averaged_weights_and_steps_and_the_models_own_buffers(phase: int) -> None:
    """torch's average of parameters alone (the default): masks and BatchNorm statistics are copied at each update."""
    training = start(phase)
    model = training.model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    expected: dict[str, Tensor] = {}
    masks = []
    for part in range(4):
        training.run(batches(STEPS // 4, seed=part))
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            now = parameter.detach().clone()
            expected[name] = 0.75 * expected[name] + 0.25 * now if part else now
        masks.append(layers(model)[1].weight_mask.clone())
    assert torch.equal(masks[0], masks[-1]) == (phase == 2), "or averaged masks would look right"
    state = dict(average.module.state_dict())
    torch.testing.assert_close({name: state[name] for name in expected}, expected)
    assert torch.equal(state["0.weight_step"], layers(model)[0].weight_step) == (phase == 2), "averaged while it learns"
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in expected}
    torch.testing.assert_close({name: state[name] for name in own}, own, rtol=0, atol=0)
    check_sparse(average.module)


def test_an_average_is_made_anew_for_phase2() -> None:
    """The phase is more than a buffer."""
    training = start(1)
    old = AveragedModel(training.model)
    training.run(batches(STEPS))
    new = AveragedModel(pqk.start_phase2(training.model))
    for average in (old, new):
        average.update_parameters(training.model)
    same_state(old.module, new.module)
    assert pqk.branch(new.module, "teacher")(batches(1)[0][0]).shape == (16, 5)
    with pytest.raises(ValueError, match="phase 1, where only the student runs"):
        pqk.branch(old.module, "teacher")


def pickled(training: Training) -> Training:
    return pickle.loads(pickle.dumps(training))


def saved(training: Training) -> Training:
    file = io.BytesIO()
    torch.save(training, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@in_both_phases
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_goes_on_by_itself(copied: Callable[[Training], Training], fused: bool, phase: int) -> None:
    """Model, optimizer and Pruner together: the copy's training leaves the original alone, and is what its would be."""
    training = start(phase)
    if fused:
        pqk.fuse(training.model)
    training.run(batches(10))
    twin = copied(training)
    before = state_of(training.model)
    twin.run(batches(8, seed=2))
    same_state(training.model, before)
    training.run(batches(8, seed=2))
    same_state(training.model, twin.model)
    moved = [name for name, tensor in training.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"0.weight", "1.running_mean"} < set(moved)
    assert ("4.weight_mask" in moved) == (phase == 1)
    assert ("1.teacher_weight" in moved) == (phase == 2)


@in_both_phases
def test_gradients_of_micro_batches_add_up_to_the_batchs(phase: int) -> None:
    """Without BatchNorm, which sees each micro-batch by itself."""
    training = start(phase, norm=False)
    training.run(batches(10))
    (batch,) = batches(1, seed=5)
    found = []
    for micro in (1, 4):
        training.micro = micro
        training.backward(*batch)
        found.append({n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None})
    whole, parts = found
    assert ("0.weight_step" in whole) == (phase == 1)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        # the same sums of fp32 numbers in another order
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=2e-6 * float(gradient.abs().max()), msg=name)


@in_both_phases
def test_the_schedule_counts_optimizer_steps_and_not_micro_batches(phase: int) -> None:
    training = start(phase)
    training.micro = 4
    training.run(batches(STEPS, seed=2))
    assert training.pruner is None or (training.pruner.iteration, training.pruner.finished) == (STEPS, True)
    check_sparse(training.model)


@in_both_phases
def test_a_grad_scaler_and_clipping_in_fp32_change_no_bit_but_by_clipping(phase: int) -> None:
    """A scale that is a power of two rounds nothing, in any gradient of ours either (the step sizes' sum, the two
    branches' parts of a weight's)."""
    ends = []
    for scale, clip in ((None, None), (2.0**12, None), (None, 0.5), (2.0**12, 0.5)):
        training = start(phase)
        training.clip = clip
        if scale is not None:
            training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        training.run(batches(STEPS, seed=2))
        check_sparse(training.model)
        ends.append(training.model)
    same_state(ends[1], ends[0])
    same_state(ends[3], ends[2])
    assert not torch.equal(ends[2][0].weight, ends[0][0].weight), "0.5 clips"


@in_both_phases
def test_clipping_keeps_the_direction_of_all_gradients(phase: int) -> None:
    training = start(phase)
    training.run(batches(10))
    training.backward(*batches(1, seed=5)[0])
    before = {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}
    norm = float(nn.utils.clip_grad_norm_(training.model.parameters(), 1e-2))
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before.values()]).norm()))
    assert norm > 1e-2
    for name, parameter in training.model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter.grad, before[name] * (1e-2 / norm), rtol=1e-3, atol=0)


def test_a_step_that_the_scaler_skips_changes_nothing_but_the_position() -> None:
    training = start(1)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    training.run(batches(9))
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    x, y = batches(1, seed=5)[0]
    training.step(1e38 * x, y)
    assert training.scaler.get_scale() == 2.0**11, "the scaler has seen inf or NaN"
    torch.testing.assert_close(dict(training.model.named_parameters()), before, rtol=0, atol=0)
    assert training.pruner is not None
    assert training.pruner.iteration == 10
    training.model[1].reset_running_stats()  # which have seen that batch
    training.run(batches(STEPS - 10))
    check_sparse(training.model)


@in_both_phases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_precision_trains_a_network_as_sparse(dtype: torch.dtype, phase: int) -> None:
    """With momentum, weight decay, clipping and, in fp16, a GradScaler. Weights and step sizes stay fp32; the student's
    weights are made in fp32 and rounded once to what the products take."""
    training = start(phase)
    training.dtype, training.clip = dtype, 1.0
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    training.run(batches(STEPS, seed=2))
    check_sparse(training.model)
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())
    with torch.autocast("cpu", dtype):
        assert training.model(batches(1)[0][0]).dtype == dtype
        for layer in layers(training.model):
            exact = reference.fake_quant(layer.weight, layer.weight_mask, layer.weight_step, 4)
            same_bits(layer.student_weight(), exact.to(dtype))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_convert_gives_can_be_exported(which: str, fused: bool) -> None:
    training = start(2)
    training.run(batches(4))
    if fused:
        pqk.fuse(training.model)
    plain = pqk.convert(training.model, which).eval()
    (x, _), (other, _) = batches(2, seed=4)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, torch.cat([other, x])):
        torch.testing.assert_close(program.module()(batch), plain(batch), rtol=0, atol=0)
        torch.testing.assert_close(plain(batch), pqk.branch(training.model.eval(), which)(batch), rtol=1e-5, atol=1e-5)
    zeros = sum(int((program.state_dict[name] == 0).sum()) for name in ("0.weight", "4.weight"))
    assert (zeros >= MASKED) == (which == "student")


def test_res8_narrow_can_be_exported() -> None:
    torch.manual_seed(0)
    model = pqk.prepare(create_model("res8-narrow", 12), pqk.PQKConfig())
    pqk.Pruner(model, 1, 1)  # which makes the last mask at once
    student, x = pqk.convert(model).eval(), torch.randn(3, 101, 40)
    program = torch.export.export(student, (x,))
    torch.testing.assert_close(program.module()(x), student(x), rtol=0, atol=0)
    kept = sum(int((tensor != 0).sum()) for name, tensor in program.state_dict.items() if "weight" in name)
    assert kept <= 19 * 9 + 6 * 19 * 19 * 9 + 12 * 19 - int(0.9 * (19 * 9 + 6 * 19 * 19 * 9 + 12 * 19))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_functional_call_uses_what_it_is_given(which: str) -> None:
    """Another model's weights, masks, step sizes and statistics, with gradients to them and not to the model."""
    model, other = start(2).model, start(2)
    other.run(batches(6, seed=3))
    x, y = batches(1, seed=4)[0]
    given = {name: t.detach().clone() for name, t in other.model.state_dict().items()}
    learning = {name: given[name].requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    before = state_of(model)
    model.zero_grad()
    with pqk.branch(model.train(), which):
        logits = torch.func.functional_call(model, given, (x,))
        F.cross_entropy(logits, y).backward()
    same_state(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = pqk.branch(other.model.train(), which)(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    other.optimizer.zero_grad()
    F.cross_entropy(expected, y).backward()
    for name, parameter in other.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(learning[name].grad, parameter.grad, rtol=0, atol=0)
