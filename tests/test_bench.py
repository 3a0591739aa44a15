"""The benchmarks measure what they say: turns, capture on a GPU (a make-believe one), records, and the suite's plan."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pqk_fast as pqk
from pqk_fast.branches import pqk_layers

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
NOT_IN_THE_SUITE = {"latency", "files", "scaling"}  # the first two are the CPU's; scaling takes longer than there is


class Gpu:
    """As much of ``torch.cuda`` as timing needs. Time passes as calls say; a capture runs its calls once, like torch's,
    and a replay says that it ran; ``waits`` are calls that would wait for the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, l2_bytes: int) -> None:
        self.now, self.replays, self.sync_mode, self.captured = 0.0, 0, "default", 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.time - self.time

        class Graph:
            def replay(self) -> None:
                gpu.replays += 1
                gpu.now += 8.0  # ms

        @contextmanager
        def capture(graph: Graph, stream: object) -> Any:
            assert stream == "side"
            yield
            gpu.captured += 1

        properties = SimpleNamespace(L2_cache_size=l2_bytes)
        fakes = {
            "get_device_properties": lambda: properties,
            "Stream": lambda: "side",
            "set_stream": lambda stream: None,
            "current_stream": lambda: "side",
            "stream": lambda stream: nullcontext(),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "synchronize": lambda: None,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "sync_mode", mode),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_candidate_is_captured_on_all_its_inputs(bench: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, l2_bytes=1000)
    timer = bench("timing_cuda").CudaTimer()
    assert [timer.sets(moved) for moved in (1e6, 1000, 300, 1)] == [1, 3, 10, 64]
    assert timer.about_case(2000) == {"l2_cold": True}
    assert timer.about_case(1999) == {"l2_cold": False}
    used: list[int] = []
    run = timer.prepare([lambda i=i: used.append(i) for i in range(4)], True)
    assert set(used[:4]) == {0, 1, 2, 3}  # warmed up on every set
    assert used[-4:] == [0, 1, 2, 3]  # captured
    assert (gpu.captured, gpu.replays, gpu.sync_mode) == (1, 1, "default")
    assert (run.uses, run.about) == (4, {"captured": True})
    assert len(run.keeps) == 4  # a graph does not keep its inputs alive
    assert timer.measure(run.call, 3, True) == pytest.approx(8e-3)
    assert gpu.replays == 1 + 4


def test_what_cannot_be_captured_is_called_and_says_so(bench: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, l2_bytes=1000)
    timer = bench("timing_cuda").CudaTimer()

    def waits() -> None:
        if gpu.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore of it")
        gpu.now += 5.0

    run = timer.prepare([waits, waits], True)
    assert run.about == {"captured": False, "not_captured_because": "called a synchronizing CUDA operation"}
    assert (gpu.captured, gpu.sync_mode) == (0, "default")
    assert timer.measure(run.call, 2, False) / run.uses == pytest.approx(5e-3)
    assert timer.prepare([waits], False).about == {"captured": False}


def test_a_slow_candidate_gets_few_turns(bench: Callable) -> None:
    timing = bench("timing")
    timer = SimpleNamespace(turn=5e-3, fewest=3, measure=lambda call, times, settle: call())
    clock = iter(range(10**6))  # each look at the clock is a second later
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
        times = timing.take_turns({"slow": timing.Run(lambda: 4.0, uses=2)}, timer, seconds=0.0)
    assert (times["slow"].n, times["slow"].median) == (3, 2000.0)


def report_of(bench: Callable, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Any:
    module = bench("report")
    monkeypatch.setattr(module, "recycle_large_tensors", lambda: False)  # not for the other tests
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--threads", "1", "--seconds", "0", *options])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--out", str(out)])
    monkeypatch.setattr(bench("roofs"), "COPY_BYTES", {"cpu": 1 << 16})
    return module.Report("doc", "trial")


