"""Sparse, low-bit PyTorch networks while they train: pruning, quantization and in-network distillation (PQK).

Kim, Chang, Kwak: "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation", Interspeech 2021.
"""

from pqk_fast.branches import branch, dual_forward
from pqk_fast.config import PQKConfig, Recipe
from pqk_fast.dual_batch_norm import DualBatchNorm
from pqk_fast.fusion import fuse, unfuse
from pqk_fast.layers import PQKConv1d, PQKConv2d, PQKLinear
from pqk_fast.losses import DistillationLoss, MutualDistillationLoss
from pqk_fast.masks import Pruner
from pqk_fast.prepare import convert, param_groups, prepare, start_phase2
from pqk_fast.recipe_files import load_recipe
from pqk_fast.settings import ConfigError

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DistillationLoss",
    "DualBatchNorm",
    "MutualDistillationLoss",
    "PQKConfig",
    "PQKConv1d",
    "PQKConv2d",
    "PQKLinear",
    "Pruner",
    "Recipe",
    "branch",
    "convert",
    "dual_forward",
    "fuse",
    "load_recipe",
    "param_groups",
    "prepare",
    "start_phase2",
    "unfuse",
]
