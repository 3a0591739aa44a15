"""Tables and plots from records."""

import io
import math
import re
import struct
import sys
import zlib
from pathlib import Path

import pytest
from cases import package
from rich.console import Console
from rich.table import Table

from pqk_fast.record import write_record
from pqk_fast.report import layers_table, plot_curves, results_table, to_markdown


def curve(epochs: int, epoch_steps: int, end: float, start: float, sparsity: float, full: float | None = None) -> list:
    """Accuracy that rises from `start` to `end`, with some noise."""
    rows = []
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        accuracy = end - (end - start) * (1 - done) ** 2.5 + 0.6 * math.sin(7.3 * epoch)
        row = {
            "epoch": epoch,
            "step": epoch * epoch_steps,
            "loss": 2.4 * (1 - done) + 0.3,
            "lr": 0.1,
            "sparsity": sparsity if full is not None else sparsity * (1 - (1 - done) ** 3),
            "validation": accuracy,
            "seconds": 24.0,
        }
        if full is not None:
            row["validation_f"] = full - (full - 20) * (1 - done) ** 4 + 0.5 * math.cos(5.1 * epoch)
        rows.append(row)
    return rows


def result(validation: float, testing: float, epoch: int) -> dict:
    return {
        "last": {"validation": validation, "testing": testing},
        "best_dev": {"validation": validation + 0.4, "testing": testing + 0.2, "epoch": epoch},
    }


def make_record(*stages: str) -> dict:
    """A made-up run of res8-narrow with the numbers of the paper's tables, and the given stages only."""
    stages = stages or ("vanilla", "phase1", "phase2", "finetune")
    curves = {
        "vanilla": curve(26, 347, 91.2, 62.0, 0.0),
        "phase1": curve(26, 347, 74.1, 55.0, 0.9),
        "phase2": curve(9, 347, 83.1, 71.0, 0.9, full=85.1),
        "finetune": curve(9, 347, 79.2, 70.0, 0.9),
    }
    results = {
        "vanilla": result(91.2, 91.4, 25),
        "phase1_p": result(73.8, 74.1, 26),
        "phase2_p": result(82.9, 83.1, 9),
        "phase2_f": result(84.7, 85.1, 8),
        "finetune": result(79.4, 79.2, 7),
    }
    return {
        "format": "pqk_fast record",
        "version": 1,
        "created": "2025-01-02T03:04:05+00:00",
        "recipe": {
            "name": "kws-narrow-4bit",
            "model": "res8_narrow",
            "pqk": {"bits": 4, "sparsity": 0.9},
            "phase2": {"epoch_steps": 347, "distill_start": 1500},
        },
        "versions": {"python": "3.12.1", "torch": "2.11.0", "triton": None},
        "hardware": {"cpu": "a CPU", "cores": 4, "threads": 2, "memory_gib": 15.6, "gpu": None},
        "seed": 3,
        "data": {"name": "speech_commands", "train": 22244, "validation": 3091, "testing": 3079},
        "curves": {stage: curves[stage] for stage in stages},
        "results": {name: value for name, value in results.items() if name.split("_")[0] in stages},
        "kept_fraction": 0.1,
        "layers": [
            {
                "name": f"conv{i}[x]",
                "shape": [19, 19, 3, 3],
                "weights": 3249,
                "kept": 300 + i,
                "step_size": 0.04321,
                "clipped_fraction": 0.0123,
            }
            for i in range(2)
        ],
        "seconds": {"vanilla": 4000.4, "phase1": 754, "phase2": 59},
    }


def shown(table: Table) -> str:
    """What a terminal shows, with bold cells as <b>...</b>."""
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return re.sub(r"\x1b\[1m(.*?)\x1b\[0m", lambda m: f"<b>{m[1].strip()}</b>", console.export_text(styles=True))