def test_a_record_holds_figures_and_what_went_wrong(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = bench("timing")
    out = tmp_path / "trial.json"
    report = report_of(bench, monkeypatch, out, "--without", "left out")

    def fails(x: torch.Tensor) -> None:
        raise NotImplementedError("not for this device\nnor others")

    candidates = {"pqk_fast": torch.neg, "same": lambda x: -x, "other": torch.abs, "fails": fails, "left out": fails}
    work = timing.Workload(
        {name: timing.called(function) for name, function in candidates.items()},
        lambda seed: (torch.ones(4096),),
        lambda result, truth, inputs: None if torch.equal(result, truth) else "has another sign",
    )
    report.case("negation", 4096, 32768, lambda: work, flop=4096.0, arithmetic="fp32", targets={"best": 2.0})
    row = json.loads(out.read_text())["cases"]["negation"]  # written before the end
    assert row["pqk_fast"]["ratio"] == 1.0
    assert row["same"]["n"] >= 11
    low, high = row["same"]["quartiles_ms"]
    assert low <= row["same"]["median_ms"] <= high
    floor = max(row["bytes"] / row["roof_gb_s"] / 1e6, row["flop"] / row["roof_tflop_s"] / 1e9)
    assert row["same"]["of_roof"] == pytest.approx(floor / row["same"]["median_ms"], rel=0.02, abs=2e-3)
    assert row["other"] == {"error": "MismatchError: has another sign"}
    assert row["fails"] == {"error": "NotImplementedError: not for this device"}
    assert "left out" not in row
    assert report.finish() == 1
    record = json.loads(out.read_text())
    assert record["failed"] == ["negation, other"]
    assert record["hardware"]["cpu"]
    assert "negation" in capsys.readouterr().out


def test_no_case_is_begun_after_the_budget(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(bench, monkeypatch, tmp_path / "trial.json", "--budget", "-1")
    report.case("late", 1, 1, lambda: pytest.fail("was begun"))
    assert "budget" in report.cases["late"]["skipped"]
    assert report.finish() == 0


def test_targets_name_what_was_measured(bench: Callable) -> None:
    row = {
        "pqk_fast": {"median_ms": 2.0, "of_roof": 0.8},
        "pqk_fast, two_pass": {"median_ms": 1.0},
        "eager": {"median_ms": 6.0},
        "torch.compile": {"median_ms": 4.0},
        "torch.topk": {"error": "out of memory"},
    }
    found = bench("report").reached(row, {"of_roof": 0.9, "torch.compile": 2.0, "best": 0.95, "torch.topk": 5.0})
    assert [each["measured"] for each in found] == [0.8, 2.0, 2.0, None]


@pytest.mark.parametrize("script", ["bench_fake_quant", "bench_dual_forward"])
def test_cases_are_told_apart_by_name(bench: Callable, script: str) -> None:
    module = bench(script)
    for lists in (("cpu_cases",), ("gpu_cases", "more_gpu_cases")):
        names = [case.name for cases in lists if hasattr(module, cases) for case in getattr(module, cases)()]
        assert len(set(names)) == len(names) > 0


def test_floors_of_a_dual_layer(bench: Callable) -> None:
    module = bench("bench_dual_forward")
    case = module.Case("one", 3, 5, 7, (11, 13), (3, 3), "bf16")
    sizes = {"x": 6 * 5 * 143, "out": 6 * 7 * 143, "w": 7 * 5 * 9}
    assert case.flop == 2 * 9 * 5 * sizes["out"]
    assert case.moved == 2 * sizes["x"] + 5 * sizes["w"] + 2 * sizes["out"]
    both = module.replace(case, backward=True)
    assert both.flop == 3 * case.flop
    assert both.moved == 2 * case.moved + 4 * sizes["w"] + 2 * sizes["x"]


def test_what_is_written_by_hand_computes_the_same(bench: Callable) -> None:
    """Both phases' losses and gradients, from the same weights, masks and step sizes."""
    naive = bench("naive")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(5)
    )
    x, y = torch.randn(6, 3, 7, 7), torch.arange(6) % 5
    plain(x)
    by_hand = copy.deepcopy(plain)
    layers = naive.compress(by_hand)
    naive.make_masks(layers)
    ours = pqk.prepare(plain, pqk.PQKConfig(ste="clipped", mask_gradients=True, mask_interval=1))
    pqk.Pruner(ours, 1, 1)
    for layer, written in zip(pqk_layers(ours).values(), layers, strict=True):
        assert torch.equal(layer.weight_mask, written.mask.bool())
        written.step.data.copy_(layer.weight_step.squeeze())

    def compare(loss: torch.Tensor, written_loss: torch.Tensor) -> None:
        torch.testing.assert_close(loss, written_loss)
        for each in (loss, written_loss):
            each.backward()
        for layer, written in zip(pqk_layers(ours).values(), layers, strict=True):
            for name in ("weight", "bias"):
                torch.testing.assert_close(getattr(layer, name).grad, getattr(written, name).grad)

    cross_entropy = torch.nn.functional.cross_entropy
    compare(cross_entropy(ours(x), y), cross_entropy(by_hand(x), y))
    pqk.start_phase2(ours).zero_grad()
    naive.start_phase2(by_hand, layers)
    by_hand.zero_grad()
    mutual = naive.MutualDistillation(by_hand)
    compare(pqk.MutualDistillationLoss()(*pqk.dual_forward(ours, x, "two_pass"), y), mutual(x, y))


def test_a_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "int4.json"
    options = [
        "--device",
        "cpu",
        "--cases",
        "cuda",
        "--shrink",
        "4096",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--only",
        "pack_int4, 64 M",
    ]
    command = [sys.executable, str(BENCH / "bench_int4.py"), *options, "--without", "torch.compile", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    record = json.loads(out.read_text())
    assert set(record["cases"]["pack_int4, 64 M"]) >= {"pqk_fast", "eager", "bytes", "roof_gb_s"}
    assert record["failed"] == []


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(BENCH / "gpu_suite.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_suite_fits_into_its_time_and_runs_every_benchmark() -> None:
    plan = suite("--dry-run", "nowhere")
    assert plan.returncode == 0, plan.stderr
    stages = dict(re.findall(r"^(\w+) +(\d+) s ", plan.stdout, re.MULTILINE))
    assert sum(map(int, stages.values())) <= 530
    scripts = {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")} - NOT_IN_THE_SUITE
    assert scripts | {"smoke", "tests", "paper", "captured", "cell", "seeds"} == set(stages)
    assert not Path("nowhere").exists()


def test_chosen_stages_share_the_time() -> None:
    plan = suite("--dry-run", "nowhere", PQK_FAST_SUITE_STAGES="int4 smoke", PQK_FAST_SUITE_SECONDS="85")
    assert re.findall(r"^(\w+) +(\d+) s ", plan.stdout, re.MULTILINE) == [("smoke", "45"), ("int4", "30")]
    assert suite("--dry-run", "nowhere", PQK_FAST_SUITE_STAGES="int5").returncode == 2


def test_a_failing_stage_stops_no_other(tmp_path: Path) -> None:
    """With an interpreter that fails at everything but gathering."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$1" in bench/gather.py) exec "{sys.executable}" "$@";; esac\nexit 3\n')
    fake.chmod(0o755)
    ran = suite(str(tmp_path / "out"), PYTHON=str(fake), PQK_FAST_SUITE_DEVICE="cpu", PQK_FAST_SUITE_STAGES="int4 step")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-3].split()[:2] == ["int4", "3"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(stage["stage"], stage["status"]) for stage in results["stages"]] == [("int4", 3), ("step", 3)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"suite.log", "results.json", "rest.tar.gz"}
