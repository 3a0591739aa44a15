"""bfloat16 in Triton's interpreter (3.6): it truncates where GPUs round, garbles denormals and multiplies the bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16 as uint16, rounded half to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16)
    return rounded.numpy().view(np.uint16).reshape(values.shape)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mend() -> None:
    """Make conversions from and to bf16 right, and products of bf16 multiply values, summed in fp32."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return TensorHandle(from_bf16(source.data), tl.float32)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [TensorHandle(from_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_trunc = InterpreterBuilder.create_fp_ext = cast_impl
