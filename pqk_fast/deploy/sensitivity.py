"""Which layers mind being pruned or quantized further, one at a time, and the bits for a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast import ops
from pqk_fast.branches import require_prepared
from pqk_fast.deploy.encodings import smallest
from pqk_fast.deploy.integers import integers_of
from pqk_fast.layers import PQKLayer
from pqk_fast.settings import check_bits, check_sparsity
from pqk_fast.step_size import initial_step
from pqk_fast.training.metrics import evaluated

Batches = Iterable[tuple[Tensor, Tensor]]
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Row:
    """A student with one layer changed: ``change`` is "bits", "sparsity" or "as it is", ``value`` what to.

    ``bytes`` is that layer's payload in a packed file; ``loss`` (cross-entropy) and ``accuracy`` (percent) are the
    whole student's. The row of the student as it is has ``layer`` "" and the payload of all layers.
    """

    layer: str
    change: str
    value: float
    bytes: int
    loss: float
    accuracy: float


def sensitivity(
    model: nn.Module, batches: Batches, bits: Sequence[int] = (2, 3, 4, 5, 6, 7), sparsities: Sequence[float] = ()
) -> Iterator[Row]:
    """The student of a prepared model as it is, then with one layer after the other changed, each as it is measured.

    With fewer bits a layer's quantized weights are quantized anew, at the step size of least squared error (not the
    latent ones, which may lie far outside the grid); its own bits stand beside them. Pruned further it keeps the
    largest of the latent weights that it has kept, and its step size. Nothing is trained; the model is as it was after
    every row. More bits than a layer has, and sparsities that it has already, are left out.

    Args:
        model: a prepared model; its student is measured, in evaluation mode.
        batches: ``(x, y)``, gone through once for every row: the validation split.

    Raises ValueError for an unprepared model, other bits than 2..8, sparsities outside [0, 1), empty batches.
    """
    layers = require_prepared(model)
    for number in bits:
        check_bits(number)
    for part in sparsities:
        check_sparsity(part)
    loss, accuracy = _measured(model, batches)
    yield Row("", AS_IT_IS, 0, sum(payload(name, layer) for name, layer in layers.items()), loss, accuracy)
    for name, layer in layers.items():
        for number in sorted(bits):
            if number >= layer.bits:
                continue
            with _changed(layer):
                _requantize(layer, number)
                yield Row(name, "bits", number, payload(name, layer), *_measured(model, batches))
        yield Row(name, "bits", layer.bits, payload(name, layer), loss, accuracy)
        for part in sparsities:
            if part <= 1 - float(layer.weight_mask.float().mean()):
                continue
            with _changed(layer):
                # Pruned weights may be larger than kept ones: the full net learns them.
                kept = torch.where(layer.weight_mask, layer.weight.detach(), 0)
                layer.weight_mask.logical_and_(ops.topk_mask([kept], part)[0])
                yield Row(name, "sparsity", part, payload(name, layer), *_measured(model, batches))


def payload(name: str, layer: PQKLayer) -> int:
    """Bytes of a layer's weights in a packed file, without the step size."""
    return len(smallest(integers_of(name, layer)[0].reshape(-1), layer.bits)[1])


def least_bytes(rows: Iterable[Row]) -> int:
    """What the layers take together, each with the bits of the fewest bytes."""
    return sum(min(row.bytes for row in choices) for choices in _choices(rows).values())


def choose_bits(rows: Iterable[Row], budget: int) -> dict[str, int]:
    """Bits for every layer whose payloads together take at most ``budget`` bytes, with the least sum of losses.

    The sum of what each layer loses alone stands for what all lose together: a first guess, to be trained. Exact for
    that sum: combinations of layers that another beats in bytes and loss are dropped as soon as they appear. Raises
    ValueError if even the fewest bytes are too many.
    """
    best: list[tuple[int, float, dict[str, int]]] = [(0, 0.0, {})]
    for layer, choices in _choices(rows).items():
        grown = [
            (size + row.bytes, loss + row.loss, {**chosen, layer: int(row.value)})
            for size, loss, chosen in best
            for row in choices
        ]
        best = []
        for candidate in sorted(grown, key=lambda one: one[:2]):
            if not best or candidate[1] < best[-1][1]:
                best.append(candidate)
    within = [candidate for candidate in best if candidate[0] <= budget]
    if not within:
        raise ValueError(f"the layers take at least {best[0][0]} bytes with the bits that were tried, got {budget}")
    return within[-1][2]


def _choices(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of other bits, by layer."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.change == "bits":
            found.setdefault(row.layer, []).append(row)
    return found


@torch.no_grad()
def _requantize(layer: PQKLayer, bits: int) -> None:
    layer.weight.data = layer.student_weight(layer.weight.dtype)
    layer.bits = bits
    step = initial_step(layer.weight, layer.weight_mask, bits, "mse", layer.config.per_channel)
    layer.weight_step.data.copy_(step)


@contextmanager
def _changed(layer: PQKLayer) -> Iterator[None]:
    """Gives the layer back as it was."""
    bits, weight = layer.bits, layer.weight.data
    step, mask = layer.weight_step.detach().clone(), layer.weight_mask.clone()
    try:
        yield
    finally:
        layer.bits, layer.weight.data = bits, weight
        layer.weight_step.data.copy_(step)
        layer.weight_mask.copy_(mask)


def _measured(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy, and percent of samples whose largest logit is the label's."""
    loss, right, count = 0.0, 0, 0
    for logits, labels in evaluated(model, batches):
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    if not count:
        raise ValueError("nothing to evaluate: the batches are empty")
    return loss / count, 100 * right / count
