"""The C++ library: found, refused with the reason, or done without."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pqk_fast import native

ROOT = Path(native.__file__).parent.parent
PROGRAM = """
import sys, torch
from pqk_fast import native, ops
library = native.library()
weight = torch.linspace(-1, 1, 33)
ops.fake_quant(weight, weight > 0, torch.tensor([0.1]), 4)
ops.fake_quant(weight, weight > 0, torch.tensor([0.1]), 4)
print(library.path, library.problem, library.build, sep="\\n")
"""


def run(program: str = PROGRAM, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PQK_FAST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**environment, **variables}
    )


@pytest.mark.native
def test_the_library_is_loaded_and_says_what_it_is() -> None:
    library = native.library()
    assert library.path is not None
    assert library.problem == ""
    assert re.fullmatch(r"sources [0-9a-f]{16}, torch [\w.+]+, compiler .+", library.build)
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == str(library.path)
    assert re.search(r", built from sources .*; runs (baseline|avx2|avx512) code here$", str(library))
    assert {backend.implementation for backend in native.backends() if backend.device == "cpu"} == {"C++"}


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "no such thing"])
def test_every_instruction_set_gives_the_same_bits(isa: str, tmp_path: Path) -> None:
    """One that this machine lacks falls back to the best it has, and so does an unknown name."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cases import CASES, DTYPES, Case, normal_like, quantizer_inputs
from pqk_fast import dispatch, native
assert native.library().path
out = []
for dtype in DTYPES:
    for case in [*CASES, Case((3, 70_001), step="[C]")]:
        weight, mask, step = quantizer_inputs(case, 4, dtype)
        out.append(dispatch.fake_quant(weight, mask, step, 4, DTYPES[len(out) % 3]))
        grad = normal_like(weight).to(DTYPES[len(out) % 3])
        out += dispatch.fake_quant_backward(grad, weight, mask, step, 4, True, True, True, True)
        out.append(dispatch.dual_weight_backward(grad, grad * 2, weight, mask, step, 4, True))
torch.save(out, sys.argv[1])
"""
    results = []
    for name, variables in (("default", {}), (isa, {"PQK_FAST_ISA": isa})):
        path = tmp_path / f"{name}.pt"
        done = run(program.replace("sys.argv[1]", repr(str(path))), **variables)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_a_library_there_is_one_warning(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.so")
    done = run(PQK_FAST_LIBRARY=missing)
    assert done.returncode == 0
    assert done.stdout.startswith("None\n")
    assert done.stderr.count("operations on the CPU run in plain PyTorch, slowly") == 1
    assert re.search(r"there is no file .*build it with: pip install --no-build-isolation", done.stderr, re.DOTALL)


def test_switched_off_there_is_none() -> None:
    done = run(
        "from pqk_fast import native; print(native.library(), *{b.why_not_faster for b in native.backends()})",
        PQK_FAST_NATIVE="0",
    )
    assert done.stdout.startswith("not used: switched off by PQK_FAST_NATIVE=0 the C++ library is not used")
    done = run(PQK_FAST_NATIVE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("None\nswitched off by PQK_FAST_NATIVE=0\n")


def test_required_a_missing_library_is_an_error(tmp_path: Path) -> None:
    done = run("import pqk_fast", PQK_FAST_LIBRARY=str(tmp_path / "missing.so"), PQK_FAST_REQUIRE_NATIVE="1")
    assert done.returncode == 1
    assert "NativeLibraryError: PQK_FAST_REQUIRE_NATIVE=1, but" in done.stderr


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "_C.abi3.so"
    digest = native.sources_digest(ROOT / "csrc")
    path.write_bytes(b"\x7fELF pqk_fast build: sources=%s torch=9.9.9 compiler=99.1 x y\n\0" % str(digest).encode())
    assert native.build_of(path) == {"sources": str(digest), "torch": "9.9.9", "compiler": "99.1 x y"}
    done = run(PQK_FAST_LIBRARY=str(path))
    assert re.search(
        rf"{re.escape(str(path))} was built with sources \w+, torch 9\.9\.9, compiler 99\.1 x y, this is torch "
        rf"{re.escape(torch.__version__)}, Python [\d.]+; it cannot be loaded: .*; build it with: ",
        done.stderr,
    )


@pytest.mark.native
def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    """Someone changed csrc/ and did not build: what runs must be what is read."""
    shutil.copytree(ROOT / "pqk_fast", tmp_path / "pqk_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").write_text("int changed;\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    done = run(program, PQK_FAST_LIBRARY=str(native.library().path))
    assert done.stdout.startswith("None\n")
    assert re.search(r"was built from other sources \(sources \w{16}, .* than those beside this package", done.stderr)


def test_setup_and_the_package_agree_on_the_sources() -> None:
    """They compute the digest apart, because building must not import the package."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("runs from an installed package, which has no sources")
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.sources_digest())"
    done = run(code, PQK_FAST_BUILD_EXT="0")
    assert done.stdout.strip() == native.sources_digest(ROOT / "csrc")


def test_a_folder_named_csrc_of_someone_else_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text("int other;\n")
    assert native.sources_digest(tmp_path) is None
