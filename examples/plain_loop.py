"""A training loop of your own: both phases, validation, checkpoints, and the plain student at the end.

python examples/plain_loop.py              # takes seconds; stop it when you like, and
python examples/plain_loop.py --resume     # it goes on with the epoch that it was in, to the very same network
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pqk_fast as pqk

EPOCHS = {1: 12, 2: 6}  # of each phase
WARM_UP = 2  # epochs of phase 2 before the branches distil into each other
CONFIG = pqk.PQKConfig(bits=4, sparsity=0.8, mask_interval=8)


def make_net() -> nn.Sequential:
    conv1, conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    features = (conv1, nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), conv2, nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4))


def make_data(samples: int, seed: int) -> TensorDataset:
    """Four patterns of 8 x 8 under noise. Your data goes here."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (samples,), generator=draw)
    return TensorDataset(patterns[labels] + 2 * torch.randn(samples, 1, 8, 8, generator=draw), labels)


def accuracy(model: nn.Module, data: DataLoader[Any], branch: str = "student") -> float:
    """Percent; ``branch`` "teacher" is phase 2's full net."""
    model.eval()
    with torch.no_grad():
        right = [(pqk.branch(model, branch)(x).argmax(1) == y).float() for x, y in data]
    model.train()
    return 100 * float(torch.cat(right).mean())


def train(phase: int, model: nn.Module, file: Path, saved: dict[str, Any] | None) -> None:
    """One phase, from its beginning or after the epoch that ``saved`` holds."""
    shuffle = torch.Generator()
    loader = DataLoader(make_data(1024, seed=1), batch_size=32, shuffle=True, generator=shuffle)
    validation = DataLoader(make_data(512, seed=2), batch_size=128)

    pruner = None
    if phase == 1:  # the Pruner makes masks at once: before saved ones are loaded
        pruner = pqk.Pruner(model, steps=EPOCHS[1] * len(loader), epoch_steps=len(loader))
    if saved:
        model.load_state_dict(saved["model"])  # masks, step sizes and the phase are in it
    elif phase == 2:
        pqk.start_phase2(model)
    # made anew for phase 2, where other parameters learn
    optimizer = torch.optim.SGD(pqk.param_groups(model, lr=0.05, weight_decay=1e-4), momentum=0.9)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        if pruner:
            pruner.load_state_dict(saved["pruner"])

    distill = pqk.MutualDistillationLoss()
    for epoch in range(saved["epoch"] if saved else 0, EPOCHS[phase]):
        shuffle.manual_seed(100 * phase + epoch)  # so that a resumed run sees the same batches
        distill.set_weights(*((1, 0) if epoch < WARM_UP else (0.5, 0.5)))
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) if phase == 1 else distill(*pqk.dual_forward(model, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if pruner:
                pruner.step()
        line = f"phase {phase}  epoch {epoch + 1:2}  student {accuracy(model, validation):5.1f} %"
        if pruner:
            print(f"{line}  sparse {100 * pruner.sparsity():.1f} %")
        else:
            print(f"{line}  full net {accuracy(model, validation, 'teacher'):5.1f} %")
        state = {"phase": phase, "epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        unfinished = file.with_name(f"{file.name}.tmp")  # or a stop within the save would lose the one there is
        torch.save({**state, "pruner": pruner.state_dict() if pruner else None}, unfinished)
        unfinished.replace(file)


def main(arguments: list[str] | None = None) -> nn.Sequential:
    parser = argparse.ArgumentParser(description="both phases in a plain training loop")
    parser.add_argument("--checkpoint", type=Path, default=Path("plain_loop.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args(arguments)
    saved = torch.load(options.checkpoint, weights_only=True) if options.resume else None

    torch.manual_seed(0)
    model = pqk.prepare(make_net(), CONFIG)
    if not saved or saved["phase"] == 1:
        train(1, model, options.checkpoint, saved)
        saved = None
    train(2, model, options.checkpoint, saved)

    student = pqk.convert(model)  # plain layers, with the sparse 4-bit weights
    weights = [layer.weight for layer in student if isinstance(layer, nn.Conv2d | nn.Linear)]
    kept, total = sum(int((w != 0).sum()) for w in weights), sum(w.numel() for w in weights)
    print(f"the student keeps {kept} of {total} weights, in at most {max(w.unique().numel() for w in weights)} values")
    return student


if __name__ == "__main__":
    main()
