"""``torchrun -m pqk_fast train`` with two processes: one run, shared out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from small_run import batches, net, recipe
from test_cli import SETTINGS, speech  # noqa: F401

from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import Checkpoints, load_checkpoint
from pqk_fast.trainer import Trainer
from pqk_fast.training.metrics import accuracy, confusion
from pqk_fast.training.ranks import Ranks, RanksDifferError

TRAIN = ["-m", "pqk_fast", "train", "--recipe", "kws-res8-narrow-w4-p90", "--device", "cpu"]


class Touches(Callback):
    """Changes one weight on rank 0, where callbacks run."""

    def on_step(self, stage, step):
        if step == 13:
            with torch.no_grad():
                self.model[3].weight[0, 0] += 1e-6


def parts(data, rank, world):
    return [(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in data]


def fit_on_rank(touch=False, precision="fp32"):
    """Both phases with this rank's part of each batch; what it ends with."""
    callbacks = [Touches()] if touch else []
    trainer = Trainer(net(seed=dist.get_rank()), recipe(), callbacks=callbacks, precision=precision)
    for callback in callbacks:
        callback.model = trainer.model
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        train, val = parts(batches(0), rank, world), parts(batches(1), rank, world)
        trainer.copy().vanilla(train, val)
        trainer.phase1(train, val)
        trainer.copy().finetune(train, val)
        trainer.phase2(train, val)
    except RanksDifferError as error:
        return str(error)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for r in trainer.results.values() for row in r.rows]
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_end_with_the_same_network_and_curves(precision):
    """Though each made a network of its own to begin with: rank 0's counts."""
    (state, rows), (other, other_rows) = on_ranks(fit_on_rank, False, precision)
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    assert rows == other_rows
    assert rows[-1]["validation"] > 85
    for name in ("0", "3"):
        mask = state[f"{name}.weight_mask"]
        assert int(mask.sum()) == mask.numel() - int(0.7 * mask.numel())


def test_ranks_that_drift_apart_are_told_where():
    messages = on_ranks(fit_on_rank, True)
    for message in messages:
        assert "'3.weight' is no longer the same on all 2 ranks" in message


def measure_on_rank():
    """Of this rank's share, three batches or two, with the others' counts added."""
    data = batches(1, count=5)[dist.get_rank() :: dist.get_world_size()]
    return confusion(net(), data, 3, ranks=Ranks()), accuracy(net(), data, ranks=Ranks())


def test_all_ranks_get_the_counts_of_all():
    expected = confusion(net(), batches(1, count=5), 3)
    assert expected.sum() == 5 * 32
    for matrix, percent in on_ranks(measure_on_rank):
        assert torch.equal(matrix, expected)
        assert percent == 100 * int(expected.trace()) / (5 * 32)


def start(speech, out, *more, ranks=2):  # noqa: F811
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *many, *TRAIN, "--data", str(speech), "--out", str(out), *SETTINGS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process):
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def networks(out):
    stages = load_checkpoint(out)["stages"]
    return {name: (stage["state"], stage["best"]) for name, stage in stages.items()}


@pytest.mark.slow
def test_two_ranks_make_one_run_that_can_be_stopped_and_gone_on_with(speech, tmp_path):  # noqa: F811
    said = finish(start(speech, tmp_path / "whole"))
    assert "2 ranks, each with 4 of a batch's 8" in said
    assert said.count("phase2-P") == 1, "rank 0 alone talks"
    record = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert record["options"]["world"] == 2
    assert set(record["curves"]) == {"vanilla", "phase1", "phase2", "finetune"}
    assert [row["step"] for row in record["curves"]["phase1"]] == [3, 6]

    longer = ["--set", "phase1.steps=150", "--set", "phase1.epoch_steps=150", "--set", "pqk.mask_interval=20"]
    whole, stopped = tmp_path / "long", tmp_path / "stopped"
    finish(start(speech, whole, *longer))
    process = start(speech, stopped, *longer)
    while process.poll() is None and not Checkpoints(stopped).paths():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0, said
    done = sum(stage["step"] for stage in load_checkpoint(stopped)["stages"].values())
    assert 150 < done < 300, "the signal saved a step within phase 1's only epoch"
    finish(start(speech, stopped, *longer, "--resume"))
    torch.testing.assert_close(networks(stopped), networks(whole), rtol=0, atol=0)

    alone = subprocess.run(
        [sys.executable, *TRAIN, "--data", str(speech), "--out", str(stopped), *SETTINGS, *longer, "--resume"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0
    assert "nothing to do" in alone.stdout


def test_a_batch_that_cannot_be_shared_is_refused(speech, tmp_path):  # noqa: F811
    process = start(speech, tmp_path / "odd", "--set", "data.batch_size=7")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "batch_size" in said
