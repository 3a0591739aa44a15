"""Signs that a prepared model has gone bad, named before they cost a run: dead layers, runaway steps, foreign masks.

For once an epoch or after loading, not for every step: each function makes the host wait for each device a few times.
With weights in shards (``fully_shard``) they gather one layer at a time: call them on all ranks together; all get the
same answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pqk_fast import ops
from pqk_fast.branches import pqk_layers, require_prepared
from pqk_fast.dual_batch_norm import DualBatchNorm
from pqk_fast.layers import PQKLayer
from pqk_fast.reference import levels, scaled
from pqk_fast.settings import is_quantized
from pqk_fast.sharding import whole

Key = TypeVar("Key", bound=Hashable)

# Mean of the kept weights' magnitudes over the grid's end Q S. In phase 1 of res8-narrow and a small MLP it stayed
# below 2.5 with SGD at 0.1, below 5.5 at 0.5, and with 2 bits and 99 % sparsity, below 7.6 with Adam in a run that
# learned. Where latent weights ran away it was 8.5 to 10^5. The clipped share says less: it nears 100 % in good runs.
RUNAWAY = 8.0
# Agreement of a mask with its weight, see check_masks.
AGREEMENT = 0.1
LEAST_KEPT = 128
LARGEST_SHARE = {"global": 1 / 3, "layer": 1 / 3, "group": 1 / 2}

_DIVERGED = "training has diverged: go back to the last good checkpoint and lower"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a layer.

    Attributes:
        layer: the module's name ("" for the model itself).
        kind: "weight", "step", "statistics" (not finite, or not positive), "phase", "twins" (layers that share a weight
            and nothing else), "dead" (all pruned), "empty" (all kept weights quantized to zero), "runaway" (weights far
            outside the grid).
        message: what is wrong and what to do, with the layer's name.
        fatal: True for what training does not mend by itself; False ("dead", "empty", "runaway") for what costs
            accuracy and may pass.
    """

    layer: str
    kind: str
    message: str
    fatal: bool

    def __str__(self) -> str:
        return self.message


@torch.no_grad()
def find_problems(model: nn.Module) -> list[Problem]:
    """All that is wrong with a prepared model, in either phase; an empty list for a healthy one.

    Looks at each layer's mask, step size and weight, all other parameters, BatchNorm's statistics (both branches'), and
    what must be the same in several layers. Layers that share a weight appear once, by the first's name. Raises
    ValueError for a model without PQK layers.
    """
    layers = _unique(require_prepared(model))
    found = [*_phases(model), *_twins(model), *_not_finite(model)]
    bad = {(problem.layer, problem.kind) for problem in found}
    for name, (kept, largest, mean, low, high) in _read({n: _facts(x) for n, x in layers.items()}).items():
        layer = layers[name]
        if not 0 < low <= high < torch.inf:
            found.append(_step_problem(name, low, high))
        elif (name, "weight") not in bad and layer.weight.numel():
            found += _grid_problems(name, layer, kept, largest, mean, high)
    return found


def _unique(layers: Mapping[str, PQKLayer]) -> dict[str, PQKLayer]:
    unique: dict[int, tuple[str, PQKLayer]] = {}
    for name, layer in layers.items():
        unique.setdefault(id(layer.weight), (name, layer))
    return dict(unique.values())


def _read(facts: Mapping[Key, list[Tensor]]) -> dict[Key, list[float]]:
    """The numbers (tensors of one element, any dtype) on the host, by one transfer from each device."""
    devices: dict[torch.device, list[Key]] = {}
    for key, values in facts.items():
        devices.setdefault(values[0].device, []).append(key)
    out: dict[Key, list[float]] = {}
    for keys in devices.values():
        numbers = iter(torch.stack([value.float().reshape(()) for key in keys for value in facts[key]]).tolist())
        out |= {key: [next(numbers) for _ in facts[key]] for key in keys}
    return {key: out[key] for key in facts}


