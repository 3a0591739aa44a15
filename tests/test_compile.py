"""torch.compile of forward and loss, fullgraph: one compile a phase, whatever changes, and the eager gradients."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import pqk_fast as pqk
from pqk_fast import batch_norm
from pqk_fast.branches import choose_mode, pqk_layers
from pqk_fast.config import Phase2Config
from pqk_fast.models import create_model
from pqk_fast.training.objectives import CrossEntropy, MutualDistillation

STAGES = ["phase 1", "two_pass", "stacked"]
CLASSES = 10


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8, 20)),
    "res8_narrow": (lambda: create_model("res8_narrow", CLASSES), (4, 101, 40)),
    "resnet20": (lambda: create_model("resnet20", CLASSES), (4, 3, 16, 16)),
}
# resnet20's stacked graph takes longest to trace, and has nothing that res8's has not
CASES = [(name, stage) for name in MODELS for stage in STAGES if (name, stage) != ("resnet20", "stacked")]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randint(CLASSES, shape[:1])


class Training:
    """One stage of training a model, as a user would write it; compiled if there is a backend."""

    def __init__(self, model: nn.Module, stage: str, backend: str | None = None, **config: Any) -> None:
        self.model = pqk.prepare(model, pqk.PQKConfig(mask_interval=2 if stage == "phase 1" else 1, **config))
        self.pruner = pqk.Pruner(self.model, 20 if stage == "phase 1" else 1, 4)
        self.objective: Any
        if stage == "phase 1":
            self.objective = CrossEntropy(self.model)
        else:
            pqk.start_phase2(self.model)
            for name, parameter in self.model.named_parameters():  # BatchNorms that can be told apart
                if "teacher_" in name:
                    parameter.data += 0.1
            self.objective = MutualDistillation(self.model, Phase2Config(), stage)
        self.phase1 = stage == "phase 1"
        self.call = (
            self.objective if backend is None else torch.compile(self.objective, fullgraph=True, backend=backend)
        )
        rate = torch.tensor(0.1)
        self.optimizer = torch.optim.SGD(pqk.param_groups(self.model, 0.1), momentum=0.9)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def step(self, x: Tensor, y: Tensor, autocast: bool = False) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss: Tensor = self.call(x, y)
        loss.backward()
        self.optimizer.step()
        if self.phase1:
            self.pruner.step()
        return loss.detach()

    def change_everything(self, number: int, x: Tensor) -> None:
        """What may change between steps: rates, the loss's weights, and evaluations of both branches in between."""
        for group in self.optimizer.param_groups:
            group["lr"].mul_(0.9)
        self.model.eval()
        with torch.no_grad():
            self.model(x)
            if not self.phase1:
                pqk.branch(self.model, "teacher")(x)
                self.objective.loss.set_weights(0.5 + 0.1 * number, 0.5 - 0.1 * number)
        self.model.train()

    def masks(self) -> list[Tensor]:
        return [layer.weight_mask.clone() for layer in pqk_layers(self.model).values()]

    def step_sizes(self) -> list[Tensor]:
        return [layer.weight_step.detach().clone() for layer in pqk_layers(self.model).values()]

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