def test_made_up_record_is_a_valid_one(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", make_record())


def test_results_in_markdown() -> None:
    lines = to_markdown(make_record()).splitlines()
    assert lines[0] == "# kws-narrow-4bit, res8_narrow, 4 bits, 90 % sparse"
    start = next(i for i, line in enumerate(lines) if line.startswith("## Accuracy (%)")) + 2
    assert lines[start + 2 : start + 7] == [
        "| vanilla | 32 | - | 91.2 | 91.4 | 91.6 | 91.6 | 25 |",
        "| phase1-P | 4 | 90.0 % | 73.8 | 74.1 | 74.2 | 74.3 | 26 |",
        "| finetune | 4 | 90.0 % | 79.4 | 79.2 | 79.8 | 79.4 | 7 |",
        "| phase2-P | 4 | 90.0 % | **82.9** | **83.1** | **83.3** | **83.3** | 9 |",
        "| phase2-F | 32 (P=4) | - | 84.7 | 85.1 | 85.1 | 85.3 | 8 |",
    ]
    assert {line.count("|") for line in lines[start : start + 7]} == {9}
    mixed = make_record()
    mixed["recipe"]["pqk"]["layer_bits"] = {"conv0": 2}
    lines = to_markdown(mixed).splitlines()
    assert lines[0] == "# kws-narrow-4bit, res8_narrow, mixed bits, 90 % sparse"
    assert "| phase1-P | mixed | 90.0 % | 73.8 | 74.1 | 74.2 | 74.3 | 26 |" in lines


def test_markdown_says_what_the_run_was() -> None:
    text = to_markdown(make_record())
    for fact in (
        "- data: speech_commands (22,244 train, 3,091 validation, 3,079 testing)",
        "- seed: 3",
        "- hardware: a CPU (2 of 4 cores)",
        "- versions: python 3.12.1, torch 2.11.0\n",
        "- time: vanilla 1 h 6 min, phase1 12 min 34 s, phase2 59 s",
    ):
        assert fact in text


def test_layers_in_markdown() -> None:
    text = to_markdown(make_record())
    assert "| conv1[x] | 19x19x3x3 | 3,249 | 301 | 9.3 | 0.04321 | 1.23 |" in text
    assert "| all |  | 6,498 | 601 | 9.2 |  |  |" in text


def test_rich_tables_have_the_numbers_and_bold() -> None:
    text = shown(results_table(make_record()))
    for cell in ("phase1-P", "32 (P=4)", "90.0 %", "79.4", "85.3"):
        assert cell in text
    assert "<b>83.1</b>" in text
    assert "<b>85.1</b>" not in text  # the full net is no student
    text = shown(layers_table(make_record()))
    for cell in ("conv1[x]", "19x19x3x3", "3,249", "0.04321", "1.23", "6,498"):
        assert cell in text


def test_ties_are_both_bold_and_a_lone_student_is_not() -> None:
    record = make_record()
    record["results"]["finetune"] = record["results"]["phase2_p"]
    assert to_markdown(record).count("**83.1**") == 2
    assert "**" not in to_markdown(make_record("vanilla", "phase1"))


def test_values_that_do_not_exist_are_dashes() -> None:
    record = make_record("vanilla")
    record["results"]["vanilla"] = {
        "last": {"validation": None, "testing": 70.04},
        "best_dev": {"validation": None, "testing": None},
    }
    record["layers"][0] |= {"step_size": None, "clipped_fraction": None}
    record["layers"][1] |= {"step_size": [0.5, 0.25]}
    text = to_markdown(record)
    assert text.startswith("# kws-narrow-4bit, res8_narrow\n")
    assert "| vanilla | 32 | - | - | 70.0 | - | - | - |" in text
    assert "| 300 | 9.2 | - | - |" in text
    assert "| 0.25 to 0.5 |" in text


def test_records_that_make_no_table() -> None:
    record = make_record() | {"results": {}, "layers": []}
    with pytest.raises(ValueError, match="the record has no results"):
        results_table(record)
    with pytest.raises(ValueError, match="the record has no layers"):
        layers_table(record)
    assert "|" not in to_markdown(record)
    record = make_record()
    del record["recipe"]["pqk"]["bits"]
    with pytest.raises(ValueError, match=r"result 'phase1_p' but no recipe.pqk.bits"):
        results_table(record)


def test_other_dictionaries_are_refused(tmp_path: Path) -> None:
    torn = make_record()
    del torn["results"]["phase2_p"]["last"]
    for use in (results_table, layers_table, to_markdown, lambda record: plot_curves(record, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="not a record: the record has no recipe, versions"):
            use({"accuracy": 90})
        with pytest.raises(ValueError, match=r"results.phase2_p has no last"):
            use(torn)
    headless = make_record()
    del headless["format"], headless["version"]  # as before it is written
    assert results_table(headless).row_count == 5


def test_results_fit_a_narrow_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(results_table(make_record()))
    text = console.export_text()
    assert "…" not in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    for word in ("epoch", "sparsity", "32 (P=4)", "85.3"):
        assert word in text


def read_png(path: Path) -> tuple[int, int, bytes]:
    """Width, height and decompressed content."""
    content, position, data, size = path.read_bytes(), 8, b"", (0, 0)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        data += body if kind == b"IDAT" else b""
        position += 12 + length
    return *size, zlib.decompress(data)


@pytest.mark.parametrize(
    ("stages", "panels"),
    [
        ((), 2),
        (("vanilla",), 1),
        (("phase1",), 1),
        (("phase1", "phase2"), 2),
        (("finetune",), 1),
        (("vanilla", "phase1", "finetune"), 2),
    ],
)
def test_plot(tmp_path: Path, stages: tuple[str, ...], panels: int) -> None:
    package("matplotlib")
    path = tmp_path / "new" / "curves.png"
    plot_curves(make_record(*stages), path)
    width, height, pixels = read_png(path)
    assert (width, height) == (930 * panels, 690)
    assert len(set(zip(pixels[0::4], pixels[1::4], pixels[2::4], strict=False))) > 50  # not blank


def test_plot_leaves_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_curves(make_record("vanilla"), tmp_path / "curves.png")


def test_plot_with_gaps_and_without_options(tmp_path: Path) -> None:
    package("matplotlib")
    record = make_record()
    record["recipe"] = {"name": "bare"}
    record["curves"]["phase1"][3]["validation"] = None
    for row in record["curves"]["phase1"]:
        del row["sparsity"]
    plot_curves(record, tmp_path / "curves.png")


def test_nothing_to_plot(tmp_path: Path) -> None:
    package("matplotlib")
    record = make_record("vanilla")
    for row in record["curves"]["vanilla"]:
        row["validation"] = None
    for curves in (record["curves"], {}, {"vanilla": []}):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot_curves(record | {"curves": curves}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_curves(make_record(), tmp_path / "curves.png")
