"""The operations as torch's dispatcher knows them: schema, shapes for tracing, and one implementation a device.

What stands here runs on any device, in plain PyTorch by :mod:`pqk_fast.reference`; the C++ library registers itself for
the CPU on top, and :mod:`pqk_fast.gpu` knows the Triton kernels for CUDA. Nothing here knows gradients
(:mod:`pqk_fast.autograd` does) or explains bad input (:mod:`pqk_fast.ops` does); the C++ functions check again what
they need to stay within memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pqk_fast import gpu, native, reference

_LIBRARY = torch.library.Library("pqk_fast", "DEF")


def define(
    schema: str, plain: Callable[..., Any], fake: Callable[..., Any], fuses: Callable[..., bool] = lambda *_: True
) -> Any:
    """Define an operation by its schema, its implementation in plain PyTorch and its fake; gives the operation.

    ``fuses`` says for which arguments the Triton kernel, where there is one, is the better way.
    """
    name = _LIBRARY.define(schema)

    def run(*args: Any) -> Any:
        first = next(iter(args[0]), None) if isinstance(args[0], list) else args[0]
        if first is not None and first.device.type == "cpu":
            native.warn_of_fallback()
        with torch.no_grad():
            return plain(*args)

    def run_on_gpu(*args: Any) -> Any:
        launcher = gpu.launcher(name)
        with torch.no_grad():
            return launcher(*args) if launcher and fuses(*args) else plain(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if name in gpu.LAUNCHERS:
        interpreted = native.library().path is None and gpu.interpreted()
        _LIBRARY.impl(name, run_on_gpu, "CPU" if interpreted else "CUDA")
    torch.library.register_fake(f"pqk_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.pqk_fast, name).default


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with the strides of ``torch.empty_like(like)``, which every implementation's result has."""
    out = torch.empty_like(like, dtype=values.dtype)
    return values if values.stride() == out.stride() else out.copy_(values)


