"""Training steps: mixed precision, compiled, captured."""

import copy
import warnings

import pytest
import torch
from small_run import batches, net, recipe
from torch import nn

from pqk_fast import PQKConfig, Pruner, param_groups, prepare
from pqk_fast.branches import pqk_layers
from pqk_fast.config import Phase2Config
from pqk_fast.trainer import Trainer
from pqk_fast.training.objectives import CrossEntropy, MutualDistillation
from pqk_fast.training.steps import WARM_UP, CapturedStep, Step, why_not_captured

CONFIG = PQKConfig(bits=4, sparsity=0.7, mask_interval=4, scope="layer")


class RepeatedStep(CapturedStep):
    """In the place of a CUDA graph: what is captured is done again at each replay, from the tensors of the capture.

    What Python alone knows is frozen in a graph; :meth:`frozen` lists it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.captured = []

    def frozen(self):
        """Numbers that a graph would keep, and addresses that it would read."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        numbers = [rate for rate in rates if not isinstance(rate, torch.Tensor)]
        read = [*rates, *(pool.keep for pool in self.pruner._pools), *self.objective.parameters(), self._x, self._y]
        read += [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return numbers, [tensor.data_ptr() for tensor in read if isinstance(tensor, torch.Tensor)]

    def _aside(self, x, y, due):
        return Step.__call__(self, x, y, due)

    def _capture(self, work):
        frozen = self.frozen()

        def replay():
            assert self.frozen() == frozen, "a graph would not see the change"
            return work()

        self.captured.append(work)
        return replay


def steps(kind, count, tensor_lr, config=CONFIG):
    model = prepare(net(), config)
    pruner = Pruner(model, steps=count + 1, epoch_steps=4, config=config)
    groups = param_groups(model, 0.1, weight_decay=1e-4)
    if tensor_lr:
        groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)
    step = kind(CrossEntropy(model), optimizer, pruner)
    losses = []
    data = batches(0)
    for index in range(count):
        step.set_lr(0.1 * 0.9**index)
        due = pruner.advance()
        losses.append(float(step(*data[index % len(data)], due)))
    return model, losses, step


