"""The Triton kernels: whether they can be used here, and which of them stands for which operation.

Environment: ``PQK_FAST_TRITON=0`` leaves them alone; ``TRITON_INTERPRET=1`` (Triton's own) runs them in plain Python on
CPU tensors, for tests, where the C++ library is not used.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

# Each operation of pqk_fast.dispatch that has a launcher of its name, and the file of that launcher.
LAUNCHERS = {
    "fake_quant": "fake_quant",
    "fake_quant_all": "fake_quant",
    "fake_quant_backward": "fake_quant",
    "fake_quant_all_backward": "fake_quant",
    "dual_weight_backward": "dual_forward",
    "dual_linear": "dual_forward",
    "dual_linear_backward": "dual_forward",
}


def interpreted() -> bool:
    """True if Triton was told to run its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def problem() -> str:
    """Why the Triton kernels are not used; empty if they are."""
    if os.environ.get("PQK_FAST_TRITON") == "0":
        return "switched off by PQK_FAST_TRITON=0"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import ({error}); it comes with torch's GPU builds for Linux"
    return ""


@functools.cache
def launcher(operation: str) -> Callable[..., Any] | None:
    """What runs an operation on a GPU, or None where that is plain PyTorch."""
    if operation not in LAUNCHERS or problem():
        return None
    module = importlib.import_module(f"pqk_fast.triton_kernels.{LAUNCHERS[operation]}")
    found: Callable[..., Any] = getattr(module, operation)
    return found
