"""Endless passes over the training data, which can be saved between two batches and gone on with exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pqk_fast.training.random_state import random_state, set_random_state

Batches = Iterable[tuple[Tensor, Tensor]]


class Stream:
    """Iterates over ``batches`` again and again.

    Batches with ``state_dict`` and ``load_state_dict`` (those of :mod:`pqk_fast.data`, torchdata's StatefulDataLoader)
    are asked where they stand. Of any other, a DataLoader or a list, the random states at the start of the pass are
    kept (the ``generator`` of the loader and its samplers too): to go on, the pass is begun again from them and what
    has been seen is skipped. That is exact if order and augmentation depend on those states and the number of the pass
    only. A sampler with ``set_epoch`` (DistributedSampler) is told the number of the pass.

    Raises ValueError if a pass gives no batch.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.passes = 0  # begun so far
        self.position = 0  # batches of the pass handed out
        self._pass: Iterator[tuple[Tensor, Tensor]] | None = None
        self._start: dict[str, Any] = {}  # the random states at the start of the pass
        knows = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._keeper: Any = batches if knows else None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        fresh = self._pass is None
        if self._pass is None:
            self._pass = self._begin()
        try:
            batch = next(self._pass)
        except StopIteration:
            if self.position == 0 and not (fresh and self._keeper):  # which may have been at the end of a pass
                raise ValueError(
                    "the training data gives no batch: is the set smaller than one batch, or exhausted?"
                ) from None
            self._pass = self._begin()
            try:
                batch = next(self._pass)
            except StopIteration:
                raise ValueError(
                    "the training data gives no batch any more: expected an iterable that starts anew each time, such "
                    "as a DataLoader or a list, got an iterator, a generator, or a set smaller than one batch"
                ) from None
        self.position += 1
        return batch

    def _begin(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._keeper is None:
            generators = [generator.get_state() for generator in _generators(self.batches)]
            self._start = {"random": random_state(), "generators": generators}
            sampler: Any = getattr(self.batches, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.passes)
        self.passes, self.position = self.passes + 1, 0
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors."""
        if self._keeper is not None:
            return {"batches": self._keeper.state_dict()}
        return {"passes": self.passes, "position": self.position, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the saved stream stood. Global random states are the caller's to restore *afterwards*.

        Raises ValueError if the data are of another kind, or give fewer batches, than those that were saved.
        """
        if ("batches" in state) != (self._keeper is not None):
            raise ValueError(
                f"the saved run's training data {'had' if 'batches' in state else 'had no'} state_dict, unlike these "
                f"({type(self.batches).__name__}): resume with the data that it was started with"
            )
        self._pass, self.position = None, 0
        if self._keeper is not None:
            self._keeper.load_state_dict(state["batches"])
            return
        if not state["start"]:  # not begun yet
            return
        if getattr(self.batches, "persistent_workers", False):
            warnings.warn(
                "workers that live on from pass to pass (persistent_workers) draw numbers that a resumed run cannot "
                "find again: if the data set is augmented at random, the run will not end in the same bits",
                stacklevel=2,
            )
        set_random_state(state["start"]["random"])
        for generator, start in zip(_generators(self.batches), state["start"]["generators"], strict=True):
            generator.set_state(start)
        self.passes = state["passes"] - 1
        self._pass = self._begin()
        for _ in range(state["position"]):
            if next(self._pass, None) is None:
                raise ValueError(
                    f"the saved run stands at batch {state['position']} of a pass, these data give {self.position}: "
                    "resume with the data that it was started with"
                )
            self.position += 1


def _generators(batches: Any) -> list[torch.Generator]:
    """A DataLoader's order may come from generators of its own or of its samplers."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(each): each for each in (getattr(holder, "generator", None) for holder in holders)}
    return [each for each in found.values() if isinstance(each, torch.Generator)]
