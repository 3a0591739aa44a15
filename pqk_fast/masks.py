"""The Pruner: one exact selection of the weights to keep, over all layers together, every few steps of phase 1."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pqk_fast import gpu, ops
from pqk_fast.branches import config_of, require_prepared
from pqk_fast.config import ConfigError, PQKConfig, matches, pruned_of_group
from pqk_fast.layers import PQKLayer
from pqk_fast.schedule import last_mask_step, sparsity_of_mask
from pqk_fast.step_size import SMALLEST_STEP


class _Pool:
    """Layers whose weights are ranked together, and their target sparsity."""

    def __init__(self, layers: dict[str, PQKLayer], target: float) -> None:
        self.names = list(layers)
        self.layers = list(layers.values())
        self.target = target

    def select(self, sparsity: float) -> None:
        masks = [layer.weight_mask for layer in self.layers]
        weights = [layer.weight.detach() for layer in self.layers]
        try:
            self._select(masks, weights, sparsity)
        except ops.NonFiniteWeightError as error:
            index = error.index
            raise ops.NonFiniteWeightError(index, weights[index], self.names[index]) from error

    def _select(self, masks: list[Tensor], weights: list[Tensor], sparsity: float) -> None:
        keep = sum(w.numel() for w in weights) - ops.masked_count(weights, sparsity)
        ops.topk_mask_(masks, weights, keep)


class _Groups(_Pool):
    """One layer, of whose every ``size`` inputs the same number is kept (N:M sparsity)."""

    def __init__(self, name: str, layer: PQKLayer, target: float, size: int) -> None:
        super().__init__({name: layer}, target)
        self.size = size
        if layer.weight.shape[1] % size:
            raise ConfigError(
                f"layer {name!r} has a weight of shape {tuple(layer.weight.shape)}: its inputs (dimension 1) are not a "
                f"multiple of the group size {size}; leave it out by PQKConfig.exclude, or choose another size"
            )

    def _select(self, masks: list[Tensor], weights: list[Tensor], sparsity: float) -> None:
        pruned = pruned_of_group(sparsity, self.size)
        if pruned:
            ops.group_mask_(masks[0], weights[0], self.size - pruned, self.size)
        else:
            masks[0].fill_(True)


class Pruner:
    """Iterative magnitude pruning for phase 1: call :meth:`step` after every ``optimizer.step()``.

    Making a Pruner sets the mask of the first iteration. Each :meth:`step` then counts one iteration and, at multiples
    of ``mask_interval``, makes the mask of the *next* one with that iteration's epoch in Eq. 1; the last such mask of
    the phase has the target sparsity exactly: ``int(p_t * N)`` weights masked. Pruned weights keep learning and may
    come back (unless ``mask_gradients``). Step sizes are kept at 1e-12 or above.

    Args:
        model: a prepared model in phase 1.
        steps: optimizer steps of the whole phase.
        epoch_steps: steps of one epoch, the clock of Eq. 1 (usually ``len(train_loader)``).
        config: defaults to the one given to ``prepare``.

    Raises:
        ValueError: an unprepared model, phase 2, step counts below 1; from :meth:`step` also for a layer that never
            ran, NaN or infinity in a layer's weight or step size (all by name), and more steps than announced.
    """

    def __init__(self, model: nn.Module, steps: int, epoch_steps: int, config: PQKConfig | None = None) -> None:
        layers = require_prepared(model)
        if any(layer.phase != 1 for layer in layers.values()):
            raise ValueError("masks are frozen in phase 2: make the Pruner before start_phase2")
        if not (isinstance(steps, int) and isinstance(epoch_steps, int) and min(steps, epoch_steps) >= 1):
            raise ValueError(
                f"steps and epoch_steps must be whole numbers of at least 1, got {steps} and {epoch_steps}"
            )
        self.config = config or config_of(model)
        self.steps = steps
        self.epoch_steps = epoch_steps
        self.iteration = 0
        self._layers = layers
        unique: dict[int, tuple[str, PQKLayer]] = {}
        self._twins: list[tuple[PQKLayer, PQKLayer]] = []
        for name, layer in layers.items():
            first = unique.setdefault(id(layer.weight), (name, layer))[1]
            if first is not layer:
                self._twins.append((layer, first))
        self._unique = dict(unique.values())
        self._pools = self._make_pools()
        self._update_masks(0)

    def _make_pools(self) -> list[_Pool]:
        pools: list[_Pool] = []
        shared: dict[str, PQKLayer] = {}
        for name, layer in self._unique.items():
            own = [p for pattern, p in self.config.layer_sparsity.items() if matches(name, pattern)]
            if len(set(own)) > 1:
                raise ConfigError(f"layer_sparsity names layer {name!r} by several patterns with targets {own}")
            if self.config.scope == "group":
                target = own[0] if own else self.config.sparsity
                pools.append(_Groups(name, layer, target, self.config.group_size))
            elif own or self.config.scope == "layer":
                pools.append(_Pool({name: layer}, own[0] if own else self.config.sparsity))
            else:
                shared[name] = layer
        return [_Pool(shared, self.config.sparsity), *pools] if shared else pools

    @torch.no_grad()
    def _update_masks(self, iteration: int) -> bool:
        config = self.config
        for pool in self._pools:
            sparsity = sparsity_of_mask(
                iteration,
                steps=self.steps,
                epoch_steps=self.epoch_steps,
                interval=config.mask_interval,
                target=pool.target,
                initial=min(config.initial_sparsity, pool.target),  # a layer's own target may be below p_i
                mask_end=config.mask_end,
            )
            if sparsity is None:
                return False
            pool.select(sparsity)
        self._check_numbers()
        for layer, first in self._twins:
            # .to(device) gives tied layers buffers of their own
            layer.weight_mask.copy_(first.weight_mask)
        return True

    def _check_numbers(self) -> None:
        """Name the layer whose step size or weights no longer are numbers. A GPU, which cannot raise, set a flag."""
        devices = {layer.weight.device for layer in self._unique.values()}
        if any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
            return
        suspect = {device for device in devices if device.type != "cuda" or gpu.errors(device)}
        for index, (name, layer) in enumerate(self._unique.items()):
            if layer.weight.device not in suspect:
                continue
            step = layer.weight_step
            if not bool(((step > 0) & step.isfinite()).all()):
                raise ValueError(
                    f"the step size of layer {name!r} is no positive number any more ({step.min():g} to "
                    f"{step.max():g}): training has diverged, go back to the last good checkpoint and lower the rate "
                    "of the step sizes (step_lr in param_groups)"
                )
            if layer.weight.device.type == "cuda" and not bool(layer.weight.isfinite().all()):
                raise ops.NonFiniteWeightError(index, layer.weight, name)

    @torch.no_grad()
    def step(self) -> bool:
        """Count one optimizer step; True if the masks moved."""
        if self.iteration >= self.steps:
            raise ValueError(f"the phase was announced with {self.steps} steps and is over; make a Pruner with more")
        self.iteration += 1
        torch._foreach_clamp_min_([layer.weight_step for layer in self._unique.values()], SMALLEST_STEP)
        if self.iteration == min(self.config.mask_interval, self.steps):
            self._check_all_ran()
        moved = self.iteration < self.steps and self._update_masks(self.iteration)
        if moved and self.finished:
            self._warn_of_empty_layers()
        return moved

    def _warn_of_empty_layers(self) -> None:
        empty = [name for name, layer in self._unique.items() if layer.weight.numel() and not layer.weight_mask.any()]
        if empty:
            warnings.warn(
                f"the final mask prunes every weight of layer {', '.join(empty)}: nothing but its bias is left; give "
                "it a sparsity of its own with PQKConfig.layer_sparsity, or prune less",
                stacklevel=4,
            )

    def _check_all_ran(self) -> None:
        idle = [name for name, layer in self._layers.items() if not layer.ran]
        if idle:
            raise ValueError(
                f"prepared layers that never ran in a forward in {self.iteration} steps: {', '.join(idle)}; the model "
                "does not use them or reads their weight itself, past pruning and quantization: leave them out by "
                "PQKConfig.exclude or filter_fn"
            )

    @property
    def finished(self) -> bool:
        """True once the mask is the phase's last one: the target sparsity is reached and stays."""
        return self.iteration >= last_mask_step(self.steps, self.config.mask_interval, self.config.mask_end)

    def sparsity(self) -> float:
        """Fraction of weights masked now, over all layers."""
        total = sum(layer.weight.numel() for layer in self._unique.values())
        kept = sum(int(layer.weight_mask.sum()) for layer in self._unique.values())
        return 1 - kept / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule; masks are part of the model's own state."""
        return {"iteration": self.iteration, "steps": self.steps, "epoch_steps": self.epoch_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Load the model's state *after* making the Pruner: making it sets masks."""
        for name in ("steps", "epoch_steps"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the saved schedule has {name}={state[name]}, this one {getattr(self, name)}")
        self.iteration = state["iteration"]
