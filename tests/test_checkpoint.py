"""Checkpoints are whole or not there, and anything else is refused with its name."""

from dataclasses import replace

import pytest
import torch
from small_run import batches, net, recipe

from pqk_fast import checkpoint as module
from pqk_fast.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer


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


def test_settings_that_are_new_since_a_checkpoint_have_their_defaults(tmp_path):
    """A run of an earlier version goes on, unless one of them was set."""
    Trainer(net(), recipe(), out=tmp_path).phase1(batches(0), batches(1))
    path = Checkpoints(tmp_path).paths()[-1]
    content = load_checkpoint(path)
    for place, name in (("", "distill"), ("", "phase1_start"), ("phase1", "step_lr_rule"), ("pqk", "mask_end")):
        del (content["recipe"][place] if place else content["recipe"])[name]
    save_checkpoint(path, content)
    results = Trainer(net(), recipe(), out=tmp_path, resume=True).phase1(batches(0), batches(1))
    assert [row["step"] for row in results.rows] == [20, 40, 60, 80, 100, 120]
    changed = {"pqk": replace(recipe().pqk, mask_end=0.5), "phase1": replace(recipe().phase1, step_lr_rule="lsq")}
    for part, message in (("pqk", "pqk.mask_end was 1.0, now"), ("phase1", "phase1.step_lr_rule was 'flat', now")):
        with pytest.raises(ConfigError, match=rf"cannot go on as another one: recipe.{message}"):
            Trainer(net(), recipe(**{part: changed[part]}), out=tmp_path, resume=True)
    content["recipe"]["pqk"]["novelty"] = 1
    save_checkpoint(path, content)
    with pytest.raises(ConfigError, match=r"unknown key 'pqk.novelty'"):
        Trainer(net(), recipe(), out=tmp_path, resume=True)


def test_masks_take_a_bit_each_and_come_back(tmp_path):
    masks = {
        "a": torch.rand(3, 5) < 0.5,
        "b": torch.ones(1000, dtype=torch.bool),
        "c": torch.zeros(0, dtype=torch.bool),
    }
    save_checkpoint(tmp_path / "c.pt", {"stages": {"x": {"state": masks}}, "position": [masks["a"], 1]})
    loaded = load_checkpoint(tmp_path / "c.pt")
    torch.testing.assert_close(loaded["stages"]["x"]["state"], masks, rtol=0, atol=0)
    assert torch.equal(loaded["position"][0], masks["a"])
    stored = torch.load(tmp_path / "c.pt", weights_only=True)
    assert stored["stages"]["x"]["state"]["b"]["packed bits"].numel() == 125


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"weights": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(500.0, 510.0).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
        load_checkpoint(path)
