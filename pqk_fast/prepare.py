"""Swap modules in and out of a model: prepare, start_phase2, convert; and the optimizer's parameter groups."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from pqk_fast import sharding
from pqk_fast.branches import pqk_layers, require_phase2, require_prepared
from pqk_fast.config import PHASE2_STEPS, STEP_LR_RULES, PQKConfig
from pqk_fast.dual_batch_norm import BATCH_NORMS, DualBatchNorm, DualSyncBatchNorm
from pqk_fast.folding import fold_batch_norm
from pqk_fast.fusion import unfuse
from pqk_fast.layers import PQK_LAYERS, PQKLayer
from pqk_fast.patterns import check_patterns, matches, names_by_weight, of_layer
from pqk_fast.reference import levels
from pqk_fast.settings import check_choice
from pqk_fast.two_phase import TwoPhase

Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool]

_LAYER_OF: dict[type, type[PQKLayer]] = {layer.float_type: layer for layer in PQK_LAYERS}
_NORMS_WITH_STATISTICS = nn.modules.batchnorm._NormBase


def replace_modules(model: nn.Module, old_to_new: dict[nn.Module, nn.Module]) -> nn.Module:
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


def _refuse_ties(model: nn.Module, config: PQKConfig) -> None:
    """A weight that another module reads too would be dense there, and get the wrong branch's gradient."""
    owners = {layer.weight: name for name, layer in pqk_layers(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, PQKLayer):
            continue
        for parameter in module._parameters.values():
            if parameter in owners:
                layer = owners[parameter]
                raise ValueError(
                    f"{layer}.weight is also a parameter of {name} ({type(module).__name__}), which is not prepared "
                    f"and would use it dense and unquantized; add {layer!r} to PQKConfig.exclude, or untie the two"
                )


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
        ValueError: nothing to prepare, prepared already, a pattern that matches nothing, a weight shared with a
            module that is not prepared, a model in shards (``fully_shard``).
        TypeError: a weight computed from other parameters (weight_norm), or not fp32, bf16 or fp16.
    """
    config = PQKConfig() if config is None else config
    if not isinstance(config, PQKConfig):
        raise TypeError(f"config must be a PQKConfig, got {type(config).__name__}; write PQKConfig(bits=4, ...)")
    if any(isinstance(module, PQKLayer) for module in model.modules()):
        raise ValueError("the model is prepared already; convert(model) gives a plain one")
    if sharding.reshard(model):
        raise ValueError("the model's parameters are in shards: call prepare first, fully_shard after it")
    named = dict(model.named_modules())
    # under every name that a shared module has
    candidates = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, tuple(_LAYER_OF))}
    check_patterns("exclude", config.exclude, candidates)
    excluded = {m for n, m in candidates.items() if any(matches(n, pattern) for pattern in config.exclude)}
    names = names_by_weight(candidates)
    swapped: dict[nn.Module, nn.Module] = {}
    left_float: list[str] = []
    twins: dict[torch.Tensor, PQKLayer] = {}
    for name, module in named.items():
        if type(module) in BATCH_NORMS:
            swapped[module] = DualBatchNorm.from_float(module)
        elif isinstance(module, _NORMS_WITH_STATISTICS) and module.track_running_stats:
            left_float.append(f"{name} ({type(module).__name__}: both branches will share its statistics)")
        elif name in candidates and module not in excluded and (filter_fn is None or filter_fn(module, name)):
            kind = _LAYER_OF.get(type(module))
            if parametrize.is_parametrized(module, "weight"):
                raise TypeError(
                    f"{name}.weight is computed from other parameters (torch.nn.utils.parametrizations); call "
                    f"torch.nn.utils.parametrize.remove_parametrizations({name}, 'weight') first, or exclude it"
                )
            if kind is None:
                left_float.append(f"{name} ({type(module).__name__})")
                continue
            own = names[module.weight]
            layer = kind.from_float(module, config, of_layer("layer_bits", config.layer_bits, own))
            layer.own_sparsity = of_layer("layer_sparsity", config.layer_sparsity, own)
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
    prepared = replace_modules(model, swapped)
    layers = [n for n, m in prepared.named_modules(remove_duplicate=False) if isinstance(m, PQKLayer)]
    try:
        check_patterns("layer_sparsity", config.layer_sparsity, layers)
        check_patterns("layer_bits", config.layer_bits, layers)
        _refuse_ties(prepared, config)
    except ValueError:
        replace_modules(prepared, {new: old for old, new in swapped.items()})
        raise
    set_fast_paths(prepared, allowed=False)
    return prepared  # type: ignore[return-value]


def set_fast_paths(model: nn.Module, allowed: bool) -> None:
    """TransformerEncoderLayer's evaluation fast path reads ``linear1.weight`` itself, past a swapped layer's forward.

    The layer's own switch for it is ``activation_relu_or_gelu``: 0 sends it the ordinary way.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        if allowed:
            module.activation_relu_or_gelu = module.__dict__.pop("fast_path_activation", module.activation_relu_or_gelu)
        elif any(type(child) is not nn.Linear for child in (module.linear1, module.linear2)):
            switch: Any = module
            switch.fast_path_activation = switch.activation_relu_or_gelu
            switch.activation_relu_or_gelu = 0


def start_phase2(model: Model, step_size: str = "frozen") -> Model:
    """Freeze masks and step sizes, start the full net's BatchNorm, and let both branches learn. In place.

    Make a new optimizer afterwards (``param_groups``): the full net's BatchNorm parameters learn from now on, the step
    sizes no longer. Phase, masks and steps are in the state dict: to resume, ``prepare`` and load it, nothing more.
    With ``fully_shard`` the model stays as it is wrapped; DistributedDataParallel must be made anew.

    With ``step_size="learned"`` the step sizes learn on, from the student's loss: call
    :func:`~pqk_fast.masks.keep_steps_positive` after every ``optimizer.step()``. The state dict does not say so: to
    resume, load it, and call this again, which in phase 2 changes that alone. Raises ValueError for an unprepared
    model, one that is in phase 2 with this ``step_size`` already, masks that prune nothing, or another ``step_size``.
    """
    layers = require_prepared(model)
    check_choice("step_size", step_size, PHASE2_STEPS)
    if any(layer.phase == 2 for layer in layers.values()):
        if all(layer.phase2_step == step_size for layer in layers.values()):
            raise ValueError(f"the model is in phase 2 already, its step sizes {step_size}")
        for layer in layers.values():
            layer.set_phase2_step(step_size)
        return model
    if all(bool(layer.weight_mask.all()) for layer in layers.values()):
        raise ValueError(
            "no weight is pruned, so the full net has nothing of its own to learn: "
            "run phase 1 with a Pruner first, or load its checkpoint"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name} is a SyncBatchNorm, which cannot keep two branches apart: call "
                "nn.SyncBatchNorm.convert_sync_batchnorm(model) before prepare, not after it"
            )
    hows = {layer.config.teacher_bn for layer in layers.values()}
    if len(hows) > 1:
        raise ValueError(
            f"parts of the model were prepared with different teacher_bn, {' and '.join(sorted(hows))}: call "
            "start_phase2 on each part"
        )
    sharding.reshard(model)
    for module in model.modules():
        if isinstance(module, DualBatchNorm):
            module.start_teacher(*hows)
        if isinstance(module, PQKLayer):
            module.set_phase2_step(step_size)
        if isinstance(module, TwoPhase):
            module.set_phase(2)
    model.stacked_is_right = None  # type: ignore[assignment]
    return model


