"""Fixtures for all tests.

What a machine lacks is skipped by name; PQK_FAST_REQUIRE_{DATA,GPU,INTERPRETER,NATIVE,PACKAGES}=1 makes it a failure.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import package, required
from hypothesis import settings

# Where there is no GPU, Triton kernels run interpreted. Triton reads this when a kernel is defined.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pqk_fast import gpu, native

settings.register_profile("pqk_fast", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("pqk_fast")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are compared in fp32
    if gpu.interpreted():
        import interpreter

        interpreter.mend()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if required("GPU"):
            pytest.fail("PQK_FAST_REQUIRE_GPU=1, but torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("interpreter") and not gpu.interpreted():
        why = gpu.problem() or "TRITON_INTERPRET is not 1"
        if required("INTERPRETER"):
            pytest.fail(f"PQK_FAST_REQUIRE_INTERPRETER=1, but {why}")
        pytest.skip(f"needs Triton's interpreter: {why}")
    if item.get_closest_marker("native") and native.library().path is None:
        pytest.skip(f"needs the C++ library: {native.library().problem}")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """Imports a file of ``bench/`` as its scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN (the largest value for integers), so that what is never written shows.

    Memory that C++ takes past torch.empty holds bytes of 0x7f (3.4e38 as fp32), where the C library is glibc.
    """
    perturb = partial(ctypes.CDLL(None).mallopt, -6) if platform.libc_ver()[0] == "glibc" else lambda _: 1
    assert perturb(0x80) == 1 or "libasan" in os.environ["LD_PRELOAD"]  # which fills memory itself
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    perturb(0)
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that the tests may read."""
    folder = os.environ.get("PQK_FAST_DATA")
    if folder:
        path = Path(folder)
        if not path.is_dir():
            pytest.fail(f"PQK_FAST_DATA={folder} is not a folder")
        return path
    if required("DATA"):
        pytest.fail("PQK_FAST_REQUIRE_DATA=1, but PQK_FAST_DATA does not say where the data sets are")
    pytest.skip("set PQK_FAST_DATA to the folder that holds the data sets")


@pytest.fixture(scope="session")
def real_speech(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of Speech Commands in Google's folder layout: real recordings."""
    package("soundfile")  # the archives hold FLAC
    target = tmp_path_factory.mktemp("data") / "speech"
    subprocess.run([sys.executable, str(shared_data / "unpack.py"), "speech", str(target)], check=True)
    return target
