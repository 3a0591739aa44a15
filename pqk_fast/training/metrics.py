"""What is measured of a network while it trains: accuracy, its layers, and where a NaN comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pqk_fast.branches import pqk_layers
from pqk_fast.reference import levels, scaled
from pqk_fast.training.ranks import Ranks
from pqk_fast.training.stream import Batches

Forward = Callable[[Tensor], Tensor]


def layer_statistics(model: nn.Module) -> list[dict[str, Any]]:
    """For each PQK layer: name, shape, weights, kept, step size (mean over channels), clipped fraction of kept ones.

    Layers that share one weight appear once, by the first's name.
    """
    rows = []
    seen: set[int] = set()
    with torch.no_grad():
        for name, layer in pqk_layers(model).items():
            if id(layer.weight) in seen:
                continue
            seen.add(id(layer.weight))
            kept = int(layer.weight_mask.sum())
            outside = scaled(layer.weight, layer.weight_mask, layer.weight_step).abs() > levels(layer.bits)
            rows.append(
                {
                    "name": name,
                    "shape": list(layer.weight.shape),
                    "weights": layer.weight.numel(),
                    "kept": kept,
                    "step_size": float(layer.weight_step.mean()),
                    "clipped_fraction": int(outside.sum()) / kept if kept else 0.0,
                }
            )
    return rows


def accuracy(model: nn.Module, batches: Batches, forward: Forward | None = None, ranks: Ranks | None = None) -> float:
    """Percent of samples whose largest logit is the label's; ``model`` is in evaluation mode for it.

    ``forward`` defaults to the model itself. With ``ranks``, every rank gives batches of its own and all get the
    percentage of all. Raises ValueError if ``batches`` is empty (on every rank).
    """
    counts = torch.zeros(2, dtype=torch.long, device=next(model.parameters()).device)  # right, wrong
    for logits, y in evaluated(model, batches, forward):
        right = (logits.argmax(-1) == y).sum()
        counts += torch.stack([right, y.numel() - right])
    right, wrong = _some(counts if ranks is None else ranks.sum(counts)).tolist()
    return 100.0 * right / (right + wrong)


def confusion(
    model: nn.Module, batches: Batches, classes: int, forward: Forward | None = None, ranks: Ranks | None = None
) -> Tensor:
    """How often each label (row) was taken for each class (column): int64 ``[classes, classes]``, on the CPU.

    Arguments and errors as for :func:`accuracy`, which is the part on the diagonal.
    """
    counts = torch.zeros(classes * classes, dtype=torch.long, device=next(model.parameters()).device)
    for logits, y in evaluated(model, batches, forward):
        counts += torch.bincount(y * classes + logits.argmax(-1), minlength=classes * classes)
    return _some(counts if ranks is None else ranks.sum(counts)).reshape(classes, classes).cpu()


def evaluated(model: nn.Module, batches: Batches, forward: Forward | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of every batch, in evaluation mode, without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        model.eval()
        for x, y in batches:
            with torch.no_grad():
                logits = (forward or model)(x.to(device))
            yield logits, y.to(device)
    finally:
        for module, training in modes:
            module.training = training


def _some(counts: Tensor) -> Tensor:
    if not int(counts.sum()):
        raise ValueError("nothing to evaluate: the batches are empty")
    return counts


def first_nonfinite(model: nn.Module, x: Tensor, forwards: Iterable[Forward]) -> str:
    """Where NaN or infinity enters: a weight, the input, or the first module whose output holds one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name!r} is not finite"
    if not torch.isfinite(x).all():
        return "the input batch is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            for forward in forwards:
                forward(x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"layer {found[0]!r} gives the first output that is not finite"
    return "weights, input and all outputs of layers are finite"
