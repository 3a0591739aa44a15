"""A real run on real speech, stopped from outside at random points, ends in the same bits when it is resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pqk_fast.checkpoint import Checkpoints, load_checkpoint

POINTS = 20
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = {"phase1": 42, "finetune": 21, "phase2": 21}
SETTINGS = [
    f"phase1.steps={STEPS['phase1']}", "phase1.epoch_steps=7", "pqk.mask_interval=4",
    f"phase2.steps={STEPS['phase2']}", "phase2.epoch_steps=7", "phase2.distill_start=9",
    "data.batch_size=16", "stages=['phase1', 'finetune', 'phase2']",
]  # fmt: skip
TOTAL = STEPS["phase1"] + STEPS["finetune"] + STEPS["phase2"]


@pytest.fixture(scope="module")
def clips(real_speech, tmp_path_factory):
    """A few real clips of every word, so that starting takes no time."""
    root = tmp_path_factory.mktemp("clips")
    lists = {split: (real_speech / f"{split}_list.txt").read_text().split() for split in ("validation", "testing")}
    listed = {name for names in lists.values() for name in names}
    kept = set()
    for folder in sorted(path for path in real_speech.iterdir() if path.is_dir()):
        (root / folder.name).mkdir()
        names = [f"{folder.name}/{path.name}" for path in sorted(folder.glob("*.wav"))]
        if folder.name != "_background_noise_":
            names = [n for n in names if n not in listed][:14] + [n for n in names if n in listed][:6]
        for name in names:
            shutil.copy(real_speech / name, root / name)
        kept.update(names)
    for split, names in lists.items():
        (root / f"{split}_list.txt").write_text("\n".join(name for name in names if name in kept))
    return root


def start(clips: Path, out: Path, *more: str) -> subprocess.Popen:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "pqk_fast", "train", "--recipe", "kws-res8-narrow-w4-p90", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--data", str(clips), "--out", str(out), *settings, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def outcome(out: Path) -> tuple:
    record = json.loads((out / "record.json").read_text())
    for rows in record["curves"].values():
        for row in rows:
            del row["seconds"]
    stages = load_checkpoint(out)["stages"]
    networks = {name: (stage["state"], stage["best"]) for name, stage in stages.items()}
    return record["curves"], record["results"], record["layers"], networks


def stopped_and_resumed(clips: Path, out: Path, point: int, number: int, seed: int) -> tuple[int, tuple]:
    """Stop the run a random moment after it has saved step ``point`` or later; the step that it is resumed from."""
    process = start(clips, out)
    wait = random.Random(seed)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        paths = Checkpoints(out).paths()
        if paths and int(paths[-1].stem.removeprefix("step-")) >= point:
            break
        time.sleep(0.002)
    time.sleep(wait.uniform(0, 0.2))
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    saved = sum(stage["step"] for stage in load_checkpoint(out)["stages"].values())
    # Between stages, and when all are done, nobody answers a SIGTERM, and it ends the process.
    expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130,)}[number]
    assert process.returncode in expected or (process.returncode == 0 and saved == TOTAL), said
    finish(start(clips, out, "--resume"))
    return saved, outcome(out)


@pytest.mark.slow
def test_a_real_run_stopped_at_random_points_ends_bit_identical(clips, tmp_path):
    finish(start(clips, tmp_path / "whole"))
    expected = outcome(tmp_path / "whole")
    assert expected[1]["phase2_p"]["last"]["testing"] is not None
    draw = random.Random(0)
    points = [draw.uniform(0, TOTAL - 7) for _ in range(POINTS)]
    jobs = [(clips, tmp_path / str(i), point, SIGNALS[i % 3], i) for i, point in enumerate(points)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: stopped_and_resumed(*job), jobs))
    for (saved, got), job in zip(results, jobs, strict=True):
        assert got[:3] == expected[:3], (saved, job)
        torch.testing.assert_close(got[3], expected[3], rtol=0, atol=0, msg=f"{saved} {job}")
    stopped_early = [saved for saved, _ in results if saved < TOTAL]
    assert len(stopped_early) >= POINTS - 2, "a run that has ended cannot be stopped"
    assert len({saved % 7 for saved in stopped_early} - {0}) >= 3, "signals save between epochs too"
