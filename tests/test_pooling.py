"""ReLU and average pooling in one operation: torch's bits, and its gradient's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import every_isa, normal_like, on_threads, run_with
from test_batch_norm import Names
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pqk_fast import dispatch
from pqk_fast.pooling import relu_avg_pool2d

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Kernel = tuple[int, int]
# [B, C, H, W] and the window. Channels: below, at and above the widths of all registers; rows and columns left over.
CASES = [
    *[((3, channels, 9, 8), (4, 3)) for channels in (4, 5, 7, 8, 9, 15, 16, 17, 19, 33, 45)],
    ((4, 19, 101, 40), (4, 3)),
    ((2, 19, 8, 6), (4, 3)),
    ((2, 5, 7, 3), (1, 1)),
    ((1, 6, 5, 4), (5, 4)),
    ((2, 6, 1, 9), (1, 2)),
    ((2, 6, 9, 1), (2, 1)),
    ((2, 17, 3, 3), (2, 2)),
]


def activations(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal values among them zeros of both signs, infinity and NaN."""
    x = normal_like(torch.empty(shape), seed).contiguous(memory_format=torch.channels_last)
    kinds = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    where = torch.randint(x.numel(), (5, max(1, x.numel() // 100)), generator=torch.Generator().manual_seed(seed))
    x.permute(0, 2, 3, 1).flatten()[where] = kinds[:, None]
    return x


def eager(x: Tensor, kernel: Kernel) -> Tensor:
    return F.avg_pool2d(F.relu(x), kernel)


def upstream(out: Tensor) -> Tensor:
    """With zeros of both signs."""
    grad = normal_like(out, 4)
    return torch.where(grad.abs() < 0.1, grad * 0, grad)


def run(function: Callable[[Tensor, Kernel], Tensor], x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x, kernel)
    out.backward(upstream(out.detach()))
    assert x.grad is not None
    return out.detach(), x.grad


def assert_same(ours: Tensor, torchs: Tensor) -> None:
    """The same bits, of NaN that it is one."""
    assert (ours.shape, ours.dtype, ours.stride()) == (torchs.shape, torchs.dtype, torchs.stride())
    assert torch.equal(ours.isnan(), torchs.isnan())
    ours, torchs = (torch.where(each.isnan(), 1.0, each) for each in (ours, torchs))
    assert torch.equal(ours, torchs)
    assert torch.equal(ours.signbit(), torchs.signbit())


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("shape", "kernel"), CASES, ids=str)
def test_torchs_bits(shape: tuple[int, ...], kernel: Kernel, threads: int) -> None:
    x = activations(shape)
    with on_threads(threads), Names() as calls:
        ours = run(relu_avg_pool2d, x, kernel)
    assert {"pqk_fast::relu_avg_pool2d", "pqk_fast::relu_avg_pool2d_backward"} <= set(calls.names)
    for one, other in zip(ours, run(eager, x, kernel), strict=True):
        assert_same(one, other)


@pytest.mark.native
@every_isa
def test_every_instruction_set_has_torchs_bits(isa: str) -> None:
    run_with(
        isa,
        "import test_pooling as t\n"
        "for shape, kernel in t.CASES:\n"
        "    x = t.activations(shape)\n"
        "    for pair in zip(t.run(t.relu_avg_pool2d, x, kernel), t.run(t.eager, x, kernel)):\n"
        "        t.assert_same(*pair)\n",
    )


FEW_CHANNELS = [((3, channels, 9, 8), (4, 3)) for channels in (2, 3)]


@pytest.mark.parametrize(("shape", "kernel"), [*FEW_CHANNELS, *CASES[-4:]], ids=str)
def test_the_operations_themselves(shape: tuple[int, ...], kernel: Kernel) -> None:
    """Those of the C++ library; without it those in plain PyTorch."""
    x = activations(shape)
    out, grad_x = run(eager, x, kernel)
    assert_same(dispatch.relu_avg_pool2d(x, *kernel), out)
    assert_same(dispatch.relu_avg_pool2d_backward(upstream(out), x, *kernel), grad_x)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "every other"])
def test_gradients_of_any_layout(layout: str) -> None:
    x = activations((2, 19, 9, 8)).nan_to_num(0.5)
    grad = normal_like(eager(x, (4, 3)).contiguous(), 4)
    if layout == "expanded":
        grad = grad[:, :, :1, :1].expand_as(grad)
    elif layout == "every other":
        grad = torch.stack([grad, torch.full_like(grad, torch.nan)], -1)[..., 0]
    both = []
    for function in (relu_avg_pool2d, eager):
        inputs = x.detach().requires_grad_()
        both.append(torch.autograd.grad(function(inputs, (4, 3)), inputs, grad)[0])
    assert_same(*both)


BASE = activations((3, 5, 8, 9))


