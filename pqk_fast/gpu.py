"""The Triton kernels: whether they can be used here, and which of them stands for which operation.

Environment: ``PQK_FAST_TRITON=0`` leaves them alone; ``TRITON_INTERPRET=1`` (Triton's own) runs them in plain Python on
CPU tensors, for tests, where the C++ library is not used.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Each operation of pqk_fast.dispatch that has a launcher of its name, and the file of that launcher.
LAUNCHERS = {
    "fake_quant": "fake_quant",
    "fake_quant_all": "fake_quant",
    "fake_quant_backward": "fake_quant",
    "fake_quant_all_backward": "fake_quant",
    "dual_weight_backward": "dual_weight",
    "dual_linear": "dual_forward",
    "dual_linear_backward": "dual_forward",
    "dual_conv2d": "dual_conv2d",
    "dual_conv2d_backward": "dual_conv2d_backward",
    "topk_mask_": "topk_mask",
    "magnitude_histogram": "topk_mask",
    "tie_counts": "topk_mask",
    "mask_at_threshold_": "topk_mask",
    "group_mask_": "group_mask",
    "pack_ints": "int4",
    "unpack_ints": "int4",
    "pack_bits": "int4",
    "unpack_bits": "int4",
}


@functools.cache
def problem() -> str:
    """Why the Triton kernels are not used; empty if they are."""
    if os.environ.get("PQK_FAST_TRITON") == "0":
        return "switched off by PQK_FAST_TRITON=0"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import ({error}); it comes with torch's GPU builds for Linux"
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not compiler or not header.is_file():
            missing = f"Python's headers ({header})" if compiler else "a C compiler (gcc, or one named in CC)"
            return f"Triton builds its launchers with a C compiler, and {missing} is not there: install it"
    return ""


@functools.cache
def interpreted() -> bool:
    """True if Triton was told to run its kernels on the CPU, and can be used."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not problem()


@functools.cache
def launcher(operation: str) -> Callable[..., Any] | None:
    """What runs an operation on a GPU, or None where that is plain PyTorch."""
    if operation not in LAUNCHERS or problem():
        return None
    module = importlib.import_module(f"pqk_fast.triton_kernels.{LAUNCHERS[operation]}")
    found: Callable[..., Any] = getattr(module, operation)
    return found


def errors(device: torch.device) -> bool:
    """Whether a kernel on this GPU met a bad step size or weights that cannot be ranked since this was last asked.

    Kernels cannot raise; they set a flag. Reading it waits for the GPU, so this is for when masks or logs are made.
    True also where no flag is kept: the caller looks at the values then.
    """
    operands = sys.modules.get("pqk_fast.triton_kernels.operands")
    if operands is None:
        return True
    flags = operands.error_flags(device)
    found = bool(flags.any())
    if found:
        flags.zero_()
    return found
