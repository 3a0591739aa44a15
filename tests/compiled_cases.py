"""Launchers called for GPUs that are not here: ``python compiled_cases.py 90`` prints what their kernels became.

A process of its own, because TRITON_INTERPRET must not be set. The summaries are lists of JSON, one entry a launch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from machine_code import compiled_only
from torch import Tensor

from pqk_fast.triton_kernels import (
    dual_conv2d,
    dual_conv2d_backward,
    dual_forward,
    dual_weight,
    fake_quant,
    group_mask,
    int4,
    launch,
    operands,
    topk_mask,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Layer = tuple[Tensor, Tensor, Tensor, int]


def layer(shape: tuple[int, ...] = (256, 512), dtype: torch.dtype = FP32, steps: int = 1) -> Layer:
    return torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=torch.bool), torch.ones(steps), 4


def layers(dtype: torch.dtype, count: int = 8, steps: int = 1) -> list[list]:
    return [list(each) for each in zip(*[layer(dtype=dtype, steps=steps) for _ in range(count)], strict=True)]


def grads_of(lists: list[list]) -> list[Tensor]:
    return [weight.clone() for weight in lists[0]]


def uneven() -> list[list]:
    """Layers with a step a channel, among them one whose rows are not of whole loads, and one with a step in all."""
    made = [layer((64, n), steps=64) for n in (27, 576, 1152)] + [layer((1, 37))]
    return [list(each) for each in zip(*made, strict=True)]


def rows(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2 * count, columns, dtype=dtype)


def all_layers(dtype: torch.dtype, steps: int = 1) -> dict[str, Callable[[], object]]:
    lists = layers(dtype, steps=steps)
    name = f"{str(dtype).removeprefix('torch.')}{', a step a channel' if steps > 1 else ''}"
    backward = fake_quant.fake_quant_all_backward
    return {
        f"fake_quant {name}": lambda: fake_quant.fake_quant_all(*lists, dtype),
        f"fake_quant backward {name}": lambda: backward(grads_of(lists), *lists, False, False, False, True),
        f"fake_quant backward clipped {name}": lambda: backward(grads_of(lists), *lists, True, True, True, True),
    }


def linear(dtype: torch.dtype, steps: int = 1, count: int = 64) -> dict[str, Callable[[], object]]:
    one = layer((4096, 4096), FP32 if dtype == BF16 else dtype, steps)
    x, grad = rows(count, 4096, dtype), rows(count, 4096, dtype)
    name = f"{str(dtype).removeprefix('torch.')}{', a step a channel' if steps > 1 else ''}"
    backward = dual_forward.dual_linear_backward
    return {
        f"dual_linear {name}": lambda: dual_forward.dual_linear(x, *one, None, False),
        f"dual_linear dx {name}": lambda: backward(grad, x, *one, False, False, True, False),
        f"dual_linear dw {name}": lambda: backward(grad, x, *one, True, False, False, True),
    }


def convolution(dtype: torch.dtype, channels_last: bool = False) -> dict[str, Callable[[], object]]:
    """A layer of res8."""
    one = layer((45, 45, 3, 3), FP32 if dtype == BF16 else dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (torch.zeros(128, 45, 25, 13, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    shape = ([1, 1], [1, 1], [1, 1], 1)
    name = f"{str(dtype).removeprefix('torch.')}{', channels_last' if channels_last else ''}"
    backward = dual_conv2d_backward.dual_conv2d_backward
    return {
        f"dual_conv2d {name}": lambda: dual_conv2d.dual_conv2d(x, *one, None, *shape, False),
        f"dual_conv2d dx {name}": lambda: backward(grad, x, *one, *shape, False, False, True, False),
        f"dual_conv2d dw {name}": lambda: backward(grad, x, *one, *shape, True, False, False, True),
    }


def selection(dtype: torch.dtype, count: int = 20, first: int = 0) -> dict[str, Callable[[], object]]:
    """``first`` = 1: memory that is not aligned."""
    weights = [torch.zeros(1_000_000, dtype=dtype)[first:] for _ in range(count)]
    masks = [torch.zeros(1_000_000, dtype=torch.bool)[first:] for _ in range(count)]
    number, ties = torch.tensor(5), torch.zeros(count, dtype=torch.int64)
    name = f"{str(dtype).removeprefix('torch.')}{', not aligned' if first else ''}"
    return {
        f"topk_mask {name}": lambda: topk_mask.topk_mask_(masks, weights, number),
        f"magnitude_histogram {name}": lambda: topk_mask.magnitude_histogram(weights, 1, number),
        f"mask_at_threshold {name}": lambda: topk_mask.mask_at_threshold_(masks, weights, number, ties),
    }


def groups(keep: int, group: int) -> Callable[[], object]:
    mask, weight = torch.zeros(512, 512, dtype=torch.bool), torch.zeros(512, 512)
    return lambda: group_mask.group_mask_(mask, weight, keep, group)


def packing(bits: int) -> dict[str, Callable[[], object]]:
    q, packed = torch.zeros(1 << 20, dtype=torch.int8), torch.zeros(bits << 17, dtype=torch.uint8)
    return {
        f"pack_ints {bits}": lambda: int4.pack_ints(q, bits),
        f"unpack_ints {bits}": lambda: int4.unpack_ints(packed, 1 << 20, bits),
    }


def tf32(cases: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    def with_tf32(run: Callable[[], object]) -> Callable[[], object]:
        def inner() -> None:
            settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
            for setting in settings:
                setting.fp32_precision = "tf32"
            run()
            for setting in settings:
                setting.fp32_precision = "ieee"

        return inner

    return {name.replace("float32", "tf32"): with_tf32(run) for name, run in cases.items()}


CASES: dict[str, Callable[[], object]] = {
    **all_layers(FP32),
    **all_layers(BF16),
    **all_layers(FP32, steps=256),
    "dual weight gradient": lambda: dual_weight.dual_weight_backward(
        layer()[0], layer()[0], *layer()[:3], 4, clipped=True
    ),
    **linear(BF16),
    **linear(BF16, steps=4096),
    **linear(FP16),
    **tf32(linear(FP32)),
    **linear(FP32, count=16),
    "dual_linear of one row": lambda: dual_forward.dual_linear(rows(1, 64, BF16), *layer((64, 64)), None, False),
    "dual_linear dw of one row": lambda: dual_forward.dual_linear_backward(
        rows(1, 64, BF16), rows(1, 64, BF16), *layer((64, 64)), False, False, False, True
    ),
    "fake_quant of rows of any length": lambda: fake_quant.fake_quant_all(*uneven(), FP32),
    "fake_quant backward of rows of any length": lambda: fake_quant.fake_quant_all_backward(
        uneven()[0], *uneven(), True, True, True, True
    ),
    **convolution(BF16),
    **convolution(BF16, channels_last=True),
    **convolution(FP16),
    **tf32(convolution(FP32)),
    **tf32(convolution(FP32, channels_last=True)),
    **convolution(FP32),
    **selection(FP32),
    **selection(BF16),
    **selection(FP32, first=1),
    "group_mask 2:4": groups(2, 4),
    "group_mask 8:16": groups(8, 16),
    **packing(3),
    **packing(4),
    "pack_bits": lambda: int4.pack_bits(torch.zeros(1 << 20, dtype=torch.bool)),
    "unpack_bits": lambda: int4.unpack_bits(torch.zeros(1 << 17, dtype=torch.uint8), 1 << 20),
}


def left_out(name: str, architecture: int) -> bool:
    """Triton 3.6 gives Blackwell tf32 products where ieee is asked for; launch.py does not send them there."""
    return architecture >= 100 and name.startswith(("dual_linear", "dual_conv2d")) and name.endswith("float32")


def main(architecture: int) -> None:
    operands.multiprocessors = lambda device: 132  # type: ignore[assignment]
    launch.capability = lambda device: architecture
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    summaries = []
    with compiled_only(architecture) as launches:
        for name, run in CASES.items():
            launches.clear()
            if left_out(name, architecture):
                continue
            run()
            summaries += [{"case": name, **launch.summary()} for launch in launches]
    print(json.dumps(summaries))


if __name__ == "__main__":
    main(int(sys.argv[1]))
