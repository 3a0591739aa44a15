"""BatchNorm of channels_last activations: torch's results, gradients and running statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import normal_like, on_threads
from torch import Tensor, nn

from pqk_fast import DualBatchNorm, dispatch
from pqk_fast.batch_norm import batch_norm

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.native]

SHAPES = [(64, 45, 25, 13), (3, 19, 5, 7), (2, 2, 3, 3), (1, 3, 1, 2), (5, 64, 4, 4), (2, 130, 3, 5), (2, 1000, 1, 2)]


def activations(shape: tuple[int, ...], seed: int = 0, mean: float = 0.5) -> Tensor:
    x = normal_like(torch.empty(shape), seed) * 2 + mean
    return x.contiguous(memory_format=torch.channels_last)


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def run(function: Callable[..., Tensor], x: Tensor, affine: bool, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and running statistics."""
    channels = x.shape[1]
    x = x.detach().to(dtype, memory_format=torch.preserve_format).requires_grad_()
    weight, bias = (normal_like(torch.empty(channels, dtype=dtype), seed).requires_grad_() for seed in (2, 3))
    mean, var = torch.full((channels,), 0.25, dtype=dtype), torch.full((channels,), 2.0, dtype=dtype)
    out = function(x, mean, var, *((weight, bias) if affine else (None, None)), True, 0.1, 1e-5)
    out.backward(normal_like(out, 4))
    return [out.detach(), x.grad, mean, var, *((weight.grad, bias.grad) if affine else ())]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_torch(shape: tuple[int, ...], affine: bool, threads: int) -> None:
    x = activations(shape)
    with on_threads(threads), Names() as calls:
        ours = run(batch_norm, x, affine, torch.float32)
    assert {"pqk_fast::batch_norm", "pqk_fast::batch_norm_backward"} <= set(calls.names)
    torchs = run(F.batch_norm, x, affine, torch.float32)
    truth = run(F.batch_norm, x, affine, torch.float64)
    for value, other, exact in zip(ours, torchs, truth, strict=True):
        assert value.stride() == other.stride()
        scale = exact.abs().max()
        error, baseline = (value - exact).abs().max() / scale, (other - exact).abs().max() / scale
        assert error <= baseline + 2**-20, (float(error), float(baseline))


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = activations((16, 19, 9, 7), mean=1000.0)
    _, _, variance, _ = dispatch.batch_norm(x, None, None, 1e-5)
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((variance - exact).abs() <= 1e-6 * exact).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    x = activations((64, 45, 25, 13))
    results = []
    for threads in (1, 2):
        with on_threads(threads):
            results.append(run(batch_norm, x, True, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "x",
    [
        activations((3, 5, 4, 4)).contiguous(),
        activations((3, 5, 4, 4)).bfloat16(),
        activations((3, 5, 4, 4)).double(),
        torch.randn(7, 5),
        torch.randn(7, 5, 3),
        activations((3, 5, 4, 4))[:, :, ::2],
    ],
    ids=["contiguous", "bf16", "fp64", "2-d", "3-d", "strided"],
)
def test_all_else_is_torchs_own(x: Tensor) -> None:
    with Names() as calls:
        out = batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    assert "pqk_fast::batch_norm" not in calls.names
    assert torch.equal(out, F.batch_norm(x, None, None, None, None, True, 0.1, 1e-5))


def test_one_value_a_channel_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm(activations((1, 5, 1, 1)), None, None, None, None, True, 0.1, 1e-5)


def test_gradients_only_where_asked_and_of_gradients() -> None:
    x = activations((3, 5, 4, 4))
    weight, bias = torch.ones(5, requires_grad=True), torch.zeros(5)
    batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5).square().sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    twice = []
    for function in (batch_norm, F.batch_norm):
        inputs = x.detach().clone().requires_grad_()
        out = function(inputs, None, None, weight, bias, True, 0.1, 1e-5)
        (first,) = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), inputs)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-4 * float(twice[1].abs().max()))


def test_a_dual_layer_trains_as_torchs() -> None:
    plain = nn.BatchNorm2d(19)
    dual = DualBatchNorm.from_float(nn.BatchNorm2d(19))
    for step in range(3):
        x = activations((8, 19, 5, 5), seed=step)
        with Names() as calls:
            torch.testing.assert_close(dual(x), plain(x))
        assert calls.names.count("pqk_fast::batch_norm") == 1
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(getattr(dual, name), buffer)
    x = activations((8, 19, 5, 5))
    torch.testing.assert_close(dual.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3, 4, 4), None, None, 1e-5), "x must be fp32, channels_last"),
        ((activations((2, 3, 4, 4)).double(), None, None, 1e-5), "x must be fp32, channels_last"),
        ((activations((2, 3, 4, 4)), torch.ones(4), None, 1e-5), "weight must be fp32 with 3 values"),
        ((activations((2, 3, 4, 4)), None, torch.ones(3).double(), 1e-5), "bias must be fp32 with 3 values"),
    ],
)
def test_raw_calls_stay_within_memory(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dispatch.batch_norm(*args)


@pytest.mark.parametrize("position", [0, 2, 3, 4])
def test_raw_backward_calls_stay_within_memory(position: int) -> None:
    x = activations((2, 3, 4, 4))
    args = [x.clone(), x, torch.ones(3), torch.zeros(3), torch.ones(3)]
    args[position] = args[position][:1]
    with pytest.raises(RuntimeError, match="must be"):
        dispatch.batch_norm_backward(*args)


CL = activations((3, 5, 4, 4))


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((CL, None, None, torch.ones(5), None, True, 0.1, -1.0), ValueError),
        ((CL, torch.zeros(4), torch.ones(4), None, None, True, 0.1, 1e-5), RuntimeError),
        ((CL, None, None, torch.ones(10)[::2], None, True, 0.1, 1e-5), None),
        ((CL, None, None, torch.ones(1).expand(5), None, True, 0.1, 1e-5), None),
    ],
    ids=["negative eps", "size", "strided weight", "expanded weight"],
)
def test_what_is_unusual_is_left_to_torch(args: tuple, error: type[Exception] | None) -> None:
    if error is None:
        assert torch.equal(batch_norm(*args), F.batch_norm(*args))
        return
    with pytest.raises(error) as ours:
        batch_norm(*args)
    with pytest.raises(error) as torchs:
        F.batch_norm(*args)
    assert str(ours.value) == str(torchs.value)


def test_transforms_and_forward_mode_are_torchs() -> None:
    def function(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, None, None, True, 0.1, 1e-5)

    _, ours = torch.func.jvp(function, (CL,), (CL + 1,))
    assert ours.isfinite().all()
    stacked = torch.stack([CL, 2 * CL])
    assert torch.vmap(function)(stacked).shape == stacked.shape