def _facts(layer: PQKLayer) -> list[Tensor]:
    """How many weights are kept; the largest and the mean magnitude among them in steps; smallest and largest step."""
    weight, step, mask = whole(layer.weight), whole(layer.weight_step), layer.weight_mask
    kept = mask.sum()
    if not weight.numel():
        one = torch.ones_like(kept)
        return [kept, one, one, one, one]
    steps = scaled(weight, mask, step).abs()
    return [kept, steps.max(), steps.sum() / kept.clamp_min(1), step.min(), step.max()]


def _step_problem(name: str, low: float, high: float) -> Problem:
    return Problem(
        name,
        "step",
        f"the step size of layer {name!r} is {low:g} to {high:g}, no positive number: {_DIVERGED} the rate of the step "
        "sizes (step_lr in param_groups)",
        True,
    )


def _grid_problems(name: str, layer: PQKLayer, kept: float, largest: float, mean: float, step: float) -> list[Problem]:
    end = levels(layer.bits)
    if not kept:
        what = "the mask prunes every weight, so nothing but the bias is left"
        remedy = "give the layer a sparsity of its own with PQKConfig.layer_sparsity, or prune less"
        kind = "dead"
    elif not is_quantized(layer.bits):
        return []
    elif largest <= 0.5:
        what = f"every kept weight is quantized to zero: the step size, {step:g}, is over twice the largest of them"
        remedy = "lower the rate of the step sizes (step_lr in param_groups), or the weight decay"
        kind = "empty"
    elif mean > RUNAWAY * end:
        what = (
            f"kept weights are on average {mean / end:.3g} times as large as the largest value of the {layer.bits}-bit "
            f"grid ({end} steps of {step:g}), which cannot follow them"
        )
        remedy = (
            "use PQKConfig(ste='clipped'), so that weights outside the grid do not grow further, a higher rate of the "
            "step sizes (step_lr in param_groups), or a lower learning rate"
        )
        kind = "runaway"
    else:
        return []
    return [Problem(name, kind, f"layer {name!r}: {what}; {remedy}", False)]


