"""A run that was stopped, wherever and however, ends as if it had not been."""

import os
import random
import signal
from typing import ClassVar

import numpy as np
import pytest
import torch
from small_run import batches, recipe
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from pqk_fast import PQKConfig
from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from pqk_fast.config import Phase2Config, PhaseConfig
from pqk_fast.data.cifar import CifarSplit
from pqk_fast.data.cifar_batches import CifarBatches
from pqk_fast.trainer import Trainer
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.random_state import random_state, set_random_state
from pqk_fast.training.stream import Stream

SHORT = {
    "phase1": PhaseConfig(steps=25, epoch_steps=9, lr_drops=(15,)),
    "phase2": Phase2Config(steps=20, epoch_steps=8, lr_drops=(12,), distill_start=6, forward="two_pass"),
    "pqk": PQKConfig(bits=4, sparsity=0.7, mask_interval=4, scope="layer"),
}


class Noisy(nn.Module):
    """Adds noise of all three global generators."""

    def forward(self, x):
        if not self.training:
            return x
        return x + 0.01 * (torch.randn_like(x) + float(np.random.standard_normal()) + random.gauss(0, 1))  # noqa: NPY002


def noisy_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), Noisy(), nn.Linear(32, 3))


def data_of(kind):
    """Training data whose order a resumed run must find again; made anew as by another process."""
    x, y = (torch.cat(part) for part in zip(*batches(0), strict=True))
    if kind == "list":
        return batches(0)
    if kind == "loader":
        return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True)
    if kind == "own generator":
        generator = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator)
    if kind == "sampler's generator":
        sampler = RandomSampler(range(len(y)), generator=torch.Generator().manual_seed(4))
        return DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(sampler, 32, drop_last=True))
    if kind == "workers":
        return DataLoader(TensorDataset(x, y), batch_size=32, sampler=RandomSampler(range(len(y))), num_workers=1)
    raise ValueError(kind)


def seed_all(seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def trainer(out, *, resume=False, seed=0, callbacks=(), model=noisy_net, **changes):
    made = Trainer(model(), recipe(**(SHORT | changes)), out=out, resume=resume, callbacks=callbacks)
    seed_all(seed)
    return made


class StopAt(Callback):
    """Stops the run after the n-th step of both phases together: by an error, or by a signal to the process."""

    def __init__(self, steps, number=None):
        self.left, self.number = steps, number

    def on_step(self, stage, step):
        self.left -= 1
        if self.left == 0:
            if self.number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.number)


def outcome(finished):
    rows = {
        name: [{key: value for key, value in row.items() if key != "seconds"} for row in result.rows]
        for name, result in finished.results.items()
    }
    best = {
        (name, view): (row["epoch"], state)
        for name, result in finished.results.items()
        for view, (row, state) in result.best.items()
    }
    return dict(finished.model.state_dict()), rows, best, random_state()


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys()
    for key in a[2]:
        assert a[2][key][0] == b[2][key][0]
        torch.testing.assert_close(a[2][key][1], b[2][key][1], rtol=0, atol=0)
    assert_same_tree(a[3], b[3])


