"""Which operations the Triton kernels stand for, and how many launches a step takes.

Counted in processes of their own, where the CPU's operations are Triton's (interpreted).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pqk_fast import dispatch, dual_ops, gpu, ops
from pqk_fast.native import OPERATIONS, backends

ROOT = Path(__file__).parent.parent


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
        for module in (dispatch, dual_ops)
        for value in vars(module).values()
        if isinstance(value, torch._ops.OpOverload)
    }
    assert set(gpu.LAUNCHERS) <= defined
    assert not {name for name in defined - set(gpu.LAUNCHERS) if not name.startswith("batch_norm")}
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
