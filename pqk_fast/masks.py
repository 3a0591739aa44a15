"""The Pruner: one exact selection of the weights to keep, over all layers together, every few steps of phase 1."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pqk_fast import gpu, ops, sharding
from pqk_fast.branches import config_of, require_prepared
from pqk_fast.config import PQKConfig, pruned_of_group
from pqk_fast.layers import PQKLayer
from pqk_fast.patterns import check_patterns, names_by_weight, of_layer
from pqk_fast.schedule import last_mask_step, sparsity_of_mask
from pqk_fast.settings import ConfigError, is_quantized
from pqk_fast.step_size import SMALLEST_STEP, initial_step


class _Pool:
    """Layers whose weights are ranked together, and their target sparsity."""

    def __init__(self, layers: dict[str, PQKLayer], target: float) -> None:
        self.layers = layers
        self.target = target
        self.keep: Tensor | None = None  # how many weights, int64 []: on the device, where a captured graph reads it

    def plan(self, sparsity: float) -> None:
        """Say on the host what the next :meth:`select` is to do. Waits for no device."""
        weights = [layer.weight for layer in self.layers.values()]
        if self.keep is None or self.keep.device != weights[0].device:
            self.keep = torch.empty((), dtype=torch.int64, device=weights[0].device)
        self.keep.fill_(sum(w.numel() for w in weights) - ops.masked_count(weights, sparsity))

    def select(self) -> None:
        """Make the masks, on the device alone unless the weights are sharded."""
        masks = [layer.weight_mask for layer in self.layers.values()]
        weights = {name: layer.weight.detach() for name, layer in self.layers.items()}
        group = sharding.common_group(weights)
        try:
            self._select(masks, list(weights.values()), group)
        except ops.NonFiniteWeightError as error:
            name = list(weights)[error.index]
            raise ops.NonFiniteWeightError(error.index, weights[name], name) from error

    def _select(self, masks: list[Tensor], weights: list[Tensor], group: Any) -> None:
        assert self.keep is not None
        if group is None:
            ops.topk_mask_(masks, [sharding.local(weight) for weight in weights], self.keep)
        else:
            sharding.topk_mask_(masks, weights, self.keep, group)


class _Groups(_Pool):
    """One layer, of whose every ``size`` inputs the same number is kept (N:M sparsity)."""

    def __init__(self, name: str, layer: PQKLayer, target: float, size: int) -> None:
        super().__init__({name: layer}, target)
        self.size = size
        self.pruned = 0
        if layer.weight.shape[1] % size:
            raise ConfigError(
                f"layer {name!r} has a weight of shape {tuple(layer.weight.shape)}: its inputs (dimension 1) are not a "
                f"multiple of the group size {size}; leave it out by PQKConfig.exclude, or choose another size"
            )

    def plan(self, sparsity: float) -> None:
        self.pruned = pruned_of_group(sparsity, self.size)

    def _select(self, masks: list[Tensor], weights: list[Tensor], group: Any) -> None:
        if not self.pruned:
            masks[0].fill_(True)
        elif group is None:
            ops.group_mask_(masks[0], sharding.local(weights[0]), self.size - self.pruned, self.size)
        else:
            sharding.group_mask_(masks[0], weights[0], self.size - self.pruned, self.size, group)


@torch.no_grad()
def _keep_positive(layers: Iterable[PQKLayer]) -> None:
    steps = [sharding.local(layer.weight_step) for layer in layers]
    torch._foreach_clamp_min_(steps, SMALLEST_STEP)


def keep_steps_positive(model: nn.Module) -> None:
    """After an ``optimizer.step()``: step sizes below 1e-12, where there is no grid, become 1e-12.

    :meth:`Pruner.step` does it in phase 1, the trainer always; in a loop of your own call it in phase 2, if step sizes
    learn there. Waits for no device. Raises ValueError for an unprepared model.
    """
    _keep_positive(require_prepared(model).values())


class Pruner:
    """Iterative magnitude pruning for phase 1: call :meth:`step` after every ``optimizer.step()``.

    Making a Pruner sets the mask of the first iteration. Each :meth:`step` then counts one iteration and, at multiples
    of ``mask_interval``, makes the mask of the *next* one with that iteration's epoch in Eq. 1; the last such mask of
    the phase has the target sparsity exactly: ``int(p_t * N)`` weights masked. Pruned weights keep learning and may
    come back (unless ``mask_gradients``). Step sizes are kept at 1e-12 or above; with ``step_tracking`` they are set
    anew at every so many of the masks.

    A step is :meth:`advance` (the host's part), :meth:`update` (the device's, for a CUDA graph) and, when masks were
    made, :meth:`check` (the host looks at the result). On many ranks every rank makes its own Pruner of its own model:
    replicas (DDP) choose the same masks from the same weights, and of weights in shards (``fully_shard``) the masks are
    those of the whole weights.

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
        if self.config.step_tracking and any(sharding.is_sharded(layer.weight) for layer in layers.values()):
            raise ConfigError("step_tracking looks at whole weights, these are in shards (fully_shard): leave it 0")
        # under every name that a shared module has
        named = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PQKLayer)}
        if config is not None:
            check_patterns("layer_sparsity", config.layer_sparsity, named)
        self._pools = self._make_pools(names_by_weight(named), prepared=config is None)
        self._final_unseen = False
        self._counted = 0  # steps in this process, as against `iteration` of a run that was resumed
        self._all_ran = False
        pruned = not all(bool(layer.weight_mask.all()) for layer in layers.values())
        found = [(layer, layer.weight_mask.clone()) for layer in layers.values() if pruned]
        self._plan(0)
        self._make_masks()
        # Of a model that has been pruned: should a position be loaded next, it goes on with the masks that it had.
        self._found = [(layer, layer.weight_mask.clone(), mask) for layer, mask in found]
        self._warn_of_one_shot()
        self.check()

    def _warn_of_one_shot(self) -> None:
        config = self.config
        last = last_mask_step(self.steps, config.mask_interval, config.mask_end)
        before = self._sparsity_at(last - config.mask_interval, config.sparsity) if last else config.initial_sparsity
        if before is not None and before <= config.initial_sparsity < config.sparsity:
            warnings.warn(
                f"all pruning happens at once, at step {last} of {self.steps}: Eq. 1 counts epochs of "
                f"{self.epoch_steps} steps, and masks are made every {config.mask_interval}; give it more steps, a "
                "smaller mask_interval, or epoch_steps of which there are more",
                stacklevel=3,
            )

    def _sparsity_at(self, iteration: int, target: float) -> float | None:
        """Of the mask made before this iteration, if one is."""
        config = self.config
        return sparsity_of_mask(
            iteration,
            steps=self.steps,
            epoch_steps=self.epoch_steps,
            interval=config.mask_interval,
            target=target,
            initial=min(config.initial_sparsity, target),  # a layer's own target may be below p_i
            mask_end=config.mask_end,
        )

    def _make_pools(self, names: dict[Tensor, list[str]], prepared: bool) -> list[_Pool]:
        """``prepared``: by the config that ``prepare`` had, which knew the layers by names of its own."""
        pools: list[_Pool] = []
        shared: dict[str, PQKLayer] = {}
        for name, layer in self._unique.items():
            own = layer.own_sparsity if prepared else None
            if own is None:
                own = of_layer("layer_sparsity", self.config.layer_sparsity, names[layer.weight])
            target = self.config.sparsity if own is None else own
            if self.config.scope == "group":
                pools.append(_Groups(name, layer, target, self.config.group_size))
            elif own is not None or self.config.scope == "layer":
                pools.append(_Pool({name: layer}, target))
            else:
                shared[name] = layer
        return [_Pool(shared, self.config.sparsity), *pools] if shared else pools

    def _plan(self, iteration: int) -> bool:
        """Tell every pool how many weights to keep, if a mask is due."""
        for pool in self._pools:
            sparsity = self._sparsity_at(iteration, pool.target)
            if sparsity is None:
                return False
            pool.plan(sparsity)
        return True

    @torch.no_grad()
    def _make_masks(self) -> None:
        for pool in self._pools:
            pool.select()
        for layer, first in self._twins:
            # .to(device) gives tied layers buffers of their own
            layer.weight_mask.copy_(first.weight_mask)

    def step(self) -> bool:
        """Count one optimizer step; True if the masks moved."""
        due = self.advance()
        self.update(due)
        if due or self._counted == self._first_look:
            self.check()
        return due > 0

    def advance(self) -> int:
        """The host's part of a step: count it, and say what is due: nothing (0), masks (1), or masks and the step sizes
        for them (2). Waits for no device.
        """
        if self.iteration >= self.steps:
            raise ValueError(f"the phase was announced with {self.steps} steps and is over; make a Pruner with more")
        if any(layer.phase != 1 for layer in self._unique.values()):
            raise ValueError("masks are frozen in phase 2: step the Pruner in phase 1 alone")
        self.iteration += 1
        self._counted += 1
        self._found = []
        due = self.iteration < self.steps and self._plan(self.iteration)
        self._final_unseen |= due and self.finished
        every = self.config.step_tracking
        return int(due) + int(due and every > 0 and self.iteration // self.config.mask_interval % every == 0)

    @torch.no_grad()
    def update(self, due: int) -> None:
        """The device's part of a step: keep step sizes positive and make what is ``due``.

        Can be captured in a CUDA graph, one for each value of ``due``, unless :meth:`why_not_capturable` says
        otherwise. The numbers of weights to keep lie on the device, where :meth:`advance` writes them before a replay.
        """
        _keep_positive(self._unique.values())
        if due:
            self._make_masks()
        if due == 2:
            self._track_steps()

    def _track_steps(self) -> None:
        for layer in self._unique.values():
            if is_quantized(layer.bits):
                per_channel = layer.config.per_channel
                step = initial_step(layer.weight, layer.weight_mask, layer.bits, "mse", per_channel)
                layer.weight_step.copy_(step)

    def why_not_capturable(self) -> str | None:
        """None if :meth:`update` can be captured in a CUDA graph, otherwise what stands in the way."""
        if any(isinstance(pool, _Groups) for pool in self._pools):
            return 'scope="group" takes the number of weights kept as a constant, which a graph cannot change'
        if any(sharding.is_sharded(layer.weight) for layer in self._unique.values()):
            return "the weights are sharded (fully_shard): ranks agree on a mask by collectives that the host waits for"
        return None

    @torch.no_grad()
    def check(self) -> None:
        """After a step: name the layer whose weights or step size no longer are numbers. Waits for the device.

        A GPU, which cannot raise, sets a flag; it is read here. After the last mask, warns of layers left empty; after
        the first ``mask_interval`` steps, refuses layers that never ran. With sharded weights, call it on all ranks
        together; all raise.
        """
        if self._counted >= self._first_look and not self._all_ran:
            self._check_all_ran()
        layers = self._suspects()
        group = sharding.common_group({name: layer.weight for name, layer in layers.items()})
        steps = [sharding.local(layer.weight_step) for layer in layers.values()]
        bad = sharding.any_rank([~((step > 0) & step.isfinite()).all() for step in steps], group)
        for index, (name, layer) in enumerate(layers.items()):
            if bad[index]:
                step = sharding.whole(layer.weight_step)
                raise ValueError(
                    f"the step size of layer {name!r} is no positive number any more ({step.min():g} to "
                    f"{step.max():g}): training has diverged, go back to the last good checkpoint and lower the rate "
                    "of the step sizes (step_lr in param_groups)"
                )
            # all others raise when they make masks
            if group is None and layer.weight.device.type == "cuda" and not bool(layer.weight.isfinite().all()):
                raise ops.NonFiniteWeightError(list(self._unique).index(name), layer.weight, name)
        if self._final_unseen:
            self._final_unseen = False
            self._warn_of_empty_layers()

    def _suspects(self) -> dict[str, PQKLayer]:
        """The layers that :meth:`check` must look at: on a GPU, only if its flag is set."""
        weights = [layer.weight for layer in self._unique.values()]
        if any(sharding.is_sharded(weight) for weight in weights):
            return self._unique  # flags differ from rank to rank
        devices = {weight.device for weight in weights}
        if any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
            return {}
        suspect = {device for device in devices if device.type != "cuda" or gpu.errors(device)}
        return {name: layer for name, layer in self._unique.items() if layer.weight.device in suspect}

    def _warn_of_empty_layers(self) -> None:
        empty = [name for name, layer in self._unique.items() if layer.weight.numel() and not layer.weight_mask.any()]
        if empty:
            warnings.warn(
                f"the final mask prunes every weight of layer {', '.join(empty)}: nothing but its bias is left; give "
                "it a sparsity of its own with PQKConfig.layer_sparsity, or prune less",
                stacklevel=5,
            )

    def _check_all_ran(self) -> None:
        idle = [name for name, layer in self._layers.items() if not layer.ran]
        if idle:
            raise ValueError(
                f"prepared layers that never ran in a forward in {self._counted} steps: {', '.join(idle)}; the model "
                "does not use them or reads their weight itself, past pruning and quantization: leave them out by "
                "PQKConfig.exclude or filter_fn"
            )
        self._all_ran = True

    @property
    def _first_look(self) -> int:
        """Steps after which every layer must have run."""
        return min(self.config.mask_interval, self.steps)

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
        """Go on from a saved position, with the masks of the model's state: loaded before or after making the Pruner,
        which sets masks of its own."""
        for name in ("steps", "epoch_steps"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the saved schedule has {name}={state[name]}, this one {getattr(self, name)}")
        self.iteration = state["iteration"]
        if all(torch.equal(layer.weight_mask, made) for layer, made, _ in self._found):  # nothing was loaded since
            for layer, _, before in self._found:
                layer.weight_mask.copy_(before)
        self._found = []