def _fake_quant(weight: Tensor, mask: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return _laid_out(reference.fake_quant(weight, mask, step, bits, dtype), weight)


def _fake_quant_shape(weight: Tensor, mask: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _backward(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    clipped: bool,
    mask_gradients: bool,
    need_weight: bool,
    need_step: bool,
) -> tuple[Tensor, Tensor]:
    ste = "clipped" if clipped else "identity"
    grad_weight, grad_step = reference.fake_quant_backward(grad, weight, mask, step, bits, ste, mask_gradients)
    return (
        _laid_out(grad_weight, weight) if need_weight else weight.new_empty(0),
        grad_step if need_step else step.new_empty(0, dtype=torch.float32),
    )


def _backward_shape(grad: Tensor, weight: Tensor, mask: Tensor, step: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, need_weight, need_step = settings
    return (
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        step.new_empty(step.shape if need_step else 0, dtype=torch.float32),
    )


def _for_each_layer(one: Callable[..., Any], lists: int) -> Callable[..., list[Any]]:
    """``one`` for every layer: the first ``lists`` arguments are lists with an entry a layer, the others common."""

    def every(*args: Any) -> list[Any]:
        return [one(*layer, *args[lists:]) for layer in zip(*args[:lists], strict=True)]

    return every


def _only_needed(every: Callable[..., list[Any]]) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    def split(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
        *_, need_weight, need_step = args
        pairs = every(*args)
        return [w for w, _ in pairs if need_weight], [s for _, s in pairs if need_step]

    return split


fake_quant = define(
    "fake_quant(Tensor weight, Tensor mask, Tensor step, int bits, ScalarType dtype) -> Tensor",
    _fake_quant,
    _fake_quant_shape,
)

# Gradients that are not needed come back as an empty tensor, or list.
fake_quant_backward = define(
    "fake_quant_backward(Tensor grad, Tensor weight, Tensor mask, Tensor step, int bits, bool clipped, "
    "bool mask_gradients, bool need_weight, bool need_step) -> (Tensor, Tensor)",
    _backward,
    _backward_shape,
)

fake_quant_all = define(
    "fake_quant_all(Tensor[] weights, Tensor[] masks, Tensor[] steps, int[] bits, ScalarType dtype) -> Tensor[]",
    _for_each_layer(_fake_quant, 4),
    _for_each_layer(_fake_quant_shape, 4),
)

fake_quant_all_backward = define(
    "fake_quant_all_backward(Tensor[] grads, Tensor[] weights, Tensor[] masks, Tensor[] steps, int[] bits, "
    "bool clipped, bool mask_gradients, bool need_weight, bool need_step) -> (Tensor[], Tensor[])",
    _only_needed(_for_each_layer(_backward, 5)),
    _only_needed(_for_each_layer(_backward_shape, 5)),
)


def _dual_weight_backward(
    grad_student: Tensor,
    grad_teacher: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    clipped: bool,
) -> Tensor:
    ste = "clipped" if clipped else "identity"
    student, _ = reference.fake_quant_backward(grad_student, weight, mask, step, bits, ste)
    return _laid_out(torch.where(mask, student, grad_teacher.to(weight.dtype)), weight)


dual_weight_backward = define(
    "dual_weight_backward(Tensor grad_student, Tensor grad_teacher, Tensor weight, Tensor mask, Tensor step, "
    "int bits, bool clipped) -> Tensor",
    _dual_weight_backward,
    lambda grad_student, grad_teacher, weight, *_: torch.empty_like(weight),
)


def _unless_not_finite(masks: list[Tensor], weights: list[Tensor], chosen: list[Tensor]) -> Tensor:
    """Write the masks; but if a tensor holds NaN or infinity only give its index. No device waits for the host."""
    finite = torch.stack([weight.isfinite().all() for weight in weights])
    for mask, choice in zip(masks, chosen, strict=True):
        mask.copy_(torch.where(finite.all(), choice, mask))
    return torch.where(finite.all(), -1, finite.int().argmin())


def _topk_mask_(masks: list[Tensor], weights: list[Tensor], keep: Tensor) -> Tensor:
    return _unless_not_finite(masks, weights, reference.topk_mask(weights, keep))


def _group_mask_(mask: Tensor, weight: Tensor, keep: int, group: int) -> Tensor:
    return _unless_not_finite([mask], [weight], [reference.group_mask(weight, keep, group)])


def _mask_at_threshold_(masks: list[Tensor], weights: list[Tensor], threshold: Tensor, ties_kept: Tensor) -> None:
    for mask, chosen in zip(masks, reference.mask_at_threshold(weights, threshold, ties_kept), strict=True):
        mask.copy_(chosen)


# Both return an int64 []: -1, or the index of the first weight that cannot be ranked; then the masks are as before.
# Called here, they do not raise the masks' version counters; pqk_fast.selection does.
topk_mask_ = define(
    "topk_mask_(Tensor(a!)[] masks, Tensor[] weights, Tensor keep) -> Tensor",
    _topk_mask_,
    lambda masks, weights, keep: weights[0].new_empty((), dtype=torch.int64),
)
group_mask_ = define(
    "group_mask_(Tensor(a!) mask, Tensor weight, int keep, int group) -> Tensor",
    _group_mask_,
    lambda mask, weight, keep, group: mask.new_empty((), dtype=torch.int64),
)

# The steps of topk_mask_ for weights that are spread over processes; see ops.topk_threshold.
magnitude_histogram = define(
    "magnitude_histogram(Tensor[] weights, int level, Tensor prefix) -> Tensor",
    reference.magnitude_histogram,
    lambda weights, level, prefix: prefix.new_empty(2 ** reference.RADIX_BITS[level], dtype=torch.int64),
)
tie_counts = define(
    "tie_counts(Tensor[] weights, Tensor threshold) -> Tensor",
    reference.tie_counts,
    lambda weights, threshold: threshold.new_empty(len(weights), dtype=torch.int64),
)
mask_at_threshold_ = define(
    "mask_at_threshold_(Tensor(a!)[] masks, Tensor[] weights, Tensor threshold, Tensor ties_kept) -> ()",
    _mask_at_threshold_,
    lambda masks, weights, threshold, ties_kept: None,
)


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise RuntimeError(f"expected {expected}")


def _pack_ints(q: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    _require(q.numel() == 0 or -half <= int(q.min()) <= int(q.max()) < half, f"values of {bits} bits")
    return reference.pack_ints(q, bits)


def _bytes_of(values: Tensor, bits: int = 1) -> Tensor:
    return values.new_empty((values.numel() * bits + 7) // 8, dtype=torch.uint8)


# q: int8. The layout is documented in reference.pack_ints and csrc/int4.h.
pack_ints = define("pack_ints(Tensor q, int bits) -> Tensor", _pack_ints, _bytes_of)
unpack_ints = define(
    "unpack_ints(Tensor packed, int numel, int bits) -> Tensor",
    reference.unpack_ints,
    lambda packed, numel, bits: packed.new_empty(numel, dtype=torch.int8),
)
pack_bits = define("pack_bits(Tensor mask) -> Tensor", reference.pack_bits, _bytes_of)
unpack_bits = define(
    "unpack_bits(Tensor packed, int numel) -> Tensor",
    reference.unpack_bits,
    lambda packed, numel: packed.new_empty(numel, dtype=torch.bool),
)


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    out, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
    return _laid_out(out, x), mean, variance, rstd


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (weight, None, None, mean, rstd, True, 0.0, (True, True, True))
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(grad, x, *settings)
    return _laid_out(grad_x, x), grad_weight, grad_bias


# x: fp32 [B, C, ...]; the statistics fp32 [C]; the variance is the biased one. For channels_last on the CPU, where
# torch's own takes two to four times as long as for contiguous tensors.
batch_norm = define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm,
    lambda x, weight, bias, eps: (torch.empty_like(x), *(x.new_empty(x.shape[1]) for _ in range(3))),
)
batch_norm_backward = define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    lambda grad, x, weight, mean, rstd: (torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)),
)


def _relu_avg_pool2d(x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    return reference.relu_avg_pool2d(x, (kernel_height, kernel_width))


def _relu_avg_pool2d_backward(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    settings: tuple[Any, ...] = ([kernel_height, kernel_width], [], [0, 0], False, True, None)
    spread = torch.ops.aten.avg_pool2d_backward(grad, x, *settings)
    return _laid_out(torch.ops.aten.threshold_backward(spread, x, 0), x)


# x: fp32 [B, C, H, W]. For channels_last on the CPU, where it writes and reads half of what torch's two operations do.
relu_avg_pool2d = define(
    "relu_avg_pool2d(Tensor x, int kernel_height, int kernel_width) -> Tensor",
    _relu_avg_pool2d,
    _relu_avg_pool2d,
)
relu_avg_pool2d_backward = define(
    "relu_avg_pool2d_backward(Tensor grad, Tensor x, int kernel_height, int kernel_width) -> Tensor",
    _relu_avg_pool2d_backward,
    lambda grad, x, *_: torch.empty_like(x),
)


def _sparse_conv2d(
    x: Tensor, first: Tensor, offset: Tensor, value: Tensor, bias: Tensor | None, geometry: list[int], relu: bool
) -> Tensor:
    return reference.sparse_conv2d(x, first, offset, value, bias, geometry, relu)


def _sparse_conv2d_shape(x: Tensor, first: Tensor, *rest: Any) -> Tensor:
    *_, geometry, _ = rest
    sizes = [
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel, stride, padding in zip(x.shape[2:], geometry[:2], geometry[2:4], geometry[4:], strict=True)
    ]
    return x.new_empty(x.shape[0], first.numel() - 1, *sizes)


# x: fp32 [B, C, H, W]; first: int32 [outputs + 1], offset: int32 [taps], value: fp32 [taps]: see csrc/sparse_infer.h.
# geometry: the kernel's reach, stride and padding, two each. For inference: it has no gradient.
sparse_conv2d = define(
    "sparse_conv2d(Tensor x, Tensor first, Tensor offset, Tensor value, Tensor? bias, int[] geometry, bool relu) "
    "-> Tensor",
    _sparse_conv2d,
    _sparse_conv2d_shape,
)


def one_by_one(operation: Any) -> None:
    """What torch.vmap does with an operation: call it for each sample."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        inputs = list(zip(args, in_dims, strict=True))
        outs = [
            operation(*(arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in inputs))
            for index in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(each) for each in zip(*outs, strict=True)), (0,) * len(outs[0])

    torch.library.register_vmap(operation, batched, lib=_LIBRARY)


one_by_one(fake_quant)
one_by_one(fake_quant_backward)
one_by_one(dual_weight_backward)
one_by_one(batch_norm)
one_by_one(batch_norm_backward)
one_by_one(relu_avg_pool2d)
one_by_one(relu_avg_pool2d_backward)

native.library()
