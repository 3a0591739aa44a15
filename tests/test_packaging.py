"""What setup.py does where something is missing, and what goes into an archive of the sources."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables})


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_a_missing_compiler_gives_the_remedy(variable: str, tmp_path: Path) -> None:
    done = setup("build_ext", "--build-lib", str(tmp_path), **{variable: "no-such-compiler -O2"})
    assert done.returncode == 1
    assert "needs a C++17 compiler, and 'no-such-compiler' is not found: install one (apt-get install" in done.stderr
    assert "PQK_FAST_BUILD_EXT=0 to do without" in done.stderr
    assert not list(tmp_path.rglob("*"))


def test_the_library_can_be_left_out(tmp_path: Path) -> None:
    done = setup("build", "--build-base", str(tmp_path), PQK_FAST_BUILD_EXT="0", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert list(tmp_path.rglob("reference.py"))


def test_an_archive_of_the_sources_has_what_building_needs(tmp_path: Path) -> None:
    done = setup("sdist", "--dist-dir", str(tmp_path), "egg_info", "--egg-base", str(tmp_path), PQK_FAST_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    recipes = {f"pqk_fast/recipes/{path.name}" for path in (ROOT / "pqk_fast" / "recipes").glob("*.toml")}
    assert sources | recipes | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
