"""One training step: forward, loss, backward, optimizer and masks; as Python calls it, or as a captured CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pqk_fast.branches import pqk_layers
from pqk_fast.masks import Pruner, keep_steps_positive

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # steps before a capture: libraries choose algorithms, the optimizer makes its momentum

Check = Callable[[Tensor], None]


class Step:
    """Called with a batch, trains on it once; gives the loss (a scalar, detached).

    Args:
        objective: ``(x, y) -> loss``.
        optimizer: a ``lr`` that is a tensor is changed in place by :meth:`set_lr`.
        pruner: of phase 1; its ``advance`` has been called for this step, ``due`` is what it said.
        precision: "fp32", or "bf16" and "fp16": autocast, with a GradScaler in fp16.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: Pruner | None = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.pruner = pruner
        self.device = torch.device(device)
        self._dtype = PRECISIONS[precision]
        self._steps_learn = any(layer.weight_step.requires_grad for layer in pqk_layers(objective).values())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def set_lr(self, lr: float) -> None:
        """This step's learning rate; each group's is ``lr`` times its ``lr_scale``."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["lr_scale"])
            else:
                group["lr"] = lr * group["lr_scale"]

    def __call__(self, x: Tensor, y: Tensor, due: int = 0, check: Check | None = None) -> Tensor:
        """``check`` sees the loss before the weights change."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss: Tensor = self.objective(x, y)
        if check is not None:
            check(loss)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.pruner is not None:
            self.pruner.update(due)
        elif self._steps_learn:
            keep_steps_positive(self.objective)
        return loss.detach()

    def _autocast(self) -> Any:
        if self._dtype is None:
            return contextlib.nullcontext()
        # The cache of cast weights would outlive a captured graph, and saves nothing: student weights are made once.
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)

    def state_dict(self) -> dict[str, Any]:
        """Of the optimizer and the GradScaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the same tensor, if it is one: a graph reads it
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class CapturedStep(Step):
    """A :class:`Step` that is captured into CUDA graphs, one for each thing that its Pruner may have due, and replayed.

    The first steps run as Python calls them. Batches are copied into the graphs' own; they must keep their shape.
    ``check`` sees the loss after the step. :func:`why_not_captured` says where this cannot be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._done = 0
        self._graphs: dict[int, Callable[[], Tensor]] = {}
        self._pool: Any = None
        self._x = self._y = torch.empty(0)

    def __call__(self, x: Tensor, y: Tensor, due: int = 0, check: Check | None = None) -> Tensor:
        if self._done < WARM_UP:
            loss = self._aside(x, y, due)
        else:
            if not self._graphs:
                self._x, self._y = x.clone(), y.clone()
            elif (x.shape, y.shape) != (self._x.shape, self._y.shape):
                raise ValueError(
                    f"a captured step takes batches of one shape, {tuple(self._x.shape)} and {tuple(self._y.shape)}; "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}: drop the last partial batch, or do not capture"
                )
            else:
                self._x.copy_(x)
                self._y.copy_(y)
            if due not in self._graphs:
                self._graphs[due] = self._capture(lambda: super(CapturedStep, self).__call__(self._x, self._y, due))
            loss = self._graphs[due]()
        self._done += 1
        if check is not None:
            check(loss)
        return loss

    def _aside(self, x: Tensor, y: Tensor, due: int) -> Tensor:
        """A step on a stream of its own, as what precedes a capture must be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = super().__call__(x, y, due)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What repeats ``work``, whose result is a tensor that the next repetition writes over."""
        self.optimizer.zero_grad(set_to_none=True)  # gradients in the graph's memory, not in that of another
        graph = torch.cuda.CUDAGraph()
        # other threads (a loader that pins memory) may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = work()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


def why_not_captured(device: torch.device, pruner: Pruner | None, world: int = 1) -> str | None:
    """None if a :class:`CapturedStep` is possible; otherwise the reason."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {device.type}"
    if world > 1:
        return "the gradients of several ranks are averaged by DistributedDataParallel, which is not captured here"
    return None if pruner is None else pruner.why_not_capturable()
