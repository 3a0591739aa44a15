"""Both phases under Lightning's Trainer: bit for bit the plain loop's networks, whole or resumed."""

import importlib.util
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import package, required
from torch import Tensor, nn

import pqk_fast as pqk

if importlib.util.find_spec("lightning") is None and not required("PACKAGES"):
    pytest.skip("needs lightning", allow_module_level=True)

import lightning.pytorch as L

from pqk_fast.lightning import Phase1Callback, Phase2Callback

CONFIG = pqk.PQKConfig(bits=4, sparsity=0.7, mask_interval=4)
EPOCHS, BATCHES = 3, 8


class Loader:
    """Fixed batches, no shuffling; says where it is, as Lightning asks of loaders that resume within an epoch."""

    def __init__(self, count: int = BATCHES) -> None:
        generator = torch.Generator().manual_seed(1)
        draw = (torch.randn(16, 8, generator=generator) for _ in range(count))
        self.batches = [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()) for x in draw]
        self.first = self.given = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self.first = self.first, 0
        for index in range(first, len(self.batches)):
            self.given = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["given"] % len(self.batches)


class Training:
    """What makes a LightningModule of either package the tests' network."""

    def __init__(self, prepared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        if prepared:
            pqk.prepare(self.net, CONFIG)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(pqk.param_groups(self, lr=0.1, step_lr=1e-3, weight_decay=1e-3), momentum=0.9)


class Net(Training, L.LightningModule):
    pass


class Distilled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss = pqk.MutualDistillationLoss(alpha=0.25, beta=0.125)
        self.weights: list[tuple[int, float, float]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.weights.append((self.global_step, float(self.loss.alpha), float(self.loss.beta)))
        return self.loss(*pqk.dual_forward(self.net, x), y)


class Save(L.Callback):
    """A checkpoint once ``step`` optimizer steps are done."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def trainer(*callbacks: Any, kind: Any = L.Trainer, **changes: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS}
    return kind(callbacks=list(callbacks), **(options | changes))


def fit(module: Any, *callbacks: Any, ckpt_path: Any = None, **changes: Any) -> Any:
    done = trainer(*callbacks, **changes)
    done.fit(module, Loader(), ckpt_path=ckpt_path)
    return done


def pruned() -> Distilled:
    """A module with phase 1 behind it."""
    one, two = Net(), Distilled()
    fit(one, Phase1Callback())
    two.load_state_dict(one.state_dict())
    return two


def same_state(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def plain_phase1(accumulate: int) -> nn.Module:
    """What README shows, with gradients of ``accumulate`` batches."""
    module, loader = Net(), Loader()
    optimizer = module.configure_optimizers()
    per_epoch = math.ceil(len(loader) / accumulate)
    pruner = pqk.Pruner(module, steps=EPOCHS * per_epoch, epoch_steps=per_epoch)
    for _ in range(EPOCHS):
        for index, batch in enumerate(loader):
            if index % accumulate == 0:
                optimizer.zero_grad()
            (module.training_step(batch, index) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                optimizer.step()
                pruner.step()
    return module


def kept(module: nn.Module) -> int:
    return sum(int(layer.weight_mask.sum()) for layer in (module.net[0], module.net[3]))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_phase1_is_the_plain_loops(accumulate: int) -> None:
    """8 batches by 3: the third step of an epoch has two."""
    callback = Phase1Callback()
    module = Net()
    done = fit(module, callback, accumulate_grad_batches=accumulate)
    assert callback.pruner is not None
    assert (callback.pruner.iteration, callback.pruner.finished) == (EPOCHS * math.ceil(BATCHES / accumulate), True)
    same_state(module, plain_phase1(accumulate))
    assert kept(module) == 176 - int(0.7 * 176)
    assert float(done.callback_metrics["sparsity"]) == pytest.approx(int(0.7 * 176) / 176)


@pytest.mark.parametrize(("accumulate", "step"), [(1, 5), (1, 8), (1, 14), (2, 5), (2, 8)])
def test_phase1_resumed_is_phase1_uninterrupted(tmp_path: Path, accumulate: int, step: int) -> None:
    """From between mask updates and right after one, within an epoch and at its end."""
    path = tmp_path / "middle.ckpt"
    whole = Net()
    fit(whole, Phase1Callback(), Save(path, step), accumulate_grad_batches=accumulate)
    resumed, callback = Net(), Phase1Callback()
    with torch.no_grad():
        resumed.net[0].weight.mul_(2)  # all comes from the checkpoint
    masks = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            masks.append([layer.weight_mask.clone() for layer in (module.net[0], module.net[3])])

    fit(resumed, callback, Look(), ckpt_path=path, accumulate_grad_batches=accumulate)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(masks[0][0], saved["net.0.weight_mask"])
    assert torch.equal(masks[0][1], saved["net.3.weight_mask"])
    assert not all(mask.all() for mask in masks[0]) or step == 5, "or new masks would look right"
    same_state(resumed, whole)


def test_the_same_trainer_goes_on_after_an_interrupt() -> None:
    """The position is the callback's own; no checkpoint is needed."""

    class Stop(L.Callback):
        armed = True

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1 and self.armed:
                self.armed = False
                raise RuntimeError("stopped here")

    module, callback = Net(), Phase1Callback()
    done = trainer(callback, Stop())
    with pytest.raises(RuntimeError, match="stopped here"):
        done.fit(module, Loader())
    assert callback.pruner.iteration == BATCHES
    sparsity = callback.pruner.sparsity()
    done.fit(module, Loader())
    assert 0 < sparsity < callback.pruner.sparsity()
    assert callback.pruner.iteration == EPOCHS * BATCHES
    assert kept(module) == 53


def test_phase2_is_the_plain_loops_and_warms_up() -> None:
    """Masks and step sizes stay, both branches learn, and the losses' weights change once, at ``distill_start``."""
    module, twin = pruned(), pruned()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(module, Phase2Callback(distill_start=7, alpha=0.5, beta=0.75), accumulate_grad_batches=2)
    assert module.weights == [(s, *((1.0, 0.0) if s < 7 else (0.5, 0.75))) for s in range(12) for _ in range(2)]
    pqk.start_phase2(twin)
    optimizer, loader = twin.configure_optimizers(), Loader()
    batches = [batch for _ in range(EPOCHS) for batch in loader]
    for index, (x, y) in enumerate(batches):
        if index % 2 == 0:
            optimizer.zero_grad()
        twin.loss.set_weights(*((1.0, 0.0) if index < 14 else (0.5, 0.75)))
        (twin.loss(*pqk.dual_forward(twin.net, x), y) / 2).backward()
        if index % 2:
            optimizer.step()
    same_state(module, twin)
    after = module.state_dict()
    assert torch.equal(before["net.0.weight_mask"], after["net.0.weight_mask"])
    assert torch.equal(before["net.0.weight_step"], after["net.0.weight_step"])
    moved = before["net.0.weight"] != after["net.0.weight"]
    assert moved[before["net.0.weight_mask"]].any()
    assert moved[~before["net.0.weight_mask"]].any()
    student = pqk.convert(module).net
    assert sum(int((student[i].weight != 0).sum()) for i in (0, 3)) <= kept(module) == 53
    assert all(student[i].weight.unique().numel() <= 15 for i in (0, 3))


@pytest.mark.parametrize("step", [5, 8, 16])
def test_phase2_resumed_is_phase2_uninterrupted(tmp_path: Path, step: int) -> None:
    """In a module that is new: it gets to know from the checkpoint that it is in phase 2."""
    path = tmp_path / "middle.ckpt"
    whole, resumed = pruned(), Distilled()
    fit(whole, Phase2Callback(distill_start=10), Save(path, step))
    fit(resumed, Phase2Callback(distill_start=10), ckpt_path=path)
    same_state(resumed, whole)
    assert resumed.weights == whole.weights[step:]


@pytest.mark.parametrize("step", [5, 8])
def test_step_sizes_that_learn_in_phase2_go_on_so(tmp_path: Path, step: int) -> None:
    path = tmp_path / "middle.ckpt"
    whole, resumed = pruned(), Distilled()
    before = whole.net[0].weight_step.detach().clone()
    fit(whole, Phase2Callback(step_size="learned"), Save(path, step))
    assert not torch.equal(whole.net[0].weight_step, before)
    fit(resumed, Phase2Callback(step_size="learned"), ckpt_path=path)
    same_state(resumed, whole)
    assert resumed.net[0].weight_step.requires_grad
    fit(resumed, Phase2Callback(), max_epochs=1)
    assert resumed.net[0].weight_step.requires_grad, "left as it was"
    resumed.net[0].weight_step.data.fill_(-9.0)
    fit(resumed, Phase2Callback(), max_epochs=1, limit_train_batches=1)
    assert resumed.net[0].weight_step.item() == pytest.approx(1e-12)
    with pytest.raises(ValueError, match="step_size must be one of frozen, learned; got 'free'"):
        Phase2Callback(step_size="free")


def test_phase2_starts_from_phase1s_checkpoint_and_leaves_losses_alone_if_not_told(tmp_path: Path) -> None:
    one = Net()
    fit(one, Phase1Callback()).save_checkpoint(tmp_path / "phase1.ckpt")
    module = Distilled.load_from_checkpoint(tmp_path / "phase1.ckpt")
    fit(module, Phase2Callback(), max_epochs=1)
    assert {(alpha, beta) for _, alpha, beta in module.weights} == {(0.25, 0.125)}
    assert torch.equal(module.net[0].weight_mask, one.net[0].weight_mask)


def test_a_second_fit_of_phase2_goes_on_with_it() -> None:
    module = pruned()
    fit(module, Phase2Callback(), max_epochs=1)
    teacher = module.net[1].teacher_running_mean.clone()
    fit(module, Phase2Callback(), limit_train_batches=0)
    assert torch.equal(module.net[1].teacher_running_mean, teacher), "not started anew"


def test_mixed_precision_ends_as_sparse() -> None:
    module = Net()
    fit(module, Phase1Callback(), precision="bf16-mixed")
    assert kept(module) == 53
    assert module.net[0].weight_step.dtype == module.net[0].weight.dtype == torch.float32


def test_the_other_package_of_lightning_runs_it_too() -> None:
    other = package("pytorch_lightning")

    class Other(Training, other.LightningModule):
        pass

    module = Other()
    fit(module, Phase1Callback(), kind=other.Trainer)
    same_state(module, plain_phase1(1))


def test_phase1_refuses_an_unprepared_module_and_one_in_phase2() -> None:
    plain, done = Net(prepared=False), pruned()
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"Net has no PQK layers: call pqk_fast.prepare"):
        fit(plain, Phase1Callback())
    fit(done, Phase2Callback(), max_epochs=1)
    with pytest.raises(ValueError, match="masks are frozen in phase 2"):
        fit(done, Phase1Callback())


def test_phase1_refuses_several_optimizers() -> None:
    class TwoOptimizers(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[3])]

    with pytest.raises(ValueError, match="phase 1 counts the steps of one optimizer, the module has 2"):
        fit(TwoOptimizers(), Phase1Callback())


