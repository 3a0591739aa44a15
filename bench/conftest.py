"""``pytest bench``: options, and one test for each of the kernels' cases and candidates."""

from __future__ import annotations

import importlib.util

import pytest
from listing import DEVICE, listed

CANDIDATES = ("pqk_fast", "eager", "torch.compile")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pqk_fast")
    group.addoption("--shrink", type=int, default=1, help="divide the sizes by this, to try the cases out")
    group.addoption("--without", action="append", default=[], metavar="CANDIDATE", help="repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    cases = listed(DEVICE, metafunc.config.getoption("shrink"))
    chosen = [name for name in CANDIDATES if name not in metafunc.config.getoption("without")]
    pairs = [(case, candidate) for case in cases for candidate in chosen]
    names = [f"{case.benchmark}: {case.name}: {candidate}" for case, candidate in pairs]
    metafunc.parametrize(("case", "candidate"), pairs, ids=names)


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> None:
        pytest.skip("needs pytest-benchmark: pip install 'pqk-fast[test]'; pqk-fast bench does without")
