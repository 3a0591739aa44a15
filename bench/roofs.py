"""What the machine can do at most, measured in the same rounds as the candidates: a large copy, a large product.

No call can be faster than its floor: the bytes that it must move at the speed of torch's copy (bytes read and
written), or its products and sums at the rate of torch's square matrix product in the same arithmetic, whichever takes
longer. A candidate's share of the roof is that floor over its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timing import Call

COPY_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}  # larger than any cache
PRODUCT_SIZE = {"cpu": {}, "cuda": {"bf16": 8192, "tf32": 8192, "fp32": 4096}}
ARITHMETICS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Roof:
    """A call, and how many bytes it moves or how many operations it makes."""

    call: Call
    work: float


def copy_roof(device: str) -> Roof:
    size = COPY_BYTES[device]
    generator = torch.Generator(device).manual_seed(0)
    source = torch.rand(size // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    return Roof(lambda: target.copy_(source), 2 * size)


def product_roof(device: str, arithmetic: str) -> Roof:
    """To be called within the same arithmetic."""
    n = PRODUCT_SIZE[device].get(arithmetic, 1024)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Roof(lambda: torch.mm(a, b, out=out), 2.0 * n**3)


@contextmanager
def arithmetic_of(name: str, device: str) -> Iterator[None]:
    """fp32 as IEEE has it, or rounded to tf32 for products, or autocast to bf16 (without a cache of cast weights,
    which would outlive a call)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
