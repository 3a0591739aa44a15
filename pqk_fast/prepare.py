"""Swap modules in and out of a model: prepare, start_phase2, convert; and the optimizer's parameter groups."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from pqk_fast.branches import require_prepared
from pqk_fast.config import ConfigError, PQKConfig, check_choice, matches, nearest
from pqk_fast.layers import PQK_LAYERS, DualBatchNorm, PQKLayer

Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool]

_LAYER_OF: dict[type, type[PQKLayer]] = {layer.float_type: layer for layer in PQK_LAYERS}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _replace(model: nn.Module, old_to_new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put the new modules wherever the old ones are registered (a shared module: at every place)."""
    for module in list(model.modules()):
        # named_children would list a module once even if its parent holds it under two names
        for name, child in module._modules.items():
            if child is not None and child in old_to_new:
                module._modules[name] = old_to_new[child]
    return old_to_new.get(model, model)


def _share_with_twin(layer: PQKLayer, twins: dict[torch.Tensor, PQKLayer]) -> None:
    """Layers that share one weight share its mask and step size too."""
    twin = twins.setdefault(layer.weight, layer)
    layer.weight_step = twin.weight_step
    layer._buffers["weight_mask"] = twin.weight_mask


def _check_patterns(config: PQKConfig, names: list[str]) -> None:
    for pattern in (*config.exclude, *config.layer_sparsity):
        if not any(matches(name, pattern) for name in names):
            hint = "" if pattern.startswith("re:") else nearest(pattern, names)
            raise ConfigError(f"pattern {pattern!r} matches no module of the model{hint}")


def prepare(model: Model, config: PQKConfig | None = None, filter_fn: FilterFn | None = None) -> Model:
    """Swap the Linear, Conv1d, Conv2d and BatchNorm layers of ``model`` for their PQK forms, in place.

    Parameters stay the same objects (so an optimizer made before keeps working on them) under the same names;
    ``weight_mask`` and ``weight_step`` join them. Shared modules and shared weights stay shared. Load a float
    checkpoint before this call: step sizes are set from the weights.

    Args:
        model: any nn.Module. If it is itself a layer to swap, the new layer is returned.
        config: see :class:`PQKConfig`; its ``exclude`` leaves modules as they are.
        filter_fn: ``filter_fn(module, name) -> bool``, False leaves a Linear or convolution as it is.

    Returns:
        The model.

    Raises:
        ValueError: nothing to prepare, prepared already, a pattern that matches nothing, SyncBatchNorm.
        TypeError: a weight computed from other parameters (weight_norm).
    """
    config = config or PQKConfig()
    if any(isinstance(module, PQKLayer) for module in model.modules()):
        raise ValueError("the model is prepared already; convert(model) gives a plain one")
    named = dict(model.named_modules())
    _check_patterns(config, list(named))
    swapped: dict[nn.Module, nn.Module] = {}
    left_float: list[str] = []
    twins: dict[torch.Tensor, PQKLayer] = {}
    for name, module in named.items():
        excluded = any(matches(name, pattern) for pattern in config.exclude)
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name} is a SyncBatchNorm: its statistics cannot be split; prepare before converting to it"
            )
        if type(module) in _BATCH_NORMS:
            swapped[module] = DualBatchNorm.from_float(module)
        elif isinstance(module, tuple(_LAYER_OF)) and not excluded and (filter_fn is None or filter_fn(module, name)):
            kind = _LAYER_OF.get(type(module))
            if kind is None:
                left_float.append(f"{name} ({type(module).__name__})")
                continue
            layer = kind.from_float(module, config)
            _share_with_twin(layer, twins)
            swapped[module] = layer
    if not twins:
        raise ValueError(
            f"nothing to prepare in {type(model).__name__}: expected at least one nn.Linear, nn.Conv1d or nn.Conv2d "
            f"that neither exclude nor filter_fn leaves out; its modules are "
            f"{', '.join(sorted({type(m).__name__ for m in named.values()}))}"
        )
    if left_float:
        warnings.warn(
            "left in floating point, as subclasses with code of their own: " + ", ".join(left_float), stacklevel=2
        )
    prepared = _replace(model, swapped)
    _set_fast_paths(prepared, allowed=False)
    prepared.pqk_config = config  # type: ignore[assignment]
    return prepared  # type: ignore[return-value]


