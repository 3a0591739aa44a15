"""fuse(model): the same bits from one operation a forward."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import normal_like
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pqk_fast as pqk
from pqk_fast.branches import pqk_layers
from pqk_fast.models import create_model

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Calls(TorchDispatchMode):
    """Names of the fake-quantizations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.name().startswith("pqk_fast::fake_quant"):
            self.names.append(func.name().removeprefix("pqk_fast::"))
        return func(*args, **(kwargs or {}))


class Small(nn.Module):
    """Convolution, BatchNorm and two tied linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.around: Callable = lambda run, x: run(x)

    def head(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.head, F.relu(self.norm(self.conv(x))).mean((2, 3)))


def prepared(phase: int = 1, **config: object) -> Small:
    torch.manual_seed(0)
    model = pqk.prepare(Small(), pqk.PQKConfig(sparsity=0.5, mask_interval=1, **config))
    pqk.Pruner(model, 1, 1)
    return pqk.start_phase2(model) if phase == 2 else model


X = normal_like(torch.empty(4, 3, 7, 7), seed=3)


def results(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor | None]:
    model.zero_grad()
    out = run(model)
    out.backward(normal_like(out))
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


def both(model: nn.Module, mode: str) -> Tensor:
    return torch.cat(pqk.dual_forward(model, X, mode))


def autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(X)


FORWARDS = {
    "plain": lambda model: model(X),
    "autocast": autocast,
    "teacher": lambda model: pqk.branch(model, "teacher")(X),
    "two_pass": lambda model: both(model, "two_pass"),
    "stacked": lambda model: both(model, "stacked"),
}


@pytest.mark.parametrize("config", [{}, {"ste": "clipped"}, {"mask_gradients": True}, {"per_channel": True}], ids=str)
@pytest.mark.parametrize(("phase", "forward"), [(1, "plain"), (1, "autocast"), *[(2, name) for name in FORWARDS]])
def test_same_bits_as_layer_by_layer(phase: int, forward: str, config: dict) -> None:
    plain = prepared(phase, **config)
    fused = pqk.fuse(copy.deepcopy(plain))
    for _ in range(2):
        for value, expected in zip(results(fused, FORWARDS[forward]), results(plain, FORWARDS[forward]), strict=True):
            assert (value is None) == (expected is None)
            assert value is None or torch.equal(value, expected)
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_one_operation_a_forward_and_one_a_backward() -> None:
    model = prepared()
    with Calls() as calls:
        model(X).sum().backward()
    assert sorted(calls.names) == ["fake_quant"] * 3 + ["fake_quant_backward"] * 3
    pqk.fuse(model)
    for _ in range(2):
        with Calls() as calls:
            model(X).sum().backward()
        assert calls.names == ["fake_quant_all", "fake_quant_all_backward"]
        pqk.fuse(model)  # again: changes nothing
    with Calls() as calls:
        pqk.unfuse(model)(X)
    assert calls.names == ["fake_quant"] * 3


def test_layers_of_several_kinds_go_in_groups() -> None:
    model = pqk.prepare(create_model("res8_narrow", 12), pqk.PQKConfig())
    layers = list(pqk_layers(model).values())
    layers[0].config = pqk.PQKConfig(ste="clipped")
    layers[1].config = pqk.PQKConfig(bits=8)  # not a kind of its own
    with Calls() as calls:
        pqk.fuse(model)(torch.zeros(2, 1, 101, 40))
    assert calls.names == ["fake_quant_all"] * 2


def test_parts_of_the_model_make_their_own() -> None:
    model = pqk.fuse(prepared())
    with Calls() as calls:
        model.head(torch.zeros(1, 8))
    assert calls.names == ["fake_quant"] * 2


def held(model: nn.Module) -> list[bool]:
    return [layer.fed is not None for layer in pqk_layers(model).values()]


def test_nothing_is_held_after_a_forward() -> None:
    model = pqk.fuse(prepared())
    seen = []
    model.around = lambda run, x: seen.extend(held(model)) or run(x)
    model(X)
    assert seen == [True] * 3
    assert held(model) == [False] * 3

    def fail(run: Callable, x: Tensor) -> Tensor:
        raise RuntimeError("within")

    model.around = fail
    with pytest.raises(RuntimeError, match="within"):
        model(X)
    assert held(model) == [False] * 3


def test_copies_pickles_and_conversions_stand_alone() -> None:
    model = pqk.fuse(prepared())
    del model.around
    Small.around = staticmethod(lambda run, x: run(x))  # type: ignore[assignment]
    try:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                twin.first.weight.zero_()
            with Calls() as calls:
                assert not torch.equal(twin(X), model(X))
            assert calls.names == ["fake_quant_all"] * 2
        plain = pqk.convert(model)
        assert not plain._forward_pre_hooks
        assert not plain._forward_hooks
        with Calls() as calls:
            model.eval()
            torch.testing.assert_close(plain.eval()(X), model(X))
        assert calls.names == ["fake_quant_all"]
    finally:
        del Small.around


@contextmanager
def half() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_autocast_and_grad_mode_within_the_forward_count() -> None:
    def in_half(run: Callable, x: Tensor) -> Tensor:
        with half():
            return run(x)

    plain = prepared()
    fused = pqk.fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.around = in_half
    assert fused(X).dtype == torch.bfloat16
    for value, expected in zip(results(fused, FORWARDS["plain"]), results(plain, FORWARDS["plain"]), strict=True):
        assert value is None or torch.equal(value, expected)

    for model in (plain, fused):
        model.around = torch.enable_grad()(lambda run, x: run(x))

    def frozen(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(X)

    for value, expected in zip(results(fused, frozen), results(plain, frozen), strict=True):
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected)
    assert fused.first.weight.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_refused(use_reentrant: bool) -> None:
    model = prepared()
    model.around = lambda run, x: checkpoint(run, x, use_reentrant=use_reentrant)
    model(X).sum().backward()
    out = pqk.fuse(model)(X)
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*call unfuse\(model\)"):
        out.sum().backward()


def test_many_ranks_make_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pqk.fuse(prepared())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with Calls() as calls:
        model(X)
    assert calls.names == ["fake_quant"] * 3


def test_compiles() -> None:
    torch.compiler.reset()
    plain = prepared()
    fused = pqk.fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, backend="aot_eager")
    expected = results(plain, FORWARDS["plain"])
    for _ in range(2):
        fused.zero_grad()
        out = compiled(X)
        out.backward(normal_like(out))
        for value, truth in zip([out, *(p.grad for p in fused.parameters())], expected, strict=True):
            assert (value is None) == (truth is None)
            assert value is None or torch.allclose(value, truth, atol=1e-5)
        expected = results(plain, FORWARDS["plain"])


def test_an_unprepared_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has no PQK layers"):
        pqk.fuse(nn.Linear(2, 2))


def test_what_changes_within_the_forward_is_not_fed() -> None:
    """The layer's own weight, a replacement by functional_call, and a forward that was interrupted."""
    model = pqk.fuse(prepared())

    def change(run: Callable, x: Tensor) -> Tensor:
        with torch.no_grad():
            model.first.weight.zero_()
        return run(x)

    model.around = change
    with Calls() as calls, torch.no_grad():
        expected = model.second.bias + 0 * model(X)
    assert calls.names == ["fake_quant_all", "fake_quant", "fake_quant"]  # first and second share their weight
    model.around = lambda run, x: run(x)
    with torch.no_grad():
        relu = F.relu(model.first.bias)
        assert torch.allclose(expected, model.second(relu).expand_as(expected), atol=1e-6)

    model = pqk.fuse(prepared())
    ones = {"weight": torch.ones_like(model.first.weight)}
    model.around = lambda run, x: torch.func.functional_call(model.first, ones, x)
    plain = pqk.unfuse(copy.deepcopy(model))
    plain.around = lambda run, x: torch.func.functional_call(plain.first, ones, x)
    assert torch.equal(model(X), plain(X))

    def interrupt(run: Callable, x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model.around = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(X)
    del model.around
    twin = copy.deepcopy(model)
    assert held(twin) == [False] * 3
    with torch.no_grad():
        model.first.weight.zero_()
    assert torch.equal(model.first(torch.ones(1, 8))[0], model.first.bias)


def test_threads_do_not_get_each_others_graph() -> None:
    model = pqk.fuse(prepared())
    outs: list[Tensor] = []
    other = threading.Thread(target=lambda: outs.append(model.first(torch.ones(1, 8))))

    def meanwhile(run: Callable, x: Tensor) -> Tensor:
        with Calls():
            other.start()
            other.join()
        return run(x)

    model.around = meanwhile
    out = model(X)
    out.sum().backward()
    outs[0].sum().backward()  # a graph of its own


def test_transforms_make_their_own() -> None:
    model = pqk.fuse(prepared())
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model.eval(), params, x[None]).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, X)
    assert per_sample["first.weight"].shape == (4, 8, 8)
