"""Both phases with PyTorch Lightning: a LightningModule and a callback for each.

python examples/lightning_loop.py              # takes seconds; stop it when you like, and
python examples/lightning_loop.py --resume     # it goes on from the last epoch's checkpoint
"""

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pqk_fast as pqk
from pqk_fast.lightning import Phase1Callback, Phase2Callback


def make_data(samples: int, seed: int) -> TensorDataset:
    """Four patterns of 8 x 8 under noise. Your data goes here."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (samples,), generator=draw)
    return TensorDataset(patterns[labels] + 2 * torch.randn(samples, 1, 8, 8, generator=draw), labels)


class Phase1(L.LightningModule):
    """A module as ever: it prepares its network, and gives its optimizer the parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        features = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
        net = nn.Sequential(*features, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4))
        self.net = pqk.prepare(net, pqk.PQKConfig(bits=4, sparsity=0.8, mask_interval=8))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("accuracy", 100 * (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(pqk.param_groups(self, lr=0.05, weight_decay=1e-4), momentum=0.9)


class Phase2(Phase1):
    """The same network, whose two branches learn from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = pqk.MutualDistillationLoss()

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss(*pqk.dual_forward(self.net, x), y)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        x, y = batch
        full_net = pqk.branch(self.net, "teacher")(x)
        self.log("accuracy_full_net", 100 * (full_net.argmax(1) == y).float().mean(), prog_bar=True)


def fit(module: Phase1, callback: L.Callback, epochs: int, folder: Path, resume: bool) -> str:
    """Train one phase; returns the last checkpoint's path."""
    # Not the best epoch's: in phase 1 the network becomes sparser to the end.
    checkpoints = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[callback, checkpoints], logger=False, accelerator="cpu", devices=1
    )
    loader = DataLoader(make_data(1024, seed=1), batch_size=32, shuffle=True)
    trainer.fit(module, loader, DataLoader(make_data(512, seed=2), 128), ckpt_path="last" if resume else None)
    return checkpoints.last_model_path


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description="both phases with PyTorch Lightning")
    parser.add_argument("--folder", type=Path, default=Path("lightning_loop"))
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    options = parser.parse_args(arguments)
    L.seed_everything(0)

    phase1 = fit(Phase1(), Phase1Callback(), 12, options.folder / "phase1", options.resume)
    module = Phase2.load_from_checkpoint(phase1)
    fit(module, Phase2Callback(distill_start=64), 6, options.folder / "phase2", options.resume)
    return pqk.convert(module.net)  # plain layers, with the sparse 4-bit weights


if __name__ == "__main__":
    print(main())
