"""``pqk-fast bench``: the gate, the record, and comparing two of them."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_bench import BENCH, ROOT, report_of

from pqk_fast import cli
from pqk_fast.commands import bench as command


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds this clone's benchmarks even where the package is tested as it was installed."""
    monkeypatch.setattr(command, "BENCH", BENCH)


def cell(median: float, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "median_ms": median,
        "quartiles_ms": [median if low is None else low, median if high is None else high],
    } | more


def of(rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A suite's record with one benchmark."""
    return {"records": {"trial": {"benchmark": "trial", "settings": settings, "cases": rows}}}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


# --- comparing


def verdicts(bench: Callable, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = bench("changes").compare(of({"case": before}), of({"case": after}))
    return [change.verdict for change in found]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (cell(100), cell(104.9), "as before"),  # less than 5 %
        (cell(100), cell(105.1), "REGRESSED"),
        (cell(100, 97, 104), cell(106.9), "as before"),  # 6.9 against a quartile distance of 7 in A
        (cell(100), cell(106.9, 103, 110), "as before"),  # and in B
        (cell(100, 97, 104), cell(107.1, 104, 111), "REGRESSED"),
        (cell(105.2), cell(100), "improved"),
        (cell(100), {"error": "out of memory"}, "REGRESSED: no figure"),
        ({"peak_mib": 100.0}, {"peak_mib": 105.1}, "REGRESSED"),
        ({"file_bytes": 100}, {"file_bytes": 105}, "as before"),
    ],
)
def test_what_a_regression_is(bench: Callable, before: dict, after: dict, verdict: str) -> None:
    assert verdicts(bench, {"pqk_fast": before}, {"pqk_fast": after}) == [verdict]


def test_only_ours_are_compared(bench: Callable) -> None:
    before = {"pqk_fast": cell(1), "pqk_fast, two_pass": cell(1), "eager": cell(1), "numel": 3, "left out": cell(1)}
    after = {"pqk_fast": cell(1), "pqk_fast, two_pass": cell(9), "eager": cell(3)}
    found = bench("changes").compare(of({"case": before}), of({"case": after}))
    assert [(change.candidate, change.regressed) for change in found] == [
        ("pqk_fast", False),
        ("pqk_fast, two_pass", True),
    ]
    assert found[0].others == 3.0  # a busy machine shows in the others
    assert verdicts(
        bench, {"mask, ours": cell(1), "mask, naive": cell(1)}, {"mask, ours": cell(2), "mask, naive": cell(9)}
    ) == ["REGRESSED"]


@pytest.mark.parametrize(
    ("ours", "other", "verdict"),
    [(1.10, 1.0, "REGRESSED"), (1.10, 1.06, "as before"), (1.10, 0.9, "REGRESSED"), (1.3, 1.3, "REGRESSED"),
     (0.9, 1.0, "improved"), (0.9, 0.95, "improved"), (0.9, 0.9, "as before")],
)  # fmt: skip
def test_a_slower_machine_is_no_regression(bench: Callable, ours: float, other: float, verdict: str) -> None:
    before, after = ({"pqk_fast": cell(a), "eager": cell(b)} for a, b in ((1, 1), (ours, other)))
    assert verdicts(bench, before, after) == [verdict]


def test_records_that_do_not_compare_are_refused(bench: Callable) -> None:
    compare, row = bench("changes").compare, {"case": {"pqk_fast": cell(1)}}
    with pytest.raises(ValueError, match="shrink is None in A and 8 in B"):
        compare(of(row), of(row, shrink=8))
    with pytest.raises(ValueError, match="threads is 1 in A and 2 in B"):
        compare(of(row, threads=1), of(row, threads=2))
    with pytest.raises(ValueError, match="nothing to compare: A has trial, B has nothing"):
        compare(of(row), {"records": {}})
    with pytest.raises(ValueError, match="ms in A and MiB in B"):
        compare(of(row), of({"case": {"pqk_fast": {"peak_mib": 1.0}}}))