def assert_same_tree(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def whole(tmp_path, kind):
    run = trainer(tmp_path / "whole")
    run.fit(data_of(kind), batches(1))
    return outcome(run)


@pytest.mark.parametrize("kind", ["list", "loader", "own generator", "sampler's generator"])
def test_a_run_killed_after_any_step_ends_in_the_same_bits(tmp_path, kind):
    """An error leaves what a SIGKILL would: the checkpoint of the last epoch."""
    expected = whole(tmp_path, kind)
    for stop in range(1, 46, 3):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            trainer(out, callbacks=[StopAt(stop)]).fit(data_of(kind), batches(1))
        again = trainer(out, resume=True, seed=stop)
        again.fit(data_of(kind), batches(1))
        if stop < 9:  # before the first checkpoint: another seed makes it another run
            assert not torch.equal(again.model[0].weight, expected[0]["0.weight"])
        else:
            assert_same(outcome(again), expected)


@pytest.mark.parametrize("interval", [1, 4])
def test_a_run_stopped_around_a_new_mask_goes_on(tmp_path, interval):
    masks = PQKConfig(bits=4, sparsity=0.7, mask_interval=interval, scope="layer")
    run = trainer(tmp_path / "whole", pqk=masks)
    run.fit(data_of("loader"), batches(1))
    for stop in (1, 3, 4, 5, 24, 25, 26):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            trainer(out, pqk=masks, callbacks=[StopAt(stop, signal.SIGTERM)]).fit(data_of("loader"), batches(1))
        again = trainer(out, pqk=masks, resume=True, seed=stop)
        again.fit(data_of("loader"), batches(1))
        assert_same(outcome(again), outcome(run))


def test_stages_that_take_turns_with_the_data_find_their_places_again(tmp_path):
    def stages(run):
        first, second = data_of("loader"), data_of("own generator")
        run.phase1(first, batches(1))
        run.copy().finetune(second, batches(1))
        run.phase2(first, batches(1))

    run = trainer(tmp_path / "whole")
    stages(run)
    for stop in (28, 45, 46, 60):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            stages(trainer(out, callbacks=[StopAt(stop, signal.SIGTERM)]))
        again = trainer(out, resume=True, seed=stop)
        stages(again)
        assert_same(outcome(again), outcome(run))


def test_a_stage_is_not_begun_twice():
    run = trainer(None)
    run.phase1(batches(0))
    one, other = run.copy(), run.copy()
    one.phase2(batches(0))
    with pytest.raises(RuntimeError, match="phase2 was begun by this trainer, or a copy of it, before"):
        other.phase2(batches(0))


def test_a_signal_at_the_very_end_of_a_stage_is_not_lost(tmp_path):
    class Late(Callback):
        def on_stage_end(self, stage, seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(tmp_path / "late", callbacks=[Late()])
    with pytest.raises(Interrupted, match="at the end of a stage, which is saved") as caught:
        run.fit(data_of("loader"), batches(1))
    assert caught.value.signal is signal.SIGTERM
    again = trainer(tmp_path / "late", resume=True, seed=2)
    again.fit(data_of("loader"), batches(1))
    assert_same(outcome(again), whole(tmp_path, "loader"))


def test_a_launcher_that_passes_a_signal_on_does_not_cost_the_checkpoint(tmp_path):
    class Twice(StopAt):
        def on_step(self, stage, step):
            super().on_step(stage, step)
            super().on_step(stage, step)

    with pytest.raises(Interrupted):
        trainer(tmp_path, callbacks=[Twice(21, signal.SIGTERM), StopAt(11, signal.SIGTERM)]).fit(batches(0))
    assert load_checkpoint(tmp_path)["position"]["step"] == 11


def test_workers_that_a_signal_ends_first_do_not_cost_the_checkpoint(tmp_path):
    class Dies(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    with pytest.raises(Interrupted):
        trainer(tmp_path).fit(Dies(batches(0)), batches(1))
    assert load_checkpoint(tmp_path)["position"]["step"] == 4
    again = trainer(tmp_path, resume=True, seed=1)
    again.fit(batches(0), batches(1))
    assert_same(outcome(again), whole(tmp_path, "list"))


def test_workers_that_outlive_a_pass_are_warned_of():
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(0), strict=True)))
    stream = Stream(DataLoader(data, batch_size=32, num_workers=1, persistent_workers=True))
    next(stream)
    with pytest.warns(UserWarning, match="persistent_workers"):
        stream.load_state_dict(stream.state_dict())


def test_the_only_checkpoint_is_never_removed_for_a_damaged_one(tmp_path):
    files = Checkpoints(tmp_path, keep=1)
    for step in (9, 18, 20):
        files.save(step, {"step": step})
    files.paths()[-1].write_bytes(b"torn")
    Checkpoints(tmp_path, keep=1).save(19, {"step": 19})
    assert [path.name for path in files.paths()] == ["step-000000019.pt"]
    assert files.newest()["step"] == 19