def test_a_captured_step_does_what_an_ordinary_one_does():
    """With rates and numbers of kept weights that come by tensors, batches by the graph's own: nothing is frozen."""
    model, losses, _ = steps(Step, 24, tensor_lr=False)
    captured, same_losses, step = steps(RepeatedStep, 24, tensor_lr=True)
    assert losses == same_losses
    torch.testing.assert_close(dict(captured.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert len(step.captured) == 2, "one graph with a mask update, one without"
    assert not all(layer.weight_mask.all() for layer in pqk_layers(captured).values())
    with pytest.raises(AssertionError, match="would not see the change"):
        steps(RepeatedStep, 24, tensor_lr=False)


def test_a_captured_step_reads_its_own_batch_and_refuses_another_shape():
    _, _, step = steps(RepeatedStep, WARM_UP + 2, tensor_lr=True)
    x, y = batches(0)[0]
    with pytest.raises(
        ValueError, match=r"takes batches of one shape, \(32, 8\) and \(32,\); got \(16, 8\) and \(16,\)"
    ):
        step(x[:16], y[:16])
    before = step._x.data_ptr()
    step(x, y)
    assert step._x.data_ptr() == before
    assert torch.equal(step._x, x)


def test_where_steps_cannot_be_captured_they_run_as_ever_and_the_reason_is_told():
    assert "need a CUDA device, this is cpu" in why_not_captured(torch.device("cpu"), None)
    assert "several ranks" in why_not_captured(torch.device("cuda"), None, world=2)
    assert why_not_captured(torch.device("cuda"), None) is None
    model = prepare(net(), CONFIG)
    assert why_not_captured(torch.device("cuda"), Pruner(model, 10, 10)) is None
    groups = PQKConfig(sparsity=0.5, scope="group", group_size=4, exclude=("3",))
    model = prepare(net(), groups)
    assert "group" in why_not_captured(torch.device("cuda"), Pruner(model, 10, 10))
    captured = Trainer(net(), recipe(), capture=True)
    with pytest.warns(UserWarning, match="steps of vanilla are not captured: CUDA graphs need a CUDA device"):
        captured.vanilla(batches(0))
    plain = Trainer(net(), recipe())
    plain.vanilla(batches(0))
    torch.testing.assert_close(dict(captured.model.state_dict()), dict(plain.model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_as_well_and_keeps_the_masks_exact(precision):
    seen = set()
    phase2 = Phase2Config(steps=60, epoch_steps=20, lr_drops=(40,), distill_start=20, forward="two_pass")
    trainer = Trainer(net(), recipe(phase2=phase2), precision=precision)
    trainer.phase1(batches(0), batches(1))
    layer = next(iter(pqk_layers(trainer.model).values()))
    handle = layer.register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    results = trainer.phase2(batches(0), batches(1))
    handle.remove()
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    assert seen == {(True, low), (False, torch.float32)}, "training in half precision, evaluation not"
    assert results.rows[-1]["validation"] > 85
    layers = pqk_layers(trainer.model).values()
    for layer in layers:
        assert layer.weight.dtype is layer.weight_step.dtype is torch.float32
        weight = layer.weight
        assert int(layer.weight_mask.sum()) == weight.numel() - int(0.7 * weight.numel())
        on_grid = layer.student_weight() / layer.weight_step
        torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-5)


def test_a_step_that_the_scaler_refuses_spoils_nothing():
    """fp16's first gradients may overflow: the weights stay, and so does the momentum, which then starts from zero."""
    trainer = Trainer(net(), recipe(), precision="fp16")
    stage = trainer._plain("vanilla", recipe().phase1)
    step = trainer._step(stage)
    step.scaler._scale = None
    step.scaler._init_scale = 2.0**40
    before = copy.deepcopy(trainer.model.state_dict())
    x, y = batches(0)[0]
    step(x, y)
    assert torch.equal(trainer.model[0].weight, before["0.weight"])
    for state in step.optimizer.state.values():
        assert not state["momentum_buffer"].any()
    assert step.scaler.get_scale() == 2.0**39


def test_compiled_phases_end_near_the_plain_ones():
    plain = Trainer(net(), recipe())
    compiled = Trainer(net(), recipe(), compile=True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for trainer in (plain, compiled):
        trainer.fit(batches(0), batches(1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one compilation a phase"
    for name, result in compiled.results.items():
        for row, same in zip(result.rows, plain.results[name].rows, strict=True):
            assert row["loss"] == pytest.approx(same["loss"], abs=0.05)
    assert compiled.results["phase2"].rows[-1]["validation"] > 85


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16; got 'fp8'"):
        Trainer(net(), recipe(), precision="fp8")


def test_the_objective_of_phase2_weighs_as_its_step_says():
    model = nn.Linear(2, 2)
    phase = Phase2Config(steps=10, distill_start=4, alpha=0.3, beta=0.6)
    objective = MutualDistillation(model, phase, "two_pass")
    for step, expected in ((0, (1, 0)), (3, (1, 0)), (4, (0.3, 0.6)), (9, (0.3, 0.6)), (2, (1, 0))):
        objective.set_step(step)
        assert (float(objective.loss.alpha), float(objective.loss.beta)) == pytest.approx(expected)


def test_a_healthy_run_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(net(), recipe()).fit(batches(0), batches(1))


def on_gpu(**options):
    """Both phases on the GPU; batches wait there."""
    data = [(x.cuda(), y.cuda()) for x, y in batches(0)]
    held_out = [(x.cuda(), y.cuda()) for x, y in batches(1)]
    trainer = Trainer(net(), recipe(), device="cuda", **options)
    trainer.fit(data, held_out)
    return trainer


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_run_ends_as_an_ordinary_one_on_the_gpu(precision):
    plain = on_gpu(precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reason not to capture would be one
        captured = on_gpu(precision=precision, capture=True)
    for name, result in captured.results.items():
        for row, same in zip(result.rows, plain.results[name].rows, strict=True):
            assert row["loss"] == pytest.approx(same["loss"], abs=0.05)
            assert row["sparsity"] == same["sparsity"]
    for stage in ("phase1", "phase2"):
        assert captured.results[stage].rows[-1]["validation"] > 85
    if precision == "fp32":
        torch.testing.assert_close(
            dict(captured.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-3, atol=1e-3
        )


@pytest.mark.gpu
def test_a_captured_step_never_waits_for_the_device():
    """But where masks are checked: at the end of an epoch."""
    model = prepare(net(), CONFIG).cuda()
    pruner = Pruner(model, steps=100, epoch_steps=10, config=CONFIG)
    groups = [{**group, "lr": torch.tensor(group["lr"], device="cuda")} for group in param_groups(model, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)
    step = CapturedStep(CrossEntropy(model), optimizer, pruner, device="cuda")
    x, y = (t.cuda() for t in batches(0)[0])
    for index in range(20):
        if index == WARM_UP + 5:  # both graphs are there
            torch.cuda.set_sync_debug_mode("error")
        step.set_lr(0.1)
        step(x, y, pruner.advance())
    torch.cuda.set_sync_debug_mode("default")
    assert set(step._graphs) == {False, True}


@pytest.mark.gpu
def test_a_compiled_run_on_the_gpu():
    assert on_gpu(compile=True).results["phase2"].rows[-1]["validation"] > 85