@pytest.mark.parametrize(
    "x",
    [
        BASE.contiguous(),
        BASE.bfloat16(),
        BASE.half(),
        BASE.double(),
        BASE[:, :, ::2],
        BASE[0],
        BASE[:0],
        activations((3, 3, 8, 9)),
        BASE.to("meta"),
        torch.nn.Parameter(BASE, requires_grad=False),
    ],
    ids=["contiguous", "bf16", "fp16", "fp64", "strided", "3-d", "empty", "three channels", "meta", "subclass"],
)
def test_all_else_is_torchs_own(x: Tensor) -> None:
    with Names() as calls:
        out = relu_avg_pool2d(x, (3, 2))
    assert not any("pqk_fast" in name for name in calls.names)
    if x.is_meta:
        assert (out.shape, out.stride()) == (eager(x, (3, 2)).shape, eager(x, (3, 2)).stride())
    else:
        assert_same(out, eager(x, (3, 2)))


@pytest.mark.parametrize("kernel", [(9, 2), (2, 10), (0, 2), (-1, 2)])
def test_what_is_wrong_is_torchs_error(kernel: Kernel) -> None:
    with pytest.raises(RuntimeError) as torchs:
        eager(BASE, kernel)
    with pytest.raises(RuntimeError) as ours:
        relu_avg_pool2d(BASE, kernel)
    assert str(ours.value) == str(torchs.value)


def test_gradients_only_where_asked_and_of_gradients() -> None:
    x = BASE.nan_to_num(0.5, 2.0, -2.0)
    assert not relu_avg_pool2d(x, (3, 2)).requires_grad
    with torch.no_grad():
        assert not relu_avg_pool2d(x.detach().requires_grad_(), (3, 2)).requires_grad
    twice = []
    for function in (relu_avg_pool2d, eager):
        inputs = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(inputs, (3, 2)).pow(3).sum(), inputs, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), inputs)[0])
    assert_same(*twice)
    assert twice[0].count_nonzero() > 0


def test_transforms_forward_mode_and_checkpoints() -> None:
    x = BASE.nan_to_num(0.5, 2.0, -2.0)

    def function(x: Tensor) -> Tensor:
        return relu_avg_pool2d(x, (3, 2))

    for one, other in zip(
        *(torch.func.jvp(f, (x,), (x + 1,)) for f in (function, lambda x: eager(x, (3, 2)))), strict=True
    ):
        assert torch.equal(one, other)
    stacked = torch.stack([x, 2 * x])
    assert torch.equal(torch.vmap(function)(stacked), torch.stack([eager(x, (3, 2)), eager(2 * x, (3, 2))]))
    grad = torch.func.grad(lambda x: function(x).square().sum())(x)
    assert torch.equal(grad, torch.func.grad(lambda x: eager(x, (3, 2)).square().sum())(x))
    again = x.detach().requires_grad_()
    checkpoint(function, again, use_reentrant=False).square().sum().backward()
    assert torch.equal(again.grad, grad)


def test_compiled_and_exported_it_is_torchs() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return relu_avg_pool2d(x, (3, 2))

    x = BASE.detach().requires_grad_()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert_same(out.detach(), eager(BASE, (3, 2)))
    out.backward(upstream(out.detach()))
    assert x.grad is not None
    assert_same(x.grad, run(eager, BASE, (3, 2))[1])
    exported = torch.export.export(Module(), (BASE,))
    assert not any("pqk_fast" in str(node.target) for node in exported.graph.nodes)
    assert_same(exported.module()(BASE), eager(BASE, (3, 2)))


@pytest.mark.native
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((BASE.contiguous(), 3, 2), "x must be fp32, channels_last"),
        ((BASE.double(), 3, 2), "x must be fp32, channels_last"),
        ((BASE[:0], 3, 2), "x must be fp32, channels_last"),
        ((BASE, 9, 2), "a window of 9 by 2 fits into"),
        ((BASE, 3, 10), "a window of 3 by 10 fits into"),
        ((BASE, 0, 2), "a window of 0 by 2 fits into"),
        ((BASE, 3, -1), "a window of 3 by -1 fits into"),
        ((torch.zeros(2, 4, 4, 4, 3).permute(0, 4, 1, 2, 3), 3, 2), "expected a 4-d x"),
    ],
)
def test_raw_calls_stay_within_memory(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dispatch.relu_avg_pool2d(*args)
    with pytest.raises(RuntimeError, match=message):
        dispatch.relu_avg_pool2d_backward(torch.zeros(3, 5, 2, 4), *args)


@pytest.mark.native
@pytest.mark.parametrize(
    "grad",
    [torch.zeros(3, 5, 2, 5), torch.zeros(3, 5, 2), torch.zeros(3, 5, 2, 4).double()],
    ids=["size", "3-d", "fp64"],
)
def test_raw_backward_calls_stay_within_memory(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="grad must be fp32, on the CPU and of the result's shape"):
        dispatch.relu_avg_pool2d_backward(grad, BASE, 3, 2)