@contextmanager
def no_recompile() -> Iterator[None]:
    torch.compiler.set_stance("fail_on_recompile")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def assert_close(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """Gradients and buffers, each to a share of its largest value."""
    pairs = [(name, p.grad, expected.get_parameter(name).grad) for name, p in actual.named_parameters()]
    pairs += [(name, buffer, expected.get_buffer(name)) for name, buffer in actual.named_buffers()]
    for name, value, truth in pairs:
        assert (value is None) == (truth is None), name
        if truth is not None:
            scale = float(truth.float().abs().max())
            off = float((value.float() - truth.float()).abs().max())
            assert off <= tolerance * scale, f"{name} is off by {off / scale:.2g} of its largest value"


def train_both(make: Callable[[], nn.Module], shape: tuple[int, ...], stage: str, backend: str) -> None:
    """Five steps, compiled and eager, each from the same state, in which everything changes that may."""
    model = make()
    ours, eager = Training(copy.deepcopy(model), stage, backend), Training(model, stage)
    masks, sizes = ours.masks(), ours.step_sizes()
    for number in range(5):
        x, y = batch(shape)
        with no_recompile() if number else nullcontext():
            for training in (ours, eager):
                training.change_everything(number, x)
            torch.testing.assert_close(ours.step(x, y), eager.step(x, y), rtol=1e-5, atol=0)
        assert_close(ours.model, eager.model, 1e-4)  # sums in another order
        with torch.no_grad():
            for value, truth in zip(ours.tensors(), eager.tensors(), strict=True):
                value.copy_(truth)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    if stage == "phase 1":
        assert not all(map(torch.equal, masks, ours.masks()))
        assert not any(map(torch.equal, sizes, ours.step_sizes()))


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_one_compile_a_phase_and_the_eager_gradients(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiled graph has torch's BatchNorm. The C++ one rounds in other places, and a few of many ReLUs would flip.
    monkeypatch.setattr(batch_norm, "_is_ours", lambda *_: False)
    train_both(*MODELS[name], stage, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
@pytest.mark.parametrize("stage", ["phase 1", "two_pass"])
def test_one_compile_a_phase_by_inductor(stage: str) -> None:
    train_both(*MODELS["mlp"], stage, "inductor")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_what_inductor_fuses_are_the_same_bits() -> None:
    """Ties and clipped weights among them; the step's gradient is a sum in another order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.arange(-12, 12.5, 0.5) / 8, torch.randn(2000, generator=generator)])
    mask = torch.rand(weight.shape, generator=generator) < 0.8
    step, grad = torch.tensor([1 / 8]), torch.randn(weight.shape, generator=generator)

    def quantized(weight: Tensor, step: Tensor) -> Tensor:
        return pqk.ops.fake_quant(weight, mask, step, 4, "clipped", True)

    results = []
    for function in (quantized, torch.compile(quantized, fullgraph=True)):
        w, s = weight.clone().requires_grad_(), step.clone().requires_grad_()
        out = function(w, s)
        out.backward(grad)
        results.append((out, w.grad, s.grad))
    (out, of_weight, of_step), (eager, eager_weight, eager_step) = reversed(results)
    assert torch.equal(out, eager)
    assert torch.equal(of_weight, eager_weight)
    torch.testing.assert_close(of_step, eager_step, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("stage", ["phase 1", "two_pass"])
def test_the_compiler_sees_through_the_quantizer(stage: str, fused: bool) -> None:
    """On a CPU: around an operation that it does not know inductor copies weights and masks to and fro."""
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    make, shape = MODELS["mlp"]
    training = Training(make(), stage)
    if fused:
        pqk.fuse(training.model)
    torch.compile(training.objective, fullgraph=True, backend=aot_autograd(fw_compiler=look))(*batch(shape)).backward()
    assert len(graphs) == 2
    assert "round" in graphs[0]
    assert not any("pqk_fast" in graph for graph in graphs)


def test_the_phases_of_one_model_are_a_compile_each() -> None:
    make, shape = MODELS["mlp"]
    first = Training(make(), "phase 1", "eager", sparsity=0.5)
    x, y = batch(shape)
    for _ in range(19):
        first.step(x, y)
    pqk.start_phase2(first.model)
    second = torch.compile(MutualDistillation(first.model, Phase2Config(), "two_pass"), fullgraph=True, backend="eager")
    second(x, y)
    with no_recompile():
        second(x, y)
        assert counters["stats"]["unique_graphs"] == 2


class Weighted(nn.Module):
    """A loss's weight as a Python number, which is a constant to the compiler."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective, self.alpha = objective, 0.5

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.alpha * self.objective(x, y)
        return loss


@pytest.mark.parametrize("what", ["nothing", "a number", "an open branch", "another phase"])
def test_the_assertions_see_a_recompile(what: str) -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), "two_pass")
    objective = Weighted(training.objective)
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    x, y = batch(shape)
    compiled(x, y)
    change = {
        "nothing": lambda: None,
        "a number": lambda: setattr(objective, "alpha", 0.6),
        "an open branch": pqk.branch(training.model, "student").__enter__,
        "another phase": lambda: [layer.set_phase(1) for layer in pqk_layers(training.model).values()],
    }
    change[what]()
    with no_recompile(), nullcontext() if what == "nothing" else pytest.raises(RuntimeError, match="recompile"):
        compiled(x, y)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_compiled_optimizer_takes_a_rate_that_is_a_tensor(kind: str) -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), "phase 1")
    if kind == "number":
        for group in training.optimizer.param_groups:
            group["lr"] = float(group["lr"])
    update = torch.compile(training.optimizer.step, backend="eager")
    x, y = batch(shape)

    def step() -> None:
        training.optimizer.zero_grad()
        training.call(x, y).backward()
        update()

    step()
    step()  # there is momentum from now on
    assert counters["stats"]["unique_graphs"] == 2
    for group in training.optimizer.param_groups:
        group["lr"] *= 0.9
    with no_recompile(), nullcontext() if kind == "tensor" else pytest.raises(RuntimeError, match="recompile"):
        step()