def test_compare_finds_an_operation_that_sleeps(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case measured twice, and once with an operation that sleeps a fifth longer. The clock counts what this thread
    computes and how long it means to sleep (all do, or microseconds of noise would count), so that a busy machine
    changes nothing."""
    timing, slept = bench("timing"), 0.0
    clock = SimpleNamespace(perf_counter=lambda: time.thread_time() + slept)
    monkeypatch.setattr(timing, "time", clock)

    def record(name: str, seconds: float) -> Path:
        def sleeping(seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
            def operation(x: torch.Tensor) -> torch.Tensor:
                nonlocal slept
                slept += seconds
                return -x

            return operation

        def work() -> Any:
            ways = {"pqk_fast": sleeping(seconds), "eager": sleeping(5e-3)}
            return timing.Workload({key: timing.called(way) for key, way in ways.items()}, lambda _: (torch.ones(9),))

        path = tmp_path / f"{name}.json"
        report = report_of(bench, monkeypatch, path)
        report.case("negation", 9, 72, work)
        assert report.finish() == 0
        return path

    a, b, slowed = record("a", 5e-3), record("b", 5e-3), record("slowed", 6e-3)
    assert cli.main(["bench", "--compare", str(a), str(b)]) == 0
    assert "0 regressed" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(a), str(slowed)]) == 1
    printed = capsys.readouterr().out
    assert "REGRESSED" in printed
    assert "1 regressed" in printed
    assert cli.main(["bench", "--compare", str(slowed), str(a)]) == 0
    assert "improved" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"cases": {', '{"cases": {}}', "[]"])
def test_what_is_no_record_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert cli.main(["bench", "--compare", str(path), str(path)]) == 1
    assert f"{path} is no record of benchmarks" in capsys.readouterr().err


# --- ours and others


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("plain", ("plain", None)),
        ("plain, compiled", ("plain", None)),
        ("mask, ours", ("mask", True)),
        ("mask, naive, compiled", ("mask", False)),
        ("phase 2, ours, two_pass, captured", ("phase 2, captured", True)),
        ("features", ("features", True)),
        ("features, torchaudio", ("features", False)),
        ("phase 1", ("phase 1", True)),
        ("vanilla", ("vanilla", None)),
    ],
)
def test_who_is_compared_with_whom(bench: Callable, candidate: str, expected: tuple) -> None:
    assert bench("figures").split(candidate, {candidate: cell(1)}) == expected


def test_others_are_faster_beyond_the_quartiles_only(bench: Callable) -> None:
    rows = {
        "pqk_fast": cell(10, 9, 11),
        "pqk_fast, other way": cell(8, 7.5, 8.5),  # the best of ours counts
        "as fast": cell(7, 6.5, 7.6),
        "faster": cell(4, 3, 7),
        "faster, but less": cell(2, unchecked=True),
        "slower": cell(9, 9, 9),
        "failed": {"error": "RuntimeError: no"},
    }
    figures = bench("figures")
    record = of({"case": rows})["records"]["trial"]
    found = figures.beaten("trial", record)
    assert [(one.ours, one.other, one.times, one.unchecked) for one in found] == [
        ("pqk_fast, other way", "faster", 2.0, False),
        ("pqk_fast, other way", "faster, but less", 4.0, True),
    ]
    assert figures.tally({"trial": record}) == {"ours": 1, "neither": 1, "others": 1}
    assert list(figures.errors({"trial": record})) == [("trial", "case", "failed", "RuntimeError: no")]


# --- the suite


def test_every_benchmark_is_in_the_suite(bench: Callable) -> None:
    scripts = {benchmark.script for benchmark in bench("suite").BENCHMARKS.values()}
    assert {path.name for path in BENCH.glob("bench_*.py")} | {
        "whole_cell.py",
        "profile_step.py",
        "peers/compare.py",
    } == scripts


def test_nothing_is_measured_if_the_tests_fail(bench: Callable, tmp_path: Path) -> None:
    suite, test = bench("suite"), tmp_path / "test_it.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert 1 + 1 == 3\n")
    with pytest.raises(suite.GateError, match=r"status 1: FAILED .*test_it.py::test_b"):
        suite.measure(tmp_path / "out", True, [], False, silent(), lambda: suite.gate([str(test)]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(suite.GateError, match="status 5"):  # no tests at all
        suite.gate([str(test), "-k", "absent"])
    test.write_text("def test_a(): pass\n")
    assert suite.gate([str(test)])["summary"].startswith("1 passed")


def test_the_gate_names_tests_that_are_there(bench: Callable) -> None:
    suite = bench("suite")
    assert all((ROOT / part).exists() for part in suite.GATE if part.startswith("tests/"))


SCRIPT = """
import json, sys
out = sys.argv[sys.argv.index("--out") + 1]
cases = {"case": {"numel": 9, "pqk_fast": {"median_ms": %s, "quartiles_ms": [1, 1]}}}
json.dump({"benchmark": "made", "created": "2000-01-02", "options": sys.argv[1:], "cases": cases}, open(out, "w"))
"""


@pytest.fixture
def made(bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The suite with three benchmarks made up: one works, one fails at once, one is run only when asked for."""
    suite = bench("suite")
    for name, content in {"good": SCRIPT % 1, "bad": "raise SystemExit(3)", "long": SCRIPT % 2}.items():
        (tmp_path / f"{name}.py").write_text(content)

    def one(name: str, **about: Any) -> Any:
        return suite.Benchmark(str(tmp_path / f"{name}.py"), ("--full",), ("--tiny",), **about)

    benchmarks = {"good": one("good"), "bad": one("bad", on_cpu=True), "long": one("long", asked_for=True)}
    monkeypatch.setattr(suite, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    return suite


def passing() -> dict[str, Any]:
    return {"summary": "7 passed", "seconds": 0.1}


def test_one_record_of_all_benchmarks(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made.measure(out, True, [], False, silent(), passing)
    record = json.loads((out / "bench.json").read_text())
    assert {name: stage["status"] for name, stage in record["stages"].items()} == {"good": 0, "bad": 3}
    assert record["records"]["good"]["options"][0] == "--tiny"
    assert "status 3" in record["records"]["bad"]["error"]
    assert record["hardware"]["cpu"]
    assert record["gate"]["summary"] == "7 passed"
    assert (record["format"], record["quick"]) == ("pqk_fast bench", True)
    # one more, beside those; then other libraries' records
    (tmp_path / "peers-accuracy.json").write_text(json.dumps({"benchmark": "peers, accuracy", "runs": {}}))
    made.measure(out, True, ["long"], False, silent(), passing)
    record = json.loads((out / "bench.json").read_text())
    assert set(record["records"]) == {"good", "bad", "long", "peers-accuracy"}
    with pytest.raises(ValueError, match="has quick True, and this run False"):
        made.measure(out, False, ["good"], False, silent(), passing)
    with pytest.raises(ValueError, match="no benchmark nosuch; there are: good, bad, long"):
        made.measure(out, True, ["nosuch"], False, silent(), passing)
    made.measure(out, False, [], True, silent(), passing)  # anew, and all
    record = json.loads((out / "bench.json").read_text())
    assert set(record["stages"]) == {"good", "bad", "long"}
    assert record["records"]["long"]["options"][0] == "--full"


def test_the_command_writes_record_and_page_and_fails_if_a_benchmark_did(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(made, "measure", lambda *args, measure=made.measure: measure(*args, passing))
    out = tmp_path / "out"
    assert cli.main(["bench", "--quick", "--out", str(out)]) == 1
    assert "failed: bad" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"bench.json", "benchmarks.md", "benchmarks.html"}
    assert cli.main(["bench", "--quick", "--only", "good", "--out", str(tmp_path / "good")]) == 0
    assert cli.main(["bench", "--from", str(out / "bench.json"), "--page", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "benchmarks.md").read_bytes() == (out / "benchmarks.md").read_bytes()


def test_an_installed_package_says_that_it_needs_a_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "BENCH", tmp_path / "bench")
    assert cli.main(["bench"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "get a clone of the sources, run `make install` in it" in said
    assert "`make bench`" in said
