"""All layers' student weights in one operation a forward: a small network pays one dispatch, not one a layer."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from pqk_fast import ops
from pqk_fast.branches import require_prepared
from pqk_fast.layers import PQKLayer
from pqk_fast.settings import is_quantized

Model = TypeVar("Model", bound=nn.Module)


class _Feed:
    """The root's hooks: before a forward every layer gets its weight, after it (or an error) gives it back."""

    def __init__(self, layers: list[PQKLayer]) -> None:
        self.layers = layers

    def fill(self, module: nn.Module, args: Any) -> None:
        # Among many ranks a layer's gradient must not wait for all others', and its weight may be a shard. The hooks of
        # a DataParallel replica are the original's. torch.func has no rule for lists of tensors.
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if ranks or getattr(module, "_is_replica", False) or torch._C._are_functorch_transforms_active():
            return
        groups: dict[Any, list[Any]] = {}
        for layer in self.layers:
            if layer.branch == "student" and is_quantized(layer.bits):
                *arguments, ste, hard = layer.student_arguments()
                kind = (layer.weight.dtype, layer.weight.device, ste, hard)
                groups.setdefault(kind, []).append((layer, *arguments))
        for (*_, ste, hard), group in groups.items():
            layers, weights, masks, steps, bits = zip(*group, strict=True)
            made = ops.fake_quant_all(weights, masks, steps, bits, ste, hard)
            for layer, weight in zip(layers, made, strict=True):
                layer.fed = weight, layer.fed_from()

    def empty(self, module: nn.Module, args: Any, output: Any) -> None:
        for layer in self.layers:
            layer.fed = None


def fuse(model: Model) -> Model:
    """Make the student's weights of all layers at once when ``model`` is called; in place, returns ``model``.

    Outputs and gradients stay bit for bit the same, but that a layer which a forward does not use gets a gradient of
    zeros instead of none. Parts of the model that are called by themselves make their weights as before; so does all of
    it where torch.distributed or torch.func is in use, and a layer whose weight, mask, step size or phase changes
    within the forward. Activation checkpointing within the model is refused when it recomputes. A copy or a pickle of
    the model is fused as well. Calling this again changes nothing.

    Raises ValueError for a model without PQK layers.
    """
    layers = list(require_prepared(model).values())
    unfuse(model)
    feed = _Feed(layers)
    model.register_forward_pre_hook(feed.fill)
    model.register_forward_hook(feed.empty, always_call=True)
    for layer in layers:
        layer.fused = True
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse` of the model or parts of it; in place, returns ``model``."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Feed)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    for layer in require_prepared(model).values():
        layer.fed, layer.fused = None, False
    return model