def test_auto_is_decided_before_compiling() -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), "auto")
    compiled = torch.compile(training.objective, fullgraph=True, backend="eager")
    x, y = batch(shape)
    with pytest.raises(RuntimeError, match=r"call pqk_fast.branches.choose_mode\(model, x, mode\) once"):
        compiled(x, y)
    torch.compiler.reset()
    assert choose_mode(training.model, x) == "two_pass"
    torch.testing.assert_close(compiled(x, y), training.objective(x, y))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_anything_to_learn(how: str, stage: str, fused: bool) -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), stage)
    training.model.eval()
    if fused:
        pqk.fuse(training.model)
    compiled = torch.compile(training.objective, fullgraph=True, backend="aot_eager")
    x, y = batch(shape)
    if how == "frozen":
        training.model.requires_grad_(False)
    with torch.no_grad() if how == "no_grad" else nullcontext():
        torch.testing.assert_close(compiled(x, y), training.objective(x, y))


@pytest.mark.parametrize("stage", STAGES)
def test_autocast(stage: str) -> None:
    """Around the compiled call, as in training; results differ from eager by roundings of bf16."""
    make, shape = MODELS["mlp"]
    model = make()
    ours, eager = Training(copy.deepcopy(model), stage, "aot_eager"), Training(model, stage)
    for number in range(3):
        x, y = batch(shape)
        with no_recompile() if number else nullcontext():
            torch.testing.assert_close(ours.step(x, y, True), eager.step(x, y, True), rtol=2e-2, atol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(ours.model, eager.model, 5e-2)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.model.parameters())


class Autocasts(nn.Module):
    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.objective(x, y)
        return loss


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_within_what_is_compiled(stage: str) -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), stage)
    x, y = batch(shape)
    inside = torch.compile(Autocasts(training.objective), fullgraph=True, backend="aot_eager")(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inside, training.objective(x, y), rtol=2e-2, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_fused_model_compiles_whole(stage: str) -> None:
    make, shape = MODELS["mlp"]
    training = Training(make(), stage)
    fused = copy.deepcopy(training.objective)
    pqk.fuse(fused.model)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for number in range(3):
        x, y = batch(shape)
        for objective, call in ((fused, compiled), (training.objective, training.objective)):
            objective.zero_grad()
            with no_recompile() if number else nullcontext():
                call(x, y).backward()
        assert_close(fused.model, training.model, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(checkpoint(self.first, x, use_reentrant=False)))
        return out


@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_compiles_by_torch_s_own_setting(stage: str) -> None:
    """That layers note that they ran is a side effect, which the compiler takes within a checkpoint only if told."""
    training = Training(Checkpointed(), stage)
    x, y = batch((8, 20))
    compiled = torch.compile(training.objective, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"[Ss]ide effect"):
        compiled(x, y)
    torch.compiler.reset()
    twin = copy.deepcopy(training.objective)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        torch.compile(twin, fullgraph=True, backend="aot_eager")(x, y).backward()
    training.objective(x, y).backward()
    assert_close(twin.model, training.model, 1e-5)
