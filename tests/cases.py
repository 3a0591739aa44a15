"""What the tests share: tolerances, shapes, dtypes, devices, and inputs made from a seed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# A sum of products may differ from its fp64 value by this share of the sum of the products' magnitudes (not of the
# result, which may cancel). Quantized values and fake-quantized weights are compared with torch.equal, in every dtype.
TOLERANCES = {
    # 16 roundings of 2^-24: each product, its factors, and log2(N) levels of a pairwise sum of N <= 2^12 products
    torch.float32: 2.0**-20,
    # two roundings of 2^-11, one of S q and one of the result; the sum itself is in fp32
    torch.float16: 2.0**-10,
    # two roundings of 2^-8, the same two
    torch.bfloat16: 2.0**-7,
}
DTYPES = list(TOLERANCES)
# (estimator, mask_gradients)
STE = [("identity", False), ("identity", True), ("clipped", False), ("clipped", True)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Tests that call Triton's launchers themselves do so on the GPU, or interpreted where there is none.
KERNEL_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
on_kernel_device = pytest.mark.gpu if KERNEL_DEVICE.type == "cuda" else pytest.mark.interpreter


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch, and the C++ library with it, compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


every_isa = pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])


def run_with(isa: str, program: str) -> None:
    """Run a program, which may import tests, with the C++ library's code for that instruction set (or less, where the
    machine has less)."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PQK_FAST_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Case:
    """Shape and memory layout of a weight, and the shape of its step: "[1]", "[]" or "[C]"."""

    shape: tuple[int, ...]
    step: str = "[1]"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or '0-d'}-{self.layout}-S{self.step}"


CASES = [
    Case(()),
    Case((), step="[]"),
    Case((1,)),
    Case((0,)),
    Case((0, 5), step="[C]"),
    Case((3, 0), step="[C]"),
    Case((257,), step="[]"),  # a prime
    Case((1023,)),  # a block less one
    Case((1025,)),  # a block and one
    Case((13, 31)),
    Case((13, 31), step="[C]"),
    Case((1, 37), step="[C]"),
    Case((13, 31), step="[C]", layout="transposed"),
    Case((17, 23), layout="transposed"),
    Case((17, 23), layout="strided"),
    Case((17, 23), step="[C]", layout="strided"),
    Case((19, 3, 3, 3)),
    Case((19, 3, 3, 3), step="[C]"),
    Case((8, 5, 3, 3), step="[C]", layout="channels_last"),
]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """``values`` in another memory layout, between elements that hold NaN (True for masks) if there are any."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        padding = torch.nan if values.is_floating_point() else True
        out = torch.full((2 * values.shape[0], 3 * values.shape[1]), padding, dtype=values.dtype, device=values.device)
        out[::2, 1::3] = values
        return out[::2, 1::3]
    assert layout == "contiguous", layout
    return values


def quantizer_inputs(
    case: Case, bits: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(weight, mask, step)``: normal weights, half of them pruned, grid ends between 1.1 and 1.9 (some clip)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.shape, generator=generator).to(device, dtype)
    mask = (torch.rand(case.shape, generator=generator) < 0.5).to(device)
    step_shape = {"[]": (), "[1]": (1,), "[C]": case.shape[:1]}[case.step]
    ends = 1.1 + 0.8 * torch.rand(step_shape, generator=generator)
    step = (ends / (2 ** (bits - 1) - 1)).to(device)
    return laid_out(weight, case.layout), laid_out(mask, case.layout), step


def normal_like(values: Tensor, seed: int = 1) -> Tensor:
    """Normal values of the same shape, dtype and device: an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(values.shape, generator=generator).to(values)


def step_gradient_magnitude(grad: Tensor, weight: Tensor, mask: Tensor, step: Tensor, bits: int) -> Tensor:
    """The sum of ``|g| (|round(v)| + |v|)`` for each step: what the rounding of dS is measured against."""
    rows = (max(step.numel(), 1), weight.numel() // max(step.numel(), 1))
    v = torch.where(mask, weight, 0.0).double().reshape(rows) / step.double().reshape(-1, 1)
    v = v.clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1).abs()
    return (grad.double().reshape(rows).abs() * (v.round() + v)).sum(1)[: step.numel()].reshape(step.shape)


def assert_within(
    actual: Tensor, truth: Tensor, magnitude: Tensor, dtype: torch.dtype, baseline: Tensor | None = None
) -> None:
    """``actual`` errs by no more than the dtype's tolerance times ``magnitude``, everywhere.

    With ``baseline``, PyTorch's own result in that dtype: by no more than it does plus that (its low-precision kernels
    do not all sum in fp32).
    """
    assert actual.shape == truth.shape
    error, allowed = (actual.double() - truth.double()).abs(), TOLERANCES[dtype] * magnitude.double()
    if baseline is not None:
        allowed += (baseline.double() - truth.double()).abs()
    assert (error <= allowed).all(), f"off by {(error - allowed).max():.3g} more than allowed"


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and value, and no negative zero."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual, expected)
    assert not (torch.signbit(actual) & (actual == 0)).any()


def with_gradients(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def required(capability: str) -> bool:
    return os.environ.get(f"PQK_FAST_REQUIRE_{capability}") == "1"


def needs_triton() -> None:
    """Leaves a test file out where there is no Triton; an error if PQK_FAST_REQUIRE_{INTERPRETER,GPU}=1."""
    if importlib.util.find_spec("triton") is None:
        if required("INTERPRETER") or required("GPU"):
            raise ImportError("PQK_FAST_REQUIRE_INTERPRETER=1 or PQK_FAST_REQUIRE_GPU=1, but there is no Triton")
        pytest.skip("needs Triton", allow_module_level=True)


def package(name: str) -> Any:
    """An optional package, imported; without it the test is skipped, or fails if PQK_FAST_REQUIRE_PACKAGES=1."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # builds that do not match torch fail in all three ways
        if required("PACKAGES"):
            pytest.fail(f"PQK_FAST_REQUIRE_PACKAGES=1, but {name} does not import: {error}")
        pytest.skip(f"{name} does not import: {error}")
