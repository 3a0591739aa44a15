"""What each candidate is asked for, and the masks that those without pruning of their own get from torch.

A candidate's adapter is one file ``with_NAME.py`` with a subclass of :class:`Peer`. It calls the library as its
documentation says, and says in ``does`` what it does where candidates differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

BITS = 4
Quantizer = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


def weighted_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class Peer(ABC):
    """One library. Its methods change models in place where they can, and give the model to go on with."""

    package: ClassVar[str | None] = None
    """The distribution whose version is recorded besides torch's."""
    does: ClassVar[dict[str, str]]
    """In words: "quantizer", "masks" and "file"."""

    @abstractmethod
    def quantizer(self, weight: Tensor, mask: Tensor) -> tuple[Quantizer, list[Tensor]]:
        """A function that puts a weight ``[out, in]`` on a grid of 4 bits, and what it learns besides the weight.

        Candidates whose operation includes a mask take ``mask``; the others leave it.
        """

    @abstractmethod
    def _quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        """Let all convolutions and linear layers of a model compute with weights of 4 bits; ``x`` is a batch."""

    def quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        """Also of a model with masks, which stay."""
        return self._quantize(model, x)

    def learned(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are step sizes."""
        return []

    def add_masks(self, model: nn.Module, x: Tensor) -> nn.Module:
        """Masks of ones for all convolutions and linear layers."""
        for layer in weighted_layers(model):
            prune.identity(layer, "weight")
        return model

    def set_sparsity(self, model: nn.Module, sparsity: float) -> None:
        """New masks: the largest weights of all layers together stay."""
        layers = weighted_layers(model)
        set_global_masks([x.weight_orig for x in layers], [x.weight_mask for x in layers], sparsity)

    def objective(self, model: nn.Module) -> Objective:
        """Cross-entropy of a batch."""
        return lambda x, y: F.cross_entropy(model(x), y)

    @abstractmethod
    def export(self, model: nn.Module, x: Tensor, folder: Path) -> Path:
        """Write the documented export of a masked and quantized model into ``folder``; gives the file."""


class Requantized(Peer):
    """Peers that replace layers, or must see the masks first: masks are lifted and put on again."""

    masks_first: ClassVar[bool] = False
    """Whether the library wants a model that has its masks already."""

    def quantize(self, model: nn.Module, x: Tensor) -> nn.Module:
        masks = [getattr(layer, "weight_mask", None) for layer in weighted_layers(model)]
        if self.masks_first or masks[0] is None:
            return self._quantize(model, x)
        for layer in weighted_layers(model):
            prune.remove(layer, "weight")
        model = self._quantize(model, x)
        for layer, mask in zip(weighted_layers(model), masks, strict=True):
            prune.custom_from_mask(layer, "weight", mask)
        return model


@torch.no_grad()
def set_global_masks(weights: list[Tensor], masks: list[Tensor], sparsity: float) -> None:
    """The usual way: the magnitude of the last pruned weight, and what lies above it."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    pruned = int(sparsity * magnitudes.numel())
    threshold = magnitudes.kthvalue(pruned).values if pruned else -1.0
    for weight, mask in zip(weights, masks, strict=True):
        mask.copy_(weight.abs() > threshold)


def saved_state(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "state.pt")
    return folder / "state.pt"


class _Watch(TorchFunctionMode):
    """Notes the weight of every convolution and linear layer as it is when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.conv2d, F.linear):
            weight = args[1]
            self.weights.append(getattr(weight, "value", weight).detach())  # Brevitas has a class of its own
        return function(*args, **(kwargs or {}))


def used_weights(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What a model really computes with: ``pruned``, the share of weights that are zero, and ``levels``, the most
    different values that one output channel has."""
    training = model.training
    with torch.no_grad(), _Watch() as watch:
        model.eval()(x)
    model.train(training)
    zeros = sum(int((weight == 0).sum()) for weight in watch.weights)
    total = sum(weight.numel() for weight in watch.weights)
    levels = max(len(row.unique()) for weight in watch.weights for row in weight.flatten(1))
    return {"pruned": round(zeros / total, 4), "levels": levels, "weights": total}