def _not_finite(model: nn.Module) -> Iterator[Problem]:
    """Parameters, and BatchNorm's statistics, with NaN or infinity (for variances also: below zero)."""
    facts: dict[tuple[str, str], list[Tensor]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            statistics = isinstance(module, _NormBase) and own.endswith(("running_mean", "running_var"))
            if statistics or (own in module._parameters and own != "weight_step"):
                seen.add(id(tensor))
                values = whole(tensor)
                good = values.isfinite() & (values >= 0) if own.endswith("running_var") else values.isfinite()
                facts[name, own] = [good.all()]
    for (name, own), (fine,) in _read(facts).items():
        if fine:
            continue
        full = f"{name}.{own}".lstrip(".")
        if own.endswith(("running_mean", "running_var")):
            net = "the full net's BatchNorm statistics" if own.startswith("teacher_") else "BatchNorm statistics"
            text = f"{net} {full!r} hold NaN, infinity or a negative variance: {_DIVERGED} the learning rate"
            yield Problem(name, "statistics", text, True)
        else:
            text = f"parameter {full!r} holds NaN or infinity: {_DIVERGED} the learning rate"
            yield Problem(name, "weight", text, True)


def _phases(model: nn.Module) -> Iterator[Problem]:
    """Modules in phase 1 beside others in phase 2. A BatchNorm without parameters does the same in both."""
    phases = {
        name: module.phase
        for name, module in model.named_modules()
        if isinstance(module, PQKLayer) or (isinstance(module, DualBatchNorm) and module.weight is not None)
    }
    behind = [name for name, phase in phases.items() if phase == 1]
    if 0 < len(behind) < len(phases):
        ahead = next(name for name, phase in phases.items() if phase == 2)
        text = (
            f"{', '.join(map(repr, behind))} in phase 1, {ahead!r} in phase 2: a part of a state dict was loaded "
            "(strict=False), or of a float one; load a whole one"
        )
        yield Problem(behind[0], "phase", text, True)


def _twins(model: nn.Module) -> Iterator[Problem]:
    """Layers of one weight must have one mask and one step size; load_state_dict(assign=True) tears them apart."""
    first: dict[tuple[int, torch.Size], tuple[str, PQKLayer]] = {}
    facts: dict[tuple[str, str], list[Tensor]] = {}
    for name, layer in pqk_layers(model).items():
        weight = layer.weight
        where = id(weight) if weight.is_meta or hasattr(weight, "to_local") else weight.data_ptr()
        twin_name, twin = first.setdefault((where, weight.shape), (name, layer))
        if twin is layer or not weight.numel():
            continue
        if twin.weight is not weight:
            text = (
                f"layers {twin_name!r} and {name!r} hold one weight as two parameters, which an optimizer moves twice: "
                "load the state dict without assign=True, or tie weight, weight_mask and weight_step again"
            )
            yield Problem(name, "twins", text, True)
            continue
        steps = (whole(layer.weight_step) == whole(twin.weight_step)).all()
        facts[twin_name, name] = [(layer.weight_mask == twin.weight_mask).all(), steps]
    for (twin_name, name), same_values in _read(facts).items():
        differing = [what for what, same in zip(("weight_mask", "weight_step"), same_values, strict=True) if not same]
        if differing:
            text = (
                f"layers {twin_name!r} and {name!r} share a weight but not {' and '.join(differing)}: copy the first's "
                "to the second, or load a state dict of this model"
            )
            yield Problem(name, "twins", text, True)


@torch.no_grad()
def check_masks(model: nn.Module, fresh: bool | None = None) -> None:
    """After loading in phase 1: ValueError, naming the layers, if masks were not made from these weights.

    A mask is compared with the one that keeps equally many weights of its layer, the largest (in every group of inputs,
    with N:M sparsity), by the correlation phi of the two: 1 if they are the same, 0 +- 1/sqrt(N) for a mask that has
    nothing to do with the weight. Below 0.1 it is refused. Masks of the training itself are at most some dozens of
    steps old. In res8-narrow, 4 and 2 bits, SGD at rates up to 1.0 and Adam at 0.03, the smallest phi before an
    update was 0.33 (0.52 but for one run whose latent weights ran away) among layers that keep up to a third of at
    least 128 weights; chance moves such a phi by at most 0.07. Others are not looked at, since weights near zero do
    change places fast: phi falls to 0.01 where few weights are pruned. In phase 2, and for masks that keep all, there
    is nothing to compare.

    Args:
        model: a prepared model.
        fresh: whether the masks still follow the weights. False makes this do nothing: once a mask is frozen
            (``PQKConfig.mask_end``), pruned weights may outgrow kept ones. By default ``mask_end == 1``; give
            ``not pruner.finished`` where it is less.
    """
    layers = {
        name: layer
        for name, layer in _unique(require_prepared(model)).items()
        if layer.phase == 1 and (layer.config.mask_end == 1 if fresh is None else fresh)
    }
    counts = {name: int(kept) for name, (kept,) in _read({n: [x.weight_mask.sum()] for n, x in layers.items()}).items()}
    telling = {
        name: layer
        for name, layer in layers.items()
        if LEAST_KEPT <= counts[name] <= LARGEST_SHARE[layer.config.scope] * layer.weight.numel()
    }
    wrong = []
    for name, (shared,) in _read({n: [_shared(x, counts[n])] for n, x in telling.items()}).items():
        kept, total = counts[name], telling[name].weight.numel()
        if (total * shared - kept**2) / (kept * (total - kept)) < AGREEMENT:
            chance = kept / total
            wrong.append(f"{name!r} ({shared / kept:.0%} of those kept are among the largest, by chance {chance:.0%})")
    if wrong:
        raise ValueError(
            f"the mask does not belong to the weight of layer {', '.join(wrong)}: load weights and masks of one "
            "checkpoint, or begin phase 1 anew from these weights with a new Pruner, which makes the masks"
        )


def _shared(layer: PQKLayer, kept: int) -> Tensor:
    """How many of the kept weights would be kept by a mask made now."""
    weight = whole(layer.weight).nan_to_num(0.0, 0.0, 0.0)  # find_problems names those
    now = torch.empty_like(layer.weight_mask)
    if layer.config.scope == "group":
        size = layer.config.group_size
        ops.group_mask_(now, weight, round(kept / weight.numel() * size), size)
    else:
        ops.topk_mask_([now], [weight], kept)
    return (now & layer.weight_mask).sum()
