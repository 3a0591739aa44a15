"""The processes that train together: what the trainer needs of torch.distributed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class RanksDifferError(RuntimeError):
    """Ranks that must hold the same weights and masks do not; the message names the first tensor."""


class Ranks:
    """This process among ``world`` of them. Alone, every method does the obvious thing at once."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        # A GPU is not made to wait where CPU tensors can travel too.
        backends = dist.get_backend_config() if together else ""
        self._device = "cuda" if together and "cpu:" not in backends else "cpu"

    @property
    def main(self) -> bool:
        """True in the process that writes files and talks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the ranks, and buffers those of rank 0 at every forward."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """Summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank has it."""
        if self.world == 1:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.int32, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.any(True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (plain data, tensors on the CPU), in the order of the ranks; on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics differ from rank to rank)."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    @torch.no_grad()
    def check_same(self, model: nn.Module) -> None:
        """Raise :class:`RanksDifferError`, on every rank, unless parameters and masks are bit for bit the same."""
        if self.world == 1:
            return
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        tensors |= {name: buffer for name, buffer in model.named_buffers() if buffer.dtype == torch.bool}
        own = torch.stack([_fingerprint(tensor) for tensor in tensors.values()]).to(self._device)
        lowest, highest = own.clone(), own.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        for name, differs in zip(tensors, (lowest != highest).tolist(), strict=True):
            if differs:
                raise RanksDifferError(
                    f"{name!r} is no longer the same on all {self.world} ranks: something changed the model outside of "
                    "the common step (a callback on one rank only, an operation that is not deterministic); go back to "
                    "the last checkpoint"
                )


def _fingerprint(tensor: Tensor) -> Tensor:
    """An int64 that differs, but for rare accidents, where any bit or the order differs."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device) * 0x9E3779B1 % 0x7FFFFFFF
    return (words * places).sum()


def join(device: str) -> str:
    """Join the processes that ``torchrun`` started, if it did; the device of this one (``cuda`` becomes ``cuda:N``).

    CPU tensors travel by gloo, CUDA tensors by nccl. Call :func:`leave` at the end.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_available() or dist.is_initialized():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """End what :func:`join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