def test_phase1_refuses_checkpoints_that_hold_no_or_another_schedule(tmp_path: Path) -> None:
    without, other = tmp_path / "without.ckpt", tmp_path / "with.ckpt"
    fit(Net(), Save(without, 3), max_epochs=1)
    with pytest.raises(ValueError, match="goes on at step 3, but the checkpoint holds no state of Phase1Callback"):
        fit(Net(), Phase1Callback(), ckpt_path=without)
    fit(Net(), Phase1Callback(), Save(other, 3))
    with pytest.raises(ValueError, match="the saved schedule has steps=24, this one 40"):
        fit(Net(), Phase1Callback(), ckpt_path=other, max_epochs=5)


def test_a_length_that_lightning_cannot_know_is_given() -> None:
    class Endless:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield from Loader()

    with pytest.raises(ValueError, match=r"cannot tell how long training is .*Phase1Callback\(steps=\.\.\.\)"):
        fit(Net(), Phase1Callback(), max_epochs=-1)
    with pytest.raises(ValueError, match=r"Phase1Callback\(epoch_steps=\.\.\.\)"):
        trainer(Phase1Callback(), max_epochs=1, max_steps=24).fit(Net(), Endless())
    module = Net()
    trainer(Phase1Callback(epoch_steps=BATCHES), max_epochs=1, max_steps=24).fit(module, Endless())
    same_state(module, plain_phase1(1))


