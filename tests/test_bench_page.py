"""The page of benchmarks says what its record says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import package
from test_bench_suite import cell, passing


def page_record() -> dict[str, Any]:
    """One of every section."""

    def sized(names: dict[str, float], *cases: str) -> dict[str, Any]:
        rows = {}
        for number, case in enumerate(cases, 1):
            cells = {
                name: cell(number * ms, number * ms * 0.9, number * ms * 1.1, ratio=1.0) for name, ms in names.items()
            }
            rows[case] = {"numel": 10**number, **cells}
        return rows

    kernel = {"pqk_fast": 1.0, "eager": 4.0}
    steps = {"plain": 2.0, "phase 1, ours": 2.1, "phase 1, naive": 1.0}
    ranks = {f"{kind}, {count}": cell(2.0) for kind in ("plain", "phase 1, ours") for count in ("1 rank", "2 ranks")}
    model = {"latency_us": 50.0, "mb_s": 900.0, "gradient_bytes": 8, "predicted_ms": {"2": 2.5, "64": 9.0}}
    part = {name: cell(1.0, part=0.25) for name in kernel}
    scaling = sized(kernel, "fake-quant, 20 k", "fake-quant, 2 M") | {"top-k, 1 G": {"numel": 10**9, **part}}
    scaling |= sized(steps, "batch 1, res8_narrow", "batch 64, res8_narrow") | {
        "ranks, res8_narrow": {**ranks, "model": model}
    }
    scaling["memory, 2 M"] = {"numel": 9, "plain": {"peak_mib": 1.5}, "phase 1, ours": {"error": "too little memory"}}
    records = {
        "fake_quant": {"cases": sized(kernel, "1 M, identity", "4 M, identity", "net, all layers")},
        "overhead": {"cases": {"res8": {"plain": cell(2), "mask, ours": cell(3), "mask, naive": cell(2.5)}}},
        "scaling": {"cases": scaling},
        "files": {"cases": {"res8_narrow, whole file": {"pqk_fast": {"file_bytes": 10}, "ONNX": {"file_bytes": 30}}}},
        "peers": {"cases": {"step": {"pqk_fast": cell(1), "someone": {"error": "ImportError: no module"}}}},
    }
    for name, record in records.items():
        record |= {"benchmark": name, "created": "2001-02-03T00:00:00+00:00", "settings": {"threads": 2}}
    records["cell"] = {"benchmark": "cell", "error": "ended with status 3 and left no record"}
    records["peers"]["cases"]["file"] = {"pqk_fast": {"bytes": 5}, "someone": {"bytes": 50}}
    records["peers"]["candidates"] = {
        "pqk_fast": {"does": {"masks": "exact"}, "versions": {"torch": "2.11.0"}},
        "someone": {"does": {"masks": "a few"}, "versions": {"torch": "2.9", "someone": "1.2"}},
        "nobody": {"error": "not installed"},
    }
    records["peers"]["versions"] = {"torch": "2.11.0"}
    run = {"last": {"testing": 80.0}, "best_dev": {"testing": 81.0}, "file_bytes": 1234}
    runs = {"someone, after, seed 0": run, "someone, after, seed 1": run | {"last": {"testing": 70.0}}}
    runs["other, with, seed 0"] = {"error": "out of time"}
    records["peers-accuracy"] = {"benchmark": "peers-accuracy", "settings": {"steps": 9}, "runs": runs}
    about = {
        "versions": {"torch": "2.11.0"},
        "hardware": {"cpu": "some CPU", "cores": 2, "memory_gib": 8.0, "gpu": None},
    }
    return {
        "quick": False,
        "load_before": 0.1,
        "commit": "abc",
        "gate": passing(),
        "stages": {},
        "records": records,
    } | about


def test_the_page_has_what_the_record_has(bench: Callable, tmp_path: Path) -> None:
    package("matplotlib")
    record = page_record()
    markdown, html = bench("page").make_page(record).write(tmp_path, "benchmarks")
    text = markdown.read_text(encoding="utf-8")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Kernels", "Training steps", "Scaling", "Memory", "Files", "Other libraries", "Accuracy at equal budget",
        "Where others are faster",
        "What could not be measured", "What is measured, and how",
    ]  # fmt: skip
    for words in (
        "some CPU",
        "7 passed",
        "2001-02-03: fake_quant",
        "top-k, 1 G (25 %)",
        "| **1 (0.9-1.1)** |",
        "2 threads",
    ):
        assert words in text, words
    faster = text.split("## Where others are faster")[1].split("##")[0]
    assert "| overhead: res8 | mask, ours | 3 ms | mask, naive | 2.5 ms | 1.20 |" in faster
    assert "scaling: batch 1, res8_narrow" in faster
    assert "eager" not in faster
    missing = text.split("## What could not be measured")[1].split("##")[0]
    assert "| peers: step | someone | ImportError: no module |" in missing
    assert "too little memory" in missing
    assert "| cell | all | ended with status 3 and left no record |" in missing
    assert "| peers | nobody | not installed |" in missing
    assert "| peers-accuracy: other, with, seed 0 | all | out of time |" in missing
    assert "| someone | a few | 2.9 | someone 1.2 |" in text
    assert "| file | **5** | 50 |" in text
    assert "| someone | after | 80.0, 70.0 | 75.0 | 81.0 | 1,234 |" in text
    assert "A trial" not in text
    for png in (tmp_path / "benchmarks").iterdir():
        assert png.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "benchmarks").iterdir())) == html.read_text(encoding="utf-8").count("<img ") >= 5
    record["quick"] = True
    markdown, _ = bench("page").make_page(record).write(tmp_path / "quick", "benchmarks")
    assert "**A trial: small sizes" in markdown.read_text(encoding="utf-8")


def test_a_page_without_matplotlib(bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*size: float) -> None:
        raise ImportError("pictures need matplotlib")

    monkeypatch.setattr(bench("plots"), "make_figure", missing)
    markdown, _ = bench("page").make_page(page_record()).write(tmp_path, "benchmarks")
    assert "No picture: pictures need matplotlib" in markdown.read_text(encoding="utf-8")
