"""`pqk-fast export` and `inspect`: the right student, small, with all its bytes accounted for."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import package
from test_packed import res8_narrow, student

import pqk_fast as pqk
from pqk_fast import cli
from pqk_fast.checkpoint import Checkpoints
from pqk_fast.deploy import sizes
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.reader import read_packed
from pqk_fast.recipe_files import load_recipe
from pqk_fast.settings import to_dict


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    """The students of two stages, and the best one of the second."""
    made = {}
    for name in ("phase1", "phase2", "best"):
        made[name] = student(res8_narrow())
        for parameter in made[name].parameters():
            parameter.data *= 1 + 0.1 * len(made)
    return made


@pytest.fixture
def run(networks: dict[str, torch.nn.Module], tmp_path: Path) -> Path:
    def stage(name: str, finished: bool = True, best: str | None = None) -> dict:
        kept = {} if best is None else {"validation": {"epoch": 1, "state": networks[best].state_dict()}}
        state = networks[name].state_dict()
        return {
            "prepared": True,
            "finished": finished,
            "rows": [],
            "seconds": 0.0,
            "step": 1,
            "state": state,
            "best": kept,
        }

    stages = {"phase1": stage("phase1"), "phase2": stage("phase2", best="best")}
    stages["vanilla"] = {**stage("phase1"), "prepared": False}
    stages["finetune"] = stage("phase1", finished=False)
    recipe = load_recipe("kws-res8-narrow-w4-p90")
    content = {
        "recipe": to_dict(recipe),
        "options": {},
        "threads": 1,
        "stages": stages,
        "position": {"stage": "phase2"},
    }
    Checkpoints(tmp_path / "run").save(1, content)
    return tmp_path / "run"


def test_export_writes_the_last_stages_student(run: Path, networks, capsys: pytest.CaptureFixture[str]) -> None:
    x, out = torch.randn(3, 101, 40), run.parent / "student.pqk"
    for options, name in (([], "phase2"), (["--best"], "best"), (["--stage", "phase1"], "phase1")):
        assert cli.main(["export", str(run), "--out", str(out), *options]) == 0
        assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
        assert torch.equal(load_packed(out)(x), networks[name](x)), name
    assert read_packed(out).metadata["labels"][:3] == ["silence", "unknown", "yes"]


def test_export_refuses_what_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "student.pqk"
    for options, says in (
        (["--stage", "finetune"], "has no finished finetune; it has phase2, phase1"),
        (["--stage", "phase1", "--best"], "no epoch of phase1"),
    ):
        assert cli.main(["export", str(run), "--out", str(out), *options]) == 1
        assert says in capsys.readouterr().err
    assert cli.main(["export", str(run), "--out", str(run.parent / "student.onnx")]) == 1
    assert "student.onnx is the name of another format than packed: give --format onnx" in capsys.readouterr().err
    assert not (run.parent / "student.onnx").exists()
    assert cli.main(["export", str(run), "--out", str(run.parent)]) == 1
    assert "expected a file to write, got the folder" in capsys.readouterr().err
    assert cli.main(["export", str(run / "none"), "--out", str(out)]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert not out.exists()


def test_inspect_shows_layers_parts_and_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "student.pqk"
    size = save_packed(student(res8_narrow()), path)
    assert cli.main(["inspect", str(path), "--page", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "conv3" in out
    assert f"{size:,}" in out
    assert "bound of independent weights" in (tmp_path / "page" / "student.md").read_text()
    assert "<table>" in (tmp_path / "page" / "student.html").read_text()
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == size
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["inspect", str(path)]) == 1
    assert "cut off or damaged" in capsys.readouterr().err


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    size = save_packed(student(res8_narrow(), per_channel=True), tmp_path / "s.pqk")
    packed = read_packed(tmp_path / "s.pqk")
    *parts, whole = (int(row[1].replace(",", "")) for row in sizes.parts_table(packed).rows)
    assert sum(parts) == whole == size == packed.size
    rows = sizes.layers_table(packed).rows
    assert int(rows[-1][6].replace(",", "")) == sum(int(row[6].replace(",", "")) for row in rows[:-1]) == parts[0]
    assert parts[1] == 4 * (7 * 19 + 12)


def test_other_forms_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    model = student(res8_narrow())
    save_packed(model, tmp_path / "s.pqk")
    packed = read_packed(tmp_path / "s.pqk")
    forms = sizes.formats(packed)
    weights = [
        w for name, w in pqk.convert(model).state_dict().items() if name.split(".")[0] in packed.layers and "w" in name
    ]
    fp32 = b"".join(w.numpy().tobytes() for w in weights if w.dim() > 1)
    kept = sum(int((w != 0).sum()) for w in weights if w.dim() > 1)
    assert forms["fp32"] == len(fp32) == 4 * 19893
    assert forms["fp32, zlib"] == pytest.approx(len(gzip.compress(fp32)), rel=0.02)
    assert forms["dense int8"] == 19893
    assert forms["dense int4"] == sum((layer.q.size + 1) // 2 for layer in packed.layers.values())
    assert forms["the paper's count"] == kept / 2
    sizes_of = [layer.q.size for layer in packed.layers.values()]
    assert sizes_of[0] == 171
    assert forms["GGUF Q4_0"] == 6 * 18 + 18 * sum(-(-n // 32) for n in sizes_of[1:])
    assert forms["bitsandbytes NF4"] == 86 + 12 + sum((n + 1) // 2 + 4 * -(-n // 64) for n in sizes_of[1:])
    assert forms["compressed-tensors bitmask, bf16"] == 2 * kept + 19 * (2 + 8) + 6 * 19 * (22 + 8) + 12 * (3 + 8)
    assert (
        forms["bound of independent weights"]
        < forms["this file's payload"]
        <= min(forms[name] for name in ("dense, k bits", "bitmask and k-bit values", "gaps", "entropy"))
    )
    csr = [
        torch.from_numpy(layer.q.reshape(len(layer.q), -1).astype(np.float32)).to_sparse_csr()
        for layer in packed.layers.values()
    ]
    assert forms["rows of values and 32-bit columns (CSR), fp32"] == sum(
        4 * (m.values().numel() + m.col_indices().numel() + m.crow_indices().numel()) for m in csr
    )


def test_export_writes_every_format(run: Path, networks, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 101, 40)
    for name in ("pt2", "c", "onnx"):
        if name == "onnx":
            package("onnx")
            package("onnxscript")
        assert cli.main(["export", str(run), "--format", name, "--out", str(run.parent / f"student.{name}")]) == 0
        out = capsys.readouterr().out
        assert "the student of phase2" in out
        assert "bytes" in out
    loaded = torch.export.load(run.parent / "student.pt2").module()
    torch.testing.assert_close(loaded(x), networks["phase2"](x), rtol=1e-5, atol=1e-5)
    assert "student_run" in (run.parent / "student.h").read_text()
    model = package("onnx").load(run.parent / "student.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props}["model"] == "res8_narrow"
