"""Layers that compute from a packed student's nonzero weights: fp32 activations, for inference on the CPU.

Where few weights are zero, or elsewhere than on the CPU, a layer multiplies the dense fp32 weight instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast import dispatch
from pqk_fast.deploy.packed import fill
from pqk_fast.deploy.reader import Packed, PackedLayer, read_packed
from pqk_fast.deploy.taps import as_places, in_dealt_planes, taps_of
from pqk_fast.prepare import replace_modules, set_fast_paths

SPARSE_BELOW = 0.5  # part of nonzero weights, where nothing was measured


def _pads_with_zeros(layer: Any) -> bool:
    """By numbers, as is computed here; another convolution stays the filled float layer."""
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def _check_padding(like: Any) -> None:
    if not _pads_with_zeros(like):
        raise ValueError(f"expected padding with zeros, given in numbers, got {like.padding_mode}, {like.padding}")


class _PackedConv(nn.Module):
    """A convolution over two spatial dimensions, of which 1-d layers have the first of size 1."""

    first: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: PackedLayer,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        weight = torch.from_numpy(layer.weight()).reshape(self._four(layer.q.shape))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.taps = taps_of(weight.numpy(), groups, dilation)
        self.register_buffer("first", torch.from_numpy(self.taps.first), persistent=False)
        self.register_buffer("value", torch.from_numpy(self.taps.value), persistent=False)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        self.geometry = [*reach, *stride, *padding]
        self.density = self.value.numel() / max(weight.numel(), 1)
        self.sparse = self.density < SPARSE_BELOW
        self.relu = False
        self._offsets: dict[tuple[int, int], Tensor] = {}

    @staticmethod
    def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
        """A weight's shape with two spatial dimensions."""
        return (*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])

    def offsets(self, height: int, width: int) -> Tensor:
        """Of each nonzero weight, in the padded planes of an input of that size: see csrc/sparse_infer.h."""
        key = (height, width)
        if key not in self._offsets:
            (stride_h, stride_w), (pad_h, pad_w) = self.stride, self.padding
            rows, pitch = -(-(height + 2 * pad_h) // stride_h), -(-(width + 2 * pad_w) // stride_w)
            offsets = in_dealt_planes(self.taps, self.stride, stride_h * stride_w * rows * pitch, rows, pitch)
            self._offsets[key] = torch.from_numpy(as_places(offsets, f"an input of {height} x {width}"))
        return self._offsets[key]

    def _takes(self, x: Tensor) -> bool:
        """Whether ``x`` is multiplied sparsely."""
        return self.sparse and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0

    def _convolve(self, x: Tensor) -> Tensor:
        if not self._takes(x):
            settings = (self.stride, self.padding, self.dilation, self.groups)
            out = F.conv2d(x, self.weight.to(x.dtype), self._bias(x), *settings)
            return out.relu_() if self.relu else out
        height, width = x.shape[-2:]
        batch = x if x.dim() == 4 else x[None]
        made: Tensor = dispatch.sparse_conv2d(
            batch, self.first, self.offsets(height, width), self.value, self.bias, self.geometry, self.relu
        )
        return made if x.dim() == 4 else made[0]

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {100 * self.density:.1f} % nonzero, {'sparse' if self.sparse else 'dense'}"


class PackedConv2d(_PackedConv):
    """``x [B, C, H, W]`` or ``[C, H, W]``, of a packed layer and the float layer whose settings and bias it has."""

    def __init__(self, layer: PackedLayer, like: nn.Conv2d) -> None:
        _check_padding(like)
        settings: Any = (like.stride, like.padding, like.dilation, like.groups)
        super().__init__(layer, like.bias, *settings)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x)


class PackedConv1d(_PackedConv):
    """``x [B, C, L]`` or ``[C, L]``; see :class:`PackedConv2d`."""

    def __init__(self, layer: PackedLayer, like: nn.Conv1d) -> None:
        _check_padding(like)
        stride, dilation, padding = (1, like.stride[0]), (1, like.dilation[0]), (0, int(like.padding[0]))
        super().__init__(layer, like.bias, stride, padding, dilation, like.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x.unsqueeze(-2)).squeeze(-2)


class PackedLinear(_PackedConv):
    """``x [..., in] -> [..., out]``: a convolution along the rows, which lie beside each other."""

    def __init__(self, layer: PackedLayer, like: nn.Linear) -> None:
        super().__init__(layer, like.bias, (1, 1), (0, 0), (1, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self._takes(x):
            out = F.linear(x, self.weight[:, :, 0, 0].to(x.dtype), self._bias(x))
            return out.relu_() if self.relu else out
        columns = x.reshape(1, -1, 1, x.shape[-1]).transpose(1, 3)
        return self._convolve(columns).transpose(1, 3).reshape(*x.shape[:-1], -1)


_KINDS: dict[type, Callable[..., _PackedConv]] = {
    nn.Conv2d: PackedConv2d,
    nn.Conv1d: PackedConv1d,
    nn.Linear: PackedLinear,
}


def load_runtime(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The student in a packed file as a model whose layers compute from its nonzero weights; for inference.

    ``model`` as for :func:`~pqk_fast.deploy.packed.load_packed`, whose errors it raises.
    """
    return to_runtime(read_packed(path), model)


def to_runtime(packed: Packed, model: nn.Module | None = None) -> nn.Module:
    """:func:`load_runtime` of what was read already."""
    plain = fill(packed, model).requires_grad_(False)
    layers = {plain.get_submodule(name): layer for name, layer in packed.layers.items()}
    made = {like: _KINDS[type(like)](layer, like) for like, layer in layers.items() if _pads_with_zeros(like)}
    runtime = replace_modules(plain, dict(made))
    set_fast_paths(runtime, allowed=False)
    return runtime.eval()


@torch.inference_mode()
def choose_by_time(model: nn.Module, x: Tensor, rounds: int = 30) -> dict[str, str]:
    """Let every packed layer compute whichever way is the faster for an input like ``x``, on this machine and with
    torch's threads as they are; gives "sparse" or "dense" by name.

    Both ways take turns; what counts is the lower quartile of the rounds.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _PackedConv)}
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, inputs[0].clone()))
        for name, module in layers.items()
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if name in seen:
            layer.sparse = _is_faster_sparse(layer, seen[name], rounds)
    return {name: "sparse" if layer.sparse else "dense" for name, layer in layers.items()}


def _is_faster_sparse(layer: _PackedConv, x: Tensor, rounds: int) -> bool:
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds + 2):
        for layer.sparse in times:
            start = time.perf_counter()
            layer(x)
            if i >= 2:  # the first ones find places and memory
                times[layer.sparse].append(time.perf_counter() - start)
    quartile = {way: float(np.quantile(taken, 0.25)) for way, taken in times.items()}
    return quartile[True] <= quartile[False]
