"""What a run does not go on from, and says so: other settings, other data, damaged or old checkpoints."""

import os
import signal

import pytest
import torch
from small_run import batches, recipe
from test_resume import SHORT, StopAt, noisy_net, trainer
from torch import nn

from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from pqk_fast.config import PhaseConfig
from pqk_fast.data.cifar import CifarSplit
from pqk_fast.data.cifar_batches import CifarBatches
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.loop import TrainingDivergedError


def test_another_run_is_refused_by_name(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(out, callbacks=[StopAt(10)]).fit(batches(0))
    with pytest.raises(FileExistsError, match="holds a run that was begun before: resume it"):
        trainer(out)
    with pytest.raises(ConfigError, match=r"recipe.phase1.lr was 0.1, now it is 0.2"):
        trainer(out, resume=True, phase1=PhaseConfig(steps=25, epoch_steps=9, lr_drops=(15,), lr=0.2))
    with pytest.raises(ConfigError, match=r"options.precision was 'fp32', now it is 'bf16'"):
        Trainer(noisy_net(), recipe(**SHORT), out=out, resume=True, precision="bf16")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=rf"begun with {threads} threads and goes on with {threads + 1}"):
            trainer(out, resume=True)
    finally:
        torch.set_num_threads(threads)
    again = trainer(out, resume=True)
    with pytest.raises(ValueError, match="had no state_dict, unlike these"):
        again.fit(
            CifarBatches(CifarSplit(torch.zeros(8, 3, 32, 32).byte(), torch.zeros(8).long()), batch_size=4, train=True)
        )
    again = trainer(out, resume=True)
    with pytest.raises(ValueError, match="stands at batch 3 of a pass, these data give 1"):
        again.fit(batches(0)[:1])


def test_a_checkpoint_of_the_first_version_is_evaluated_but_not_gone_on_with(tmp_path):
    """It kept the networks of each stage in one file beside the record."""
    run = trainer(None)
    run.phase1(batches(0))
    state = dict(run.model.state_dict())
    old = {
        "format": "pqk_fast checkpoint",
        "version": 1,
        "recipe": {"name": "small"},
        "stages": {"phase1": {"prepared": True, "step": 25, "state": state, "best": {}}},
    }
    torch.save(old, tmp_path / "checkpoint.pt")
    loaded = load_checkpoint(tmp_path)
    torch.testing.assert_close(loaded["stages"]["phase1"]["state"], state, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="kept networks only: it can be evaluated"):
        trainer(tmp_path, resume=True)


def test_nothing_bad_is_saved(tmp_path):
    """Weights that are no numbers any more end the run before a checkpoint of them is written."""

    class Spoils(Callback):
        def on_step(self, stage, step):
            if step == 11:
                with torch.no_grad():
                    run.model[0].weight_mask.fill_(False)  # the loss stays finite
                    run.model[0].weight[0, 0] = torch.inf
                os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(tmp_path, callbacks=[Spoils()])
    with pytest.raises(TrainingDivergedError, match=r"phase1 stopped at step 11: .*step-000000009.pt"):
        run.fit(batches(0))
    assert load_checkpoint(tmp_path)["stages"]["phase1"]["step"] == 9


def test_masks_of_another_network_are_refused(tmp_path):
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))

    with pytest.raises(Interrupted):
        trainer(tmp_path, model=wide, callbacks=[StopAt(24, signal.SIGTERM)]).fit(batches(0))
    content = load_checkpoint(tmp_path)
    state = content["stages"]["phase1"]["state"]
    state["0.weight_mask"] = state["0.weight_mask"].flatten().roll(101).view(64, 8)
    del content["format"], content["version"]
    save_checkpoint(Checkpoints(tmp_path).paths()[-1], content)
    again = trainer(tmp_path, model=wide, resume=True)
    with pytest.raises(ValueError, match="the mask does not belong to the weight of layer '0'"):
        again.fit(batches(0))