def test_worker_processes_do_not_change_that(tmp_path):
    expected = whole(tmp_path, "workers")
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        trainer(out, callbacks=[StopAt(14, signal.SIGTERM)]).fit(data_of("workers"), batches(1))
    again = trainer(out, resume=True, seed=1)
    again.fit(data_of("workers"), batches(1))
    assert_same(outcome(again), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_very_step_and_every_one_can_be_gone_on_from(tmp_path, number):
    """The run is stopped again and again, each time a few steps later."""
    expected = whole(tmp_path, "loader")
    out = tmp_path / "stopped"
    done, stops = 0, 0
    before = signal.getsignal(number)
    while True:
        run = trainer(out, resume=True, seed=stops, callbacks=[StopAt(4, number)] if done else [StopAt(2, number)])
        if not done:
            seed_all(0)
        try:
            run.fit(data_of("loader"), batches(1))
        except Interrupted as interrupt:
            assert interrupt.signal is number  # noqa: PT017
            assert signal.getsignal(number) is before
            stops += 1
            done += 2 if not done else 4
            saved = load_checkpoint(out)
            assert sum(stage["step"] for stage in saved["stages"].values()) == done
            assert len(Checkpoints(out).paths()) <= 3
        else:
            break
    assert stops == 11
    assert_same(outcome(run), expected)


def test_checkpoints_by_the_clock_change_nothing(tmp_path):
    expected = whole(tmp_path, "loader")
    run = Trainer(noisy_net(), recipe(**SHORT), out=tmp_path / "often", checkpoint_seconds=0.0, keep_checkpoints=100)
    seed_all()
    run.fit(data_of("loader"), batches(1))
    assert [path.stem for path in Checkpoints(tmp_path / "often").paths()] == [f"step-{i:09d}" for i in range(1, 46)]
    assert_same(outcome(run), expected)


def test_a_torn_newest_checkpoint_is_passed_over(tmp_path):
    expected = whole(tmp_path, "loader")
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        trainer(out, callbacks=[StopAt(35)]).fit(data_of("loader"), batches(1))
    newest = Checkpoints(out).paths()[-1]
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=rf"{newest.name} is torn .*; going back to step-000000025.pt"):
        again = trainer(out, resume=True, seed=5)
    again.fit(data_of("loader"), batches(1))
    assert_same(outcome(again), expected)
    for path in Checkpoints(out).paths():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read: .*step-000000045.*step-"):
        trainer(out, resume=True)


def test_a_finished_run_is_read_and_not_trained_again(tmp_path):
    class NoStep(Callback):
        def on_step(self, stage, step):
            raise AssertionError("trained again")

    expected = whole(tmp_path, "loader")
    again = trainer(tmp_path / "whole", resume=True, seed=9, callbacks=[NoStep()])
    again.fit(data_of("loader"), batches(1))
    assert_same(outcome(again), expected)
    assert again.results["phase2"].seconds > 0


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = CifarSplit(pixels, torch.randint(3, (40,), generator=generator))
    return CifarBatches(split, batch_size=8, train=True, seed=1)


def test_data_that_know_their_place_are_asked_for_it(tmp_path):
    def small():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))

    def model():
        made = small()
        made(torch.zeros(1, 3, 32, 32))
        return made

    run = trainer(tmp_path / "whole", model=model)
    run.fit(images())
    for stop in (4, 12, 25, 26, 33):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            trainer(out, model=model, callbacks=[StopAt(stop, signal.SIGTERM)]).fit(images())
        again = trainer(out, model=model, resume=True, seed=3)
        again.fit(images())
        assert_same(outcome(again), outcome(run))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    class Twice(Callback):
        def on_step(self, stage, step):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer(tmp_path, callbacks=[Twice()]).fit(batches(0))
    assert not isinstance(caught.value, Interrupted)
    assert not Checkpoints(tmp_path).paths()


def test_random_states_come_back_also_through_a_file(tmp_path):
    seed_all(5)
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    save_checkpoint(tmp_path / "c.pt", {"random": random_state()})
    drawn = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]  # noqa: NPY002
    set_random_state(load_checkpoint(tmp_path / "c.pt")["random"])
    assert drawn == [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]  # noqa: NPY002


def test_streams_refuse_data_that_run_out():
    with pytest.raises(ValueError, match="gives no batch"):
        next(Stream([]))
    once = Stream(iter(batches(0)))
    for _ in range(6):
        next(once)
    with pytest.raises(ValueError, match="gives no batch any more: expected an iterable that starts anew"):
        next(once)


def test_a_sampler_is_told_the_pass():
    class Sampler:
        told: ClassVar[list[int]] = []

        def set_epoch(self, epoch):
            self.told.append(epoch)

    class Data(list):
        sampler = Sampler()

    stream = Stream(Data(batches(0)))
    for _ in range(13):
        next(stream)
    assert Sampler.told == [0, 1, 2]
    again = Stream(Data(batches(0)))
    again.load_state_dict(stream.state_dict())
    next(again)
    assert Sampler.told == [0, 1, 2, 2]
