"""Builds the C++ library; everything else is in pyproject.toml.

PQK_FAST_BUILD_EXT=0 leaves the library out: operations on the CPU then run in plain PyTorch.
"""

import hashlib
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # of torch 2.11: the library runs on that and every later version


def sources_digest() -> str:
    """What pqk_fast.native compares, so that a library of other sources is not taken for these."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def extension() -> dict:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"pqk_fast's C++ library is built against torch, which cannot be imported here ({error}): install torch "
            "2.11 or newer first and use pip install --no-build-isolation, or set PQK_FAST_BUILD_EXT=0"
        )
    for name in ("CC", "CXX"):  # setuptools compiles with the first and links with the second
        words = shlex.split(os.environ.get(name) or sysconfig.get_config_var(name) or "c++")
        compiler = next(word for word in words if word not in ("ccache", "sccache", "distcc"))
        if shutil.which(compiler) is None:
            sys.exit(
                f"pqk_fast's C++ library needs a C++17 compiler, and {compiler!r} is not found: install one (apt-get "
                "install g++, or dnf install gcc-c++), name it in CC and CXX, or set PQK_FAST_BUILD_EXT=0 to do without"
            )
    # Contraction to fused multiply-add would change bits; trapping math only keeps loops from being vectorised.
    flags = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
    library = CppExtension(
        "pqk_fast._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("PQK_SOURCES", sources_digest()),
            ("PQK_TORCH", torch.__version__),
        ],
        extra_compile_args=[*flags, "-fvisibility=hidden"],
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**({} if os.environ.get("PQK_FAST_BUILD_EXT") == "0" else extension()))
