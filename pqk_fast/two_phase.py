"""What prepared modules have in common: a phase, a branch, and how they take a float module's place."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def take_over(new: Any, old: nn.Module) -> None:
    """Make ``new`` stand for ``old``: the same parameters, buffers, hooks and attributes, in tables of its own.

    Hooks stay in the same tables, so that handles to them keep working.
    """
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__ = {name: value.copy() if name in tables else value for name, value in old.__dict__.items()}


def plain_copy(source: nn.Module, kind: type[nn.Module], tensors: dict[str, Tensor | None]) -> nn.Module:
    """A ``kind`` with ``source``'s settings and copies of ``tensors``; weight and bias keep their ``requires_grad``."""
    module = kind.__new__(kind)
    module.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in source.__dict__.items()
        if name not in ("phase", "branch", "branch_held", "config", "ran", "fused", "fed")
    }
    module._parameters, module._buffers = {}, {}
    for name, value in tensors.items():
        if name not in ("weight", "bias"):
            module._buffers[name] = None if value is None else value.clone()
        elif value is None:
            module._parameters[name] = None
        else:
            module._parameters[name] = nn.Parameter(value.clone(), getattr(source, name).requires_grad)
    return module


class TwoPhase(nn.Module):
    """A module that knows the phase and the branch. The phase travels in the state dict as ``pqk_phase`` (uint8 [])."""

    phase: int
    branch: str
    branch_held: int  # how many `with branch(...)` are open around the module
    pqk_phase: Tensor

    def _start(self) -> None:
        self.branch, self.branch_held = "student", 0
        own = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        self.register_buffer("pqk_phase", torch.ones((), dtype=torch.uint8, device=own.device))
        self.set_phase(1)

    def set_phase(self, phase: int) -> None:
        """1 or 2; what learns in it is the subclass's to say."""
        self.phase = phase
        self.pqk_phase.fill_(phase)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}pqk_phase" in state_dict and not self.pqk_phase.is_meta:
            self.set_phase(int(self.pqk_phase))
