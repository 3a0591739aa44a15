"""Which operations the Triton kernels stand for, and how many launches a step takes.

Counted in processes of their own, where the CPU's operations are Triton's (interpreted).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import normal_like
from torch import Tensor

from pqk_fast import dispatch, dual_ops, gpu, ops
from pqk_fast.deploy import executor
from pqk_fast.native import OPERATIONS, backends

ROOT = Path(__file__).parent.parent

# Operations that fuse what is slow on the CPU; on a GPU they are PyTorch's.
CPU_ALONE = {
    "batch_norm",
    "batch_norm_backward",
    "relu_avg_pool2d",
    "relu_avg_pool2d_backward",
    "sparse_conv2d",
    "run_network",
}


def run(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PQK_FAST", "TRITON"))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**environment, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


def interpreted(program: str) -> str:
    return run(program, TRITON_INTERPRET="1", PQK_FAST_NATIVE="0", OMP_NUM_THREADS="1")


def test_every_launcher_is_an_operation_and_exists() -> None:
    defined = {
        value.name().removeprefix("pqk_fast::").removesuffix(".default")
        for module in (dispatch, dual_ops, executor)
        for value in vars(module).values()
        if isinstance(value, torch._ops.OpOverload)
    }
    assert set(gpu.LAUNCHERS) <= defined
    assert defined - set(gpu.LAUNCHERS) == CPU_ALONE
    if not gpu.problem():
        assert all(callable(gpu.launcher(name)) for name in gpu.LAUNCHERS)


@pytest.mark.interpreter
def test_interpreted_kernels_stand_in_for_the_cpu() -> None:
    program = "from pqk_fast import native\nprint({b.implementation for b in native.backends() if b.device == 'cpu'})"
    assert interpreted(program) == "{'Triton'}\n"


def test_triton_can_be_left_alone() -> None:
    program = "from pqk_fast import gpu; print(gpu.problem(), gpu.launcher('fake_quant'), gpu.interpreted())"
    made = run(program, PQK_FAST_TRITON="0", TRITON_INTERPRET="1")
    assert made == "switched off by PQK_FAST_TRITON=0 None False\n"
    assert {backend.operation for backend in backends()} == set(OPERATIONS)


COUNTING = """
import json, sys
import torch
from triton.runtime.interpreter import GridExecutor
import pqk_fast as pqk
from pqk_fast.models import res8_narrow
launches = []
run = GridExecutor.__call__
def counted(self, *args, **kwargs):
    launches.append(self.fn.__name__)
    return run(self, *args, **kwargs)
GridExecutor.__call__ = counted
counts = {}
def count(name):
    counts[name] = list(launches)
    launches.clear()
torch.manual_seed(0)
"""


@pytest.mark.interpreter
def test_a_model_takes_one_launch_each_way_for_all_its_weights() -> None:
    program = (
        COUNTING
        + """
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5)))
pqk.prepare(model, pqk.PQKConfig(bits=4, sparsity=0.5))
pruner = pqk.Pruner(model, steps=100, epoch_steps=10)
pqk.fuse(model)
launches.clear()
out = model(torch.randn(4, 8)).sum()
count("forward")
out.backward()
count("backward")
for _ in range(32):
    pruner.step()
count("masks")
print(json.dumps(counts))
"""
    )
    counts = json.loads(interpreted(program))
    assert counts["forward"] == ["_forward"]
    assert counts["backward"] == ["_backward"]
    assert 1 <= len(counts["masks"]) <= 6


@pytest.mark.interpreter
def test_a_dual_layer_takes_one_launch_forward_and_two_backward() -> None:
    program = (
        COUNTING
        + """
from pqk_fast import ops
w, m, s = torch.randn(24, 16, requires_grad=True), torch.rand(24, 16) < 0.5, torch.tensor([0.1])
x = torch.randn(6, 16, requires_grad=True)
out = ops.dual_linear(x, w, m, s, 4).sum()
count("forward")
out.backward()
count("backward")
print(json.dumps(counts))
"""
    )
    counts = json.loads(interpreted(program))
    assert counts["forward"] == ["_product"]
    assert sorted(counts["backward"]) == ["_product", "_weight_gradient"]


@pytest.mark.interpreter
def test_a_dual_convolution_takes_one_launch_forward_and_two_backward() -> None:
    program = (
        COUNTING
        + """