@torch.no_grad()
def convert(model: Model, branch: str = "student", fold: bool = False) -> Model:
    """A plain copy of one branch: float layers with that branch's weights, its BatchNorm. ``model`` is untouched.

    ``branch`` is "student" (masked, quantized weights) or "teacher" (the full net). With ``fold``, for inference, a
    BatchNorm right after a convolution becomes part of it (:func:`~pqk_fast.folding.fold_batch_norm`): outputs stay the
    same but for rounding, and the weights are no longer multiples of one step size. Raises ValueError for an unprepared
    model, the teacher in phase 1, or a model in shards (``fully_shard``).
    """
    check_choice("branch", branch, ("student", "teacher"))
    if branch == "teacher":
        require_phase2(model)
    else:
        require_prepared(model)
    if sharding.reshard(model):
        raise ValueError(
            "the model's parameters are in shards: gather them with torch.distributed.checkpoint.state_dict's "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load that into a prepared "
            "model that is not sharded, and convert it"
        )
    groups = [module.process_group for module in model.modules() if isinstance(module, DualSyncBatchNorm)]
    plain = unfuse(copy.deepcopy(model, {id(group): group for group in groups}))  # they cannot be copied
    for name in ("stacked_is_right", "stacked_when_training"):
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
    plain = replace_modules(plain, swapped)  # type: ignore[assignment]
    set_fast_paths(plain, allowed=True)
    if fold:
        fold_batch_norm(plain)
    return plain


def param_groups(
    model: nn.Module,
    lr: float,
    step_lr: float | None = None,
    weight_decay: float = 0.0,
    step_lr_rule: str = "flat",
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: the weights, and the step sizes at their own rate without weight decay.

    ``step_lr`` defaults to ``1e-4 * lr`` (Eq. 7), which is meant for SGD. Adam divides by the gradient's size, so give
    it a ``step_lr`` of its own, such as ``1e-2 * lr``. Schedulers must scale the groups, not set one rate for all
    (OneCycleLR: ``max_lr=[group["lr"] for group in groups]``); the groups carry a ``"lr_scale"`` (1, and ``step_lr /
    lr``) for loops that set ``group["lr"]`` themselves. Parameters that do not learn now (frozen steps, the full net's
    BatchNorm in phase 1) are left out, so make the optimizer anew after :func:`start_phase2`.

    ``step_lr_rule="lsq"`` divides each step size's rate by ``sqrt(N Q)``, N the number of weights that it quantizes;
    layers of the same ``N Q`` share a group. With SGD that is LSQ's gradient scale (Esser et al., ICLR 2020); give it
    ``step_lr=lr``.

    Raises ValueError for an unprepared model, an ``lr`` that is not positive, or an unknown rule.
    """
    layers = require_prepared(model)
    check_choice("step_lr_rule", step_lr_rule, STEP_LR_RULES)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    scales: dict[Any, float] = {}  # of each step size
    for layer in layers.values():
        scale = 1e-4 if step_lr is None else step_lr / lr
        if step_lr_rule == "lsq":
            weights = layer.weight.numel() / layer.weight_step.numel()
            scale /= math.sqrt(max(weights, 1.0) * levels(layer.bits))
        scales.setdefault(layer.weight_step, scale)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [p for p in learning if p not in scales]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "weight_decay": weight_decay, "lr_scale": 1.0}]
    for scale in dict.fromkeys(scales.values()):
        same = [p for p in learning if scales.get(p) == scale]
        groups.append({"params": same, "lr": lr * scale, "weight_decay": 0.0, "lr_scale": scale})
    return [group for group in groups if group["params"]]
