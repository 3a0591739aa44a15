"""Records: what is written is read back, what is not a record is refused by name, no reader sees half a file."""

import copy
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from pqk_fast.record import FORMAT, VERSION, environment, read_record, write_record

ROW = {"epoch": 1, "step": 347, "loss": 1.5, "lr": 0.1, "sparsity": 0.0, "validation": 60.25, "seconds": 20.5}
RECORD = {
    "recipe": {"name": "tiny", "model": "res8_narrow", "pqk": {"bits": 4, "sparsity": 0.9}},
    "versions": {"python": "3.12.0", "triton": None},
    "hardware": {"cpu": "a CPU", "gpu": None},
    "seed": 0,
    "data": {"name": "words", "train": 10, "validation": 2, "testing": 3},
    "curves": {"vanilla": [ROW, {**ROW, "epoch": 2, "step": 694, "validation": None}]},
    "results": {
        "vanilla": {
            "last": {"validation": 91.5, "testing": 90.25},
            "best_dev": {"validation": 92.0, "testing": 90.0, "epoch": 2},
        }
    },
    "layers": [{"name": "conv0", "shape": [19, 1, 3, 3], "weights": 171, "kept": 120}],
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "record.json"
    write_record(path, RECORD)
    record = read_record(path)
    assert record.pop("format") == FORMAT
    assert record.pop("version") == VERSION
    assert record.pop("created").endswith("+00:00")
    assert record == RECORD
    write_record(path, read_record(path))  # what was read can be written again, over itself
    assert read_record(path)["seed"] == 0
    assert os.listdir(path.parent) == ["record.json"]


def changed(place: str, value: object) -> dict:
    """RECORD with one value replaced, or removed if the new one is `...`."""
    record = copy.deepcopy(RECORD)
    *parents, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    owner: object = record
    for key in parents:
        owner = owner[key]  # type: ignore[index]
    if value is ...:
        del owner[last]  # type: ignore[attr-defined]
    else:
        owner[last] = value  # type: ignore[index]
    return record


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("curves/vanilla/1/loss", math.nan, r"curves.vanilla\[1\].loss is nan: a record holds finite numbers only"),
        ("recipe/pqk/sparsity", math.inf, r"recipe.pqk.sparsity is inf"),
        ("data/train", torch.tensor(3), r"data.train is a Tensor: a record holds text, numbers"),
        ("recipe/3", 1, r"recipe has the key 3: keys must be text"),
        ("curves", ..., r"the record has no curves"),
        ("seed", "0", r'"seed" is a str'),
        ("curves/phase3", [], r'"curves" has phase3; the names are vanilla, phase1, phase2, finetune'),
        ("results/phase1", {}, r'"results" has phase1; the names are vanilla, phase1_p'),
        ("curves/vanilla", {"0": {}}, r"curves.vanilla must be a list, got a dict"),
        ("curves/vanilla/0/step", ..., r"curves.vanilla\[0\] has no step"),
        ("curves/vanilla/0", 3, r"curves.vanilla\[0\] must be a dictionary, got a int"),
        ("results/vanilla/best_dev", ..., r"results.vanilla has no best_dev"),
        ("results/vanilla/last/testing", ..., r"results.vanilla.last has no testing"),
        ("layers/0/kept", ..., r"layers\[0\] has no kept"),
    ],
)
def test_write_refuses(tmp_path: Path, place: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_record(tmp_path / "record.json", changed(place, value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "record.json is not a record: it is torn or not JSON"),
        (lambda text: "", "it is torn or not JSON"),
        (lambda text: "[1, 2]", "\"format\" must be 'pqk_fast record', got a list"),
        (lambda text: '{"format": "other"}', "got 'other'"),
        (lambda text: text.replace('"version": 1', '"version": 2'), '"version" must be 1, got 2'),
        (lambda text: text.replace('"results"', '"outcome"'), "the record has no results"),
    ],
)
def test_read_refuses_torn_and_foreign_files(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_read_refuses_binary_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(FileNotFoundError):
        read_record(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="it is torn or not JSON"):
        read_record(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_record(path, {**RECORD, "seed": 1})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


def test_environment_can_be_recorded_and_imports_nothing(tmp_path: Path) -> None:
    loaded = set(sys.modules)
    found = environment()
    assert not {"torchvision", "torchaudio"} & (set(sys.modules) - loaded)
    assert set(found["versions"]) == {"python", "pqk_fast", "torch", "triton", "numpy", "torchvision", "torchaudio"}
    assert found["versions"]["torch"] is not None
    assert set(found["hardware"]) == {"cpu", "cores", "threads", "memory_gib", "gpu"}
    assert found["hardware"]["cores"] >= 1
    assert json.loads(json.dumps(found)) == found
    write_record(tmp_path / "record.json", {**RECORD, **found})
    assert read_record(tmp_path / "record.json")["hardware"] == found["hardware"]