from pqk_fast import ops
w, m, s = torch.randn(5, 3, 3, 3, requires_grad=True), torch.rand(5, 3, 3, 3) < 0.5, torch.tensor([0.1])
x = torch.randn(4, 3, 6, 5, requires_grad=True)
out = ops.dual_conv2d(x, w, m, s, 4, padding=1).sum()
count("forward")
out.backward()
count("backward")
ops.dual_conv2d(x[:, :1], w.detach()[:, :1], m[:, :1], s, 4, groups=1, padding=1)
count("again")
ops.dual_conv2d(x, w.detach()[:3, :1], m[:3, :1], s, 4, groups=3)
count("groups: the student's weight in one launch")
print(json.dumps(counts))
"""
    )
    counts = json.loads(interpreted(program))
    assert [len(names) for names in counts.values()] == [1, 2, 1, 1]


def dual_layers(weight: Tensor, mask: Tensor, step: Tensor, x: Tensor, images: Tensor) -> Tensor:
    kernel = weight[..., None, None]
    both = ops.dual_conv2d(images, kernel, mask[..., None, None], step, 4, padding=1)
    return ops.dual_linear(x, weight, mask, step, 4).sum() + both.sum() + ops.fake_quant(weight, mask, step, 4).sum()


def test_the_operations_compile_without_a_break_and_without_data() -> None:
    """Traced on the meta device, forward and backward, as they are traced for a GPU."""
    torch._dynamo.reset()
    weight, x = torch.empty(6, 5, device="meta", requires_grad=True), torch.empty(4, 5, device="meta")
    mask, step = torch.empty(6, 5, device="meta", dtype=torch.bool), torch.empty(1, device="meta", requires_grad=True)
    images = torch.empty(4, 5, 3, 3, device="meta")
    compiled = torch.compile(dual_layers, fullgraph=True, backend="aot_eager")
    compiled(weight, mask, step, x, images).backward()
    assert (weight.grad.shape, step.grad.shape) == (weight.shape, step.shape)

    def select(masks: list[Tensor], weights: list[Tensor], k: Tensor) -> Tensor:
        ops.topk_mask_(masks, weights, k)
        return masks[0]

    chosen = torch.compile(select, fullgraph=True, backend="aot_eager")
    out = chosen([mask], [weight.detach()], torch.empty((), dtype=torch.int64, device="meta"))
    assert (out.shape, out.dtype) == (mask.shape, torch.bool)


def some_step(device: str, rows: int = 4) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """Fake-quantization of layers and a dual layer, forward and backward; and its inputs, which may be rewritten."""
    shapes = [(300, 70), (16, 16), (64, 1000)]
    weights = [normal_like(torch.empty(s, device=device), seed=i).requires_grad_() for i, s in enumerate(shapes)]
    masks = [normal_like(weight, seed=9) > 0 for weight in weights]
    steps = [torch.full((1,), 0.3, device=device, requires_grad=True) for _ in shapes]
    x = normal_like(torch.empty(2 * rows, 1000, device=device), seed=5)

    def step() -> list[Tensor]:
        made = ops.fake_quant_all(weights, masks, steps, 4)
        both = ops.dual_linear(x, weights[2], masks[2], steps[2], 4)
        total = sum((each * each).sum() for each in [*made, both])
        return [both.detach(), *torch.autograd.grad(total, [*weights, *steps])]

    return step, [*weights, x]


@pytest.mark.gpu
def test_a_step_is_captured_and_replayed_anywhere() -> None:
    """With other values than it was captured with, and in another stream; sums for S come out the same."""
    step, inputs = some_step("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        made = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(made, step(), strict=True))


@pytest.mark.gpu
def test_streams_do_not_meet() -> None:
    step, _ = some_step("cuda")
    expected = step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for index in range(20):
        with torch.cuda.stream(streams[index % 2]):
            results.append(step())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for made in results for a, b in zip(made, expected, strict=True))


@pytest.mark.gpu
def test_graphs_that_torch_compile_captures() -> None:
    step, _ = some_step("cuda")
    expected = step()
    torch._dynamo.reset()
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):
        made = [tensor.clone() for tensor in compiled()]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(made, expected, strict=True))


@pytest.mark.gpu
def test_one_row_a_half() -> None:
    step, _ = some_step("cuda", rows=1)
    assert step()[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one() -> None:
    here, there = some_step("cuda:0")[0](), some_step("cuda:1")[0]()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))
