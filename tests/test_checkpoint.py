"""Checkpoints are whole or not there, and anything else is refused with its name."""

import pytest
import torch

from pqk_fast import checkpoint as module
from pqk_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path):
    content = {"stages": {"a": {"state": {"w": torch.randn(3), "m": torch.tensor([True, False])}, "phase": 1}}}
    save_checkpoint(tmp_path / "deep" / "c.pt", content)
    loaded = load_checkpoint(tmp_path / "deep" / "c.pt")
    torch.testing.assert_close(loaded["stages"]["a"]["state"], content["stages"]["a"]["state"], rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"value": 1})

    def torn(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"value": 2})
    assert load_checkpoint(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, {"value": torch.zeros(1000)})
    whole = path.read_bytes()
    for torn in (b"", b"not a file of ours", whole[:100], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(torn)
        with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="expected format 'pqk_fast checkpoint'"):
        load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99, this library reads 1 to 2: it comes from a newer"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"format": module.FORMAT, "version": 1, "evil": Evil()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
