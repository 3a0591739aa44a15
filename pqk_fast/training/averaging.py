"""The mean of a stage's last weights, and BatchNorm statistics that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCHES = 64  # for the statistics


class WeightAverage:
    """The mean over steps of what learns in ``model``, latent weights and step sizes alike (stochastic weight
    averaging; Izmailov et al., UAI 2018)."""

    def __init__(self, model: nn.Module) -> None:
        self._learning: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._means: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        """One more step's weights."""
        self._count += 1
        if self._means:
            torch._foreach_lerp_(self._means, self._learning, 1 / self._count)
        else:
            self._means = [parameter.detach().clone() for parameter in self._learning]

    @torch.no_grad()
    def give(self) -> None:
        """Let the model have the mean; nothing where no step was added."""
        for parameter, mean in zip(self._learning, self._means, strict=bool(self._means)):
            parameter.copy_(mean)

    @contextmanager
    def given(self) -> Iterator[None]:
        """The model has the mean within, afterwards what it had."""
        own = [parameter.detach().clone() for parameter in self._learning]
        self.give()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._learning, own, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "means": [mean.clone() for mean in self._means]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, own = state["count"], self._learning
        self._means = [mean.to(parameter.device) for mean, parameter in zip(state["means"], own, strict=False)]


@torch.no_grad()
def estimate_batch_norm(objective: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Running statistics of the weights as they are: means over ``batches``, in the branches that ``objective`` runs.

    Those of branches that it does not run, and of modules in evaluation mode, stay.
    """
    norms = [module for module in objective.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [count for norm in norms for name, count in norm.named_buffers() if name.endswith("num_batches_tracked")]
    before = [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = None  # a plain mean: the first batch takes the place of what was there
    for count in counts:
        count.zero_()
    try:
        for x, y in batches:
            objective(x, y)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)
