"""Tensors as kernels take them: dense memory in one order, tables of blocks, counters and error flags of a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """The device of ``tensor`` made the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has. Interpreted kernels take 4, so that work is divided in small tests too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def is_dense(tensor: Tensor) -> bool:
    """Rows (slices of dimension 0) follow each other without gaps, in whatever order their elements are."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape[1:], tensor.stride()[1:], strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.stride(0) == expected


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def relaid(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like``, which is dense; copied if it has others."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def flat_steps(step: Tensor) -> Tensor:
    """The step sizes as contiguous fp32."""
    return step.float().contiguous()


def written_like(result: Tensor, weight: Tensor) -> Tensor:
    """``result`` if it has the strides of a dense ``weight``, which kernels write in; else memory to copy back from."""
    return result if result.stride() == weight.stride() else torch.empty_like(weight, dtype=result.dtype)


def copy_back(written: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """The results that were written elsewhere (:func:`written_like`), brought to their own layout."""
    for source, result in zip(written, results, strict=True):
        if source is not result:
            result.copy_(source)


def convolved_size(x: Tensor, weight: Tensor, *shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of what a convolution of these gives; ``shape`` is stride, padding and dilation."""
    each = zip(x.shape[2:], weight.shape[2:], *shape, strict=True)
    height, width = ((size + 2 * pad - apart * (taps - 1) - 1) // by + 1 for size, taps, by, pad, apart in each)
    return height, width


def aligned(tensors: Sequence[Tensor]) -> bool:
    """All begin at a multiple of 16 bytes, as loads of 16 bytes need."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A tensor that outlives the call: made in a thread of its own, outside the caller's modes (inference_mode),
    streams and memory pools (of a graph that is about to be captured).

    Raises RuntimeError within the capture of a CUDA graph, where what is made belongs to the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected that these shapes have run before a CUDA graph is captured, got a first call within a capture; "
            "run the step once before (torch.cuda.graph asks for warm-up in any case)"
        )

    def run() -> Tensor:
        if device.type != "cuda":
            return make()
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


_counters: dict[tuple[torch.device, int], Tensor] = {}
_kept: list[Tensor] = []  # outgrown ones too: their memory belongs to no stream that would be waited for


def counters(device: torch.device, count: int) -> Tensor:
    """``count`` int32 zeros for tickets, which the kernel that uses them sets back to zero.

    One set a stream: kernels of one stream follow each other. Within the capture of a CUDA graph a set of its own,
    whose zeroing is part of the graph: the graph may be replayed in any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device, stream))
    if found is None or found.numel() < count:
        size = max(count, 1024)
        found = lasting(lambda: torch.zeros(size, dtype=torch.int32, device=device), device)
        _kept.append(found)
        _counters[device, stream] = found
    return found


_flags: dict[torch.device, Tensor] = {}

NOT_FINITE = 1  # where in the flags: NaN or infinity among weights that were to be ranked; 0 is a bad step size


def error_flags(device: torch.device) -> Tensor:
    """int32 [2] on the device, to which kernels write 1 for what they find wrong; see :func:`pqk_fast.gpu.errors`."""
    found = _flags.get(device)
    if found is None:
        found = _flags[device] = lasting(lambda: torch.zeros(2, dtype=torch.int32, device=device), device)
    return found