def _set_fast_paths(model: nn.Module, allowed: bool) -> None:
    """TransformerEncoderLayer's evaluation fast path reads ``linear1.weight`` itself, past a swapped layer's forward.

    The layer's own switch for it is ``activation_relu_or_gelu``: 0 sends it the ordinary way.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        if allowed:
            module.activation_relu_or_gelu = module.__dict__.pop("fast_path_activation", module.activation_relu_or_gelu)
        elif any(isinstance(child, PQKLayer) for child in module.children()):
            switch: Any = module
            switch.fast_path_activation = switch.activation_relu_or_gelu
            switch.activation_relu_or_gelu = 0


def start_phase2(model: Model) -> Model:
    """Freeze masks and step sizes, start the full net's BatchNorm, and let both branches learn. In place.

    Make a new optimizer afterwards (``param_groups``): the full net's BatchNorm parameters learn from now on, the step
    sizes no longer. Raises ValueError for an unprepared model, one already in phase 2, or masks that prune nothing.
    """
    layers = require_prepared(model)
    if any(layer.phase == 2 for layer in layers.values()):
        raise ValueError("the model is in phase 2 already")
    if all(bool(layer.weight_mask.all()) for layer in layers.values()):
        raise ValueError(
            "no weight is pruned, so the full net has nothing of its own to learn: "
            "run phase 1 with a Pruner first, or load its checkpoint"
        )
    for layer in layers.values():
        layer.phase = 2
        layer.weight_step.requires_grad_(False)
    config = getattr(model, "pqk_config", None)
    how = config.teacher_bn if isinstance(config, PQKConfig) else "fresh"
    for module in model.modules():
        if isinstance(module, DualBatchNorm):
            module.start_teacher(how)
    model.stacked_is_right = None  # type: ignore[assignment]
    return model


@torch.no_grad()
def convert(model: Model, branch: str = "student") -> Model:
    """A plain copy of one branch: float layers with that branch's weights, its BatchNorm. ``model`` is untouched.

    ``branch`` is "student" (masked, quantized weights) or "teacher" (the full net).
    """
    require_prepared(model)
    check_choice("branch", branch, ("student", "teacher"))
    plain = copy.deepcopy(model)
    for name in ("pqk_config", "stacked_is_right"):
        plain.__dict__.pop(name, None)
    swapped: dict[nn.Module, nn.Module] = {}
    floats: dict[torch.Tensor, nn.Parameter] = {}
    for module in plain.modules():
        if isinstance(module, PQKLayer):
            layer: Any = module.to_float(branch)
            layer.weight = floats.setdefault(module.weight, layer.weight)
            swapped[module] = layer
        elif isinstance(module, DualBatchNorm):
            swapped[module] = module.to_float(branch)
    plain = _replace(plain, swapped)  # type: ignore[assignment]
    _set_fast_paths(plain, allowed=True)
    return plain


def param_groups(
    model: nn.Module, lr: float, step_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two groups for any torch optimizer: the weights, and the step sizes at their own rate without weight decay.

    ``step_lr`` defaults to ``1e-4 * lr`` (Eq. 7). Parameters that do not learn now (frozen steps, the full net's
    BatchNorm in phase 1) are left out, so make the optimizer anew after :func:`start_phase2`. The groups carry a
    ``"lr_scale"`` (1, and ``step_lr / lr``) for schedules that set ``group["lr"]`` themselves.
    """
    layers = require_prepared(model)
    steps = {layer.weight_step for layer in layers.values()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = 1e-4 if step_lr is None else step_lr / lr
    groups = [
        {"params": [p for p in learning if p not in steps], "lr": lr, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for p in learning if p in steps], "lr": lr * scale, "weight_decay": 0.0, "lr_scale": scale},
    ]
    return [group for group in groups if group["params"]]