def test_what_phase2_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PQK layers"):
        fit(Net(prepared=False), Phase2Callback())
    with pytest.raises(ValueError, match="no weight is pruned"):
        fit(Distilled(), Phase2Callback())
    one = Net()
    fit(one, Phase1Callback()).save_checkpoint(tmp_path / "phase1.ckpt")
    with pytest.raises(ValueError, match=r"Phase2Callback cannot go on from .*phase1.ckpt, a checkpoint of phase 1"):
        fit(Net(), Phase2Callback(), ckpt_path=tmp_path / "phase1.ckpt")
    with pytest.raises(ValueError, match=r"distill_start=3 .*Net has none: make it an attribute"):
        fit(one, Phase2Callback(distill_start=3))
    two = pruned()
    fit(two, Phase2Callback(), max_epochs=1).save_checkpoint(tmp_path / "phase2.ckpt")
    with pytest.raises(ValueError, match=r"Phase1Callback cannot go on from .*phase2.ckpt, a checkpoint of phase 2"):
        fit(Distilled(), Phase1Callback(), ckpt_path=tmp_path / "phase2.ckpt")


def test_what_phase1_warns_of() -> None:
    module = Net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-3)
    with pytest.warns(UserWarning, match=r"step sizes are in one parameter group .*param_groups\(self, lr\)"):
        fit(module, Phase1Callback())
    with pytest.warns(UserWarning, match="training ends at step 4 of 24, before the last mask: the network is 0.0 %"):
        fit(Net(), Phase1Callback(steps=24), max_steps=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(the step sizes|training ends)")
        fit(Net(), Phase1Callback())


def test_without_lightning_the_error_names_the_extra_and_the_library_imports() -> None:
    program = (
        "import sys; sys.modules.update({'lightning': None, 'pytorch_lightning': None}); import pqk_fast\n"
        "import pqk_fast.lightning"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "line 2, in <module>" in done.stderr
    assert "pqk_fast.lightning needs Lightning" in done.stderr
    assert "pip install 'pqk-fast[lightning]'" in done.stderr
