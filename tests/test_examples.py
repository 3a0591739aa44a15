"""The examples run as they stand, end with a sparse 4-bit student, and go on where they were stopped."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import package
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, folder: Path, *arguments: str) -> str:
    """As a user runs it."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_student(student: nn.Sequential) -> None:
    """80 % of all weights are zero, the others on a 4-bit grid."""
    weights = [layer.weight for layer in student if isinstance(layer, nn.Conv2d | nn.Linear)]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight != 0).sum()) for weight in weights) <= total - int(0.8 * total)
    for weight in weights:
        step = weight[weight != 0].abs().min()
        assert torch.allclose((weight / step).round() * step, weight, rtol=1e-5)
        assert 2 < weight.unique().numel() <= 15


def test_plain_loop(tmp_path: Path) -> None:
    lines = run("plain_loop", tmp_path).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1"] * 12 + ["2"] * 6
    assert lines[11].endswith("sparse 80.0 %")
    student, full_net = (float(number) for number in re.findall(r"([\d.]+) %", lines[-2]))
    assert min(student, full_net) > 80, "chance is 25 %"
    assert "of 5264 weights" in lines[-1]
    assert (tmp_path / "plain_loop.pt").is_file()


@pytest.mark.parametrize("stopped_in", [3, 4, 5])
def test_plain_loop_resumed_ends_with_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: int
) -> None:
    """Stopped in a save, which leaves the checkpoint before it: of phase 1, of its end, of phase 2."""
    module = example("plain_loop")
    monkeypatch.setattr(module, "EPOCHS", {1: 3, 2: 2})
    whole = module.main(["--checkpoint", str(tmp_path / "whole.pt")])
    check_student(whole)
    saves = []
    save = torch.save

    def save_and_stop(*arguments: Any) -> None:
        saves.append(arguments)
        if len(saves) == stopped_in:
            Path(arguments[1]).write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--checkpoint", str(tmp_path / "stopped.pt")])
    resumed = module.main(["--checkpoint", str(tmp_path / "stopped.pt"), "--resume"])
    assert len(saves) == 6
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_lightning_loop(tmp_path: Path) -> None:
    package("lightning.pytorch")
    assert "Conv2d(1, 16" in run("lightning_loop", tmp_path)
    for phase in ("phase1", "phase2"):
        assert (tmp_path / "lightning_loop" / phase / "last.ckpt").is_file()


@pytest.mark.parametrize("phase", ["Phase1", "Phase2"])
def test_lightning_loop_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Phase 1 finished or not, phase 2 begun or not: each goes on from its own checkpoint."""
    package("lightning.pytorch")
    module = example("lightning_loop")
    make_data = module.make_data
    monkeypatch.setattr(module, "make_data", lambda samples, seed: make_data(128, seed))
    epochs: list[tuple[str, int]] = []

    def stop(self: Any) -> None:
        epochs.append((type(self).__name__, self.current_epoch))
        if epochs[-1] == (phase, 3) and epochs.count(epochs[-1]) == 1:
            raise RuntimeError("stopped here")

    monkeypatch.setattr(module.Phase1, "on_train_epoch_start", stop)
    with pytest.raises(RuntimeError, match="stopped here"):
        module.main(["--folder", str(tmp_path)])
    check_student(module.main(["--folder", str(tmp_path), "--resume"]))
    once = [("Phase1", epoch) for epoch in range(12)] + [("Phase2", epoch) for epoch in range(6)]
    assert sorted(epochs) == sorted([*once, (phase, 3)]), "no epoch but the one that was stopped is trained twice"
