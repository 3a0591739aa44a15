"""A small run for the trainer's tests: a recipe, a network with BatchNorm, three Gaussian blobs."""

import torch
from torch import nn

from pqk_fast import PQKConfig
from pqk_fast.config import DataConfig, FinetuneConfig, Phase2Config, PhaseConfig, Recipe


def recipe(**changes):
    options = {
        "name": "small",
        "model": "none",
        "data": DataConfig(classes=3, batch_size=32),
        "pqk": PQKConfig(bits=4, sparsity=0.7, mask_interval=8, scope="layer"),
        "phase1": PhaseConfig(steps=120, epoch_steps=20, lr_drops=(90,), weight_decay=1e-4),
        "phase2": Phase2Config(steps=60, epoch_steps=20, lr_drops=(40,), distill_start=20),
        "finetune": FinetuneConfig(lr=0.1),
    }
    return Recipe(**(options | changes))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def batches(seed=0, count=6, size=32):
    """Three Gaussian blobs."""
    centres = 1.5 * torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count, size), generator=generator)
    return [(centres[y] + torch.randn(size, 8, generator=generator), y) for y in labels]
