"""What runs each operation on this machine, and why not something faster."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

OPERATIONS = (
    "fake_quant",
    "fake_quant_all",
    "dual_linear",
    "dual_conv2d",
    "topk_mask",
    "pack_int4",
    "pack_bits",
)


@dataclass(frozen=True)
class Backend:
    """One operation on one device: what runs it, and why nothing faster does."""

    operation: str
    device: str
    implementation: str
    why_not_faster: str


def backends() -> list[Backend]:
    """The implementation of every operation on every device that this machine has."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kernels = {"cpu": "a C++ library", "cuda": "Triton kernels"}
    return [
        Backend(operation, device, "PyTorch", f"this version has no {kernels[device].removeprefix('a ')} yet")
        for device in devices
        for operation in OPERATIONS
    ]


def optional_packages() -> dict[str, str]:
    """For each optional package: its version, or why it cannot be imported."""
    found = {}
    for name in ("triton", "torchvision", "torchaudio", "matplotlib", "PIL", "espeakng_loader"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            found[name] = f"not usable: {str(error).splitlines()[0]}"
        else:
            found[name] = str(getattr(module, "__version__", "installed"))
    return found
