"""The operations as the dispatcher sees them: equal to the reference for any layout, traceable, safe to call raw."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DEVICES,
    DTYPES,
    STE,
    Case,
    assert_within,
    normal_like,
    on_threads,
    quantizer_inputs,
    same_bits,
    step_gradient_magnitude,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqk_fast import dispatch, dual_ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def backwards(t: Tensor) -> tuple[int, ...]:
    return tuple(reversed(range(t.dim())))


# What a layer's tensors may look like in memory; each takes and gives values of the same shape.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "reversed": lambda t: t.permute(backwards(t)).contiguous().permute(backwards(t)),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "every other": lambda t: torch.stack([t, torch.full_like(t, True)], -1)[..., 0],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], True), t])[1:] if t.dim() else t,
}


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Weight, mask, step, upstream gradient and bits, of any shape, layout and dtype."""
    shape = draw(st.one_of(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.just((3, 70_001))))
    case = Case(shape, step=draw(st.sampled_from(["[]", "[1]", *(["[C]"] if shape else [])])))
    bits = draw(st.integers(2, 8))
    weight, mask, step = quantizer_inputs(case, bits, seed=draw(st.integers(0, 99)))
    grad = normal_like(weight)
    dtype, grad_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    place = [LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))] for _ in range(3)]
    return place[0](weight.to(dtype)), place[1](mask), step, place[2](grad.to(grad_dtype)), bits


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    with on_threads(request.param):
        yield request.param


@pytest.mark.usefixtures("threads")
class TestAnyLayer:
    """Hypothesis' examples, for one and two threads."""

    @given(layer=layers(), dtype=st.sampled_from(DTYPES))
    def test_fake_quant(self, layer: tuple, dtype: torch.dtype) -> None:
        weight, mask, step, _, bits = layer
        out = dispatch.fake_quant(weight, mask, step, bits, dtype)
        same_bits(out, reference.fake_quant(weight, mask, step, bits, dtype))
        assert out.stride() == torch.empty_like(weight).stride()

    @given(
        layer=layers(), ste=st.sampled_from(STE), wanted=st.sampled_from([(True, True), (True, False), (False, True)])
    )
    def test_fake_quant_backward(self, layer: tuple, ste: tuple[str, bool], wanted: tuple[bool, bool]) -> None:
        weight, mask, step, grad, bits = layer
        estimator, masked = ste
        made = dispatch.fake_quant_backward(grad, weight, mask, step, bits, estimator == "clipped", masked, *wanted)
        expected = reference.fake_quant_backward(grad, weight, mask, step, bits, estimator, masked)
        if wanted[0]:
            assert torch.equal(made[0], expected[0])
            assert made[0].dtype == weight.dtype
            assert made[0].stride() == torch.empty_like(weight).stride()
        else:
            assert made[0].numel() == 0
        if wanted[1]:
            assert_within(made[1], expected[1], step_gradient_magnitude(grad, weight, mask, step, bits), torch.float32)
            assert made[1].dtype == torch.float32
        else:
            assert made[1].numel() == 0

    @given(layer=layers(), teacher=st.sampled_from(DTYPES), clipped=st.booleans())
    def test_dual_weight_backward(self, layer: tuple, teacher: torch.dtype, clipped: bool) -> None:
        weight, mask, step, grad, bits = layer
        other = normal_like(weight, seed=5).to(teacher)
        made = dispatch.dual_weight_backward(grad, other, weight, mask, step, bits, clipped)
        student = reference.fake_quant_backward(grad, weight, mask, step, bits, "clipped" if clipped else "identity")[0]
        assert torch.equal(made, torch.where(mask, student, other.to(weight.dtype)))


def test_the_number_of_threads_changes_no_bit_of_the_step_gradient() -> None:
    weight, mask, step = quantizer_inputs(Case((7, 100_003), step="[C]"))
    grad = normal_like(weight)
    results = []
    for count in (1, 2, 3):
        with on_threads(count):
            results.append(dispatch.fake_quant_backward(grad, weight, mask, step, 4, True, True, True, True))
    assert all(torch.equal(a, b) for made in results[1:] for a, b in zip(made, results[0], strict=True))


def test_large_results_that_bypass_the_caches() -> None:
    """From 24 MiB on outputs are streamed; blocks of odd length and outputs at odd addresses are not."""
    for shape in ((6_500_000,), (6_500_003,), (1625, 4001)):
        weight, mask, step = quantizer_inputs(Case(shape, step="[C]" if len(shape) > 1 else "[1]"))
        same_bits(
            dispatch.fake_quant(weight, mask, step, 4, torch.float32), reference.fake_quant(weight, mask, step, 4)
        )


def arguments(case: Case, dtype: torch.dtype, device: str) -> dict[Any, tuple]:
    """For each operation what it may be called with."""
    weight, mask, step = quantizer_inputs(case, 4, dtype, device)
    grad = normal_like(weight)
    images = normal_like(torch.empty(3, 5, 4, 2, device=device)).contiguous(memory_format=torch.channels_last)
    scale = torch.linspace(1, 2, 5, device=device)
    # x [2B, in] in another dtype than the weight, as under autocast; upstream gradients first
    products = quantizer_inputs(Case((5, 7), step=case.step), 4, dtype, device)
    linear = (normal_like(images[:, :, 0, 0].new_empty(6, 5)), normal_like(images.new_empty(6, 7)), *products, 4)
    kernels = quantizer_inputs(Case((5, 3, 3, 2), step=case.step), 4, dtype, device)
    kernel = (normal_like(images.new_empty(4, 5, 3, 4)), normal_like(images.new_empty(4, 3, 6, 5)), *kernels, 4)
    convolution = ([2, 1], [1, 0], [1, 1], 1)
    lists = ([weight, weight.clone()], [mask, mask.clone()], [step, step.clone()])
    return {
        dispatch.fake_quant: (weight, mask, step, 4, torch.bfloat16),
        dispatch.fake_quant_all: (*lists, [4, 2], torch.float32),
        dispatch.fake_quant_backward: (grad, weight, mask, step, 4, True, True, True, True),
        dispatch.fake_quant_all_backward: ([grad, grad.clone()], *lists, [4, 2], False, True, True, False),
        dispatch.dual_weight_backward: (grad, grad + 1, weight, mask, step, 4, True),
        dual_ops.dual_linear: (*linear[1:], scale, False),
        dual_ops.dual_linear_backward: (*linear, True, True, True, True),
        dual_ops.dual_conv2d: (*kernel[1:], scale, *convolution, True),
        dual_ops.dual_conv2d_backward: (*kernel, *convolution, False, False, True, True),
        dispatch.topk_mask_: (lists[1], lists[0], torch.tensor(weight.numel(), device=device)),
        dispatch.group_mask_: (
            mask[None, None].expand(1, 4, *mask.shape).contiguous(),
            torch.stack([weight] * 4)[None],
            2,
            4,
        ),
        dispatch.magnitude_histogram: (lists[0], 1, torch.tensor(1016, device=device)),
        dispatch.tie_counts: (lists[0], torch.tensor(0x3F800000, device=device)),
        dispatch.mask_at_threshold_: (
            lists[1],
            lists[0],
            torch.tensor(0, device=device),
            torch.tensor([1, 0], device=device),
        ),
        dispatch.batch_norm: (images, scale, None, 1e-5),
        dispatch.batch_norm_backward: (images + 1, images, scale, scale - 1, scale),
        dispatch.relu_avg_pool2d: (images, 3, 1),
        dispatch.relu_avg_pool2d_backward: (images[:, :, :1] + 1, images, 3, 1),
        dispatch.sparse_conv2d: (
            images,
            torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device),
            torch.tensor([0, 9, 30], dtype=torch.int32, device=device),
            scale[:3],
            None,
            [2, 2, 1, 1, 0, 0],
            False,
        ),
        dispatch.pack_ints: ((4 * grad).clamp(-8, 7).to(torch.int8), 4),
        dispatch.unpack_ints: (torch.arange(grad.numel() * 3, device=device).to(torch.uint8), grad.numel() * 8, 3),
        dispatch.pack_bits: (mask,),
        dispatch.unpack_bits: (torch.arange(grad.numel(), device=device).to(torch.uint8), grad.numel() * 8),
    }


OPERATIONS = list(arguments(CASES[0], torch.float32, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[10], CASES[12], CASES[14], CASES[18]], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_opcheck(operation: Any, case: Case, dtype: torch.dtype, device: str) -> None:
    torch.library.opcheck(operation, arguments(case, dtype, device)[operation])


def on_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), value)


@pytest.mark.parametrize("case", [CASES[4], CASES[12], CASES[18]], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_shapes_without_data(operation: Any, case: Case) -> None:
    """On the meta device, which is all that tracing for a GPU that is not there needs."""
    inputs = arguments(case, torch.float32, "cpu")[operation]
    made, real = operation(*on_meta(inputs)), operation(*inputs)
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (made, real)), strict=True):
        if isinstance(other, Tensor):
            assert (one.device.type, one.shape, one.dtype) == ("meta", other.shape, other.dtype)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("batched", [(True, True, True), (True, False, False), (False, True, False)])
def test_vmap_is_the_definition(batched: tuple[bool, ...], dim: int) -> None:
    layers = [quantizer_inputs(Case((13, 31)), seed=i) for i in range(3)]
    dims = [dim if is_batched and i < 2 else (0 if is_batched else None) for i, is_batched in enumerate(batched)]
    inputs = [torch.stack([layer[i] for layer in layers], dims[i]) if batched[i] else layers[0][i] for i in range(3)]
    made = torch.vmap(lambda w, m, s: dispatch.fake_quant(w, m, s, 4, torch.float32), tuple(dims))(*inputs)
    for index in range(3):
        same_bits(made[index], reference.fake_quant(*(layers[index if b else 0][i] for i, b in enumerate(batched)), 4))


W, M, S = quantizer_inputs(Case((4, 3)))
HOSTILE = [
    (dispatch.fake_quant, (W, M[:, :2], S, 4, torch.float32), "mask must be bool of the weight's shape"),
    (dispatch.fake_quant, (W, M.float(), S, 4, torch.float32), "mask must be bool of the weight's shape"),
    (dispatch.fake_quant, (W, M, S.expand(3), 4, torch.float32), "step must have one value or 4, got 3"),
    (dispatch.fake_quant, (W, M, S, 9, torch.float32), r"bits must be in 2\.\.8, got 9"),
    (dispatch.fake_quant, (W, M, S, -(2**62), torch.float32), r"bits must be in 2\.\.8"),
    (dispatch.fake_quant, (W.double(), M, S, 4, torch.float32), "weight must be fp32, bf16 or fp16, got Double"),
    (dispatch.fake_quant, (W, M, S, 4, torch.int8), "dtype must be fp32, bf16 or fp16, got Char"),
    (dispatch.fake_quant_all, ([W], [M, M], [S], [4], torch.float32), "one entry for each layer, got 1, 2, 1 and 1"),
    (dispatch.fake_quant_all, ([W, W], [M, M], [S, S], [4], torch.float32), "got 2, 2, 2 and 1"),
    (dispatch.fake_quant_backward, (W[:3], W, M, S, 4, True, True, True, True), "grad must be on the CPU and of the w"),
    (dispatch.fake_quant_backward, (W.int(), W, M, S, 4, True, True, True, True), "grad must be fp32, bf16 or fp16"),
    (dispatch.fake_quant_all_backward, ([], [W], [M], [S], [4], True, True, True, True), "expected 1 gradients, got 0"),
    (dispatch.pack_ints, (torch.zeros(4), 4), "q must be int8"),
    (dispatch.pack_ints, (torch.zeros(4, dtype=torch.int8), 9), r"bits must be in 2\.\.8, got 9"),
    (dispatch.pack_ints, (torch.tensor([8], dtype=torch.int8), 4), "expected values of 4 bits"),
    (dispatch.pack_bits, (torch.zeros(4, dtype=torch.uint8),), "mask must be bool"),
    *[
        (
            dispatch.unpack_ints,
            (torch.zeros(n, dtype=torch.uint8), numel, bits),
            f"{numel} values of {bits} bits do not",
        )
        for n, numel, bits in [
            (4, 9, 4),
            (4, 6, 4),
            (0, 1, 8),
            (4, -1, 4),
            (0, -8, 8),
            (0, 2**62, 8),
            (4, 2**63 - 1, 2),
        ]
    ],
    (dispatch.unpack_ints, (torch.zeros(4, dtype=torch.uint8), 4, 2**40), r"bits must be in 2\.\.8"),
    (dispatch.unpack_ints, (torch.zeros(4, dtype=torch.int8), 8, 4), "packed must be flat uint8"),
    (dispatch.unpack_ints, (torch.zeros(4, 1, dtype=torch.uint8), 8, 4), "packed must be flat uint8"),
    (dispatch.unpack_bits, (torch.zeros(1, dtype=torch.uint8), 9), "9 values of 1 bits do not"),
    (dispatch.unpack_bits, (torch.zeros(0, dtype=torch.uint8), -7), "-7 values of 1 bits do not"),
    (dispatch.dual_weight_backward, (W, W[0], W, M, S, 4, True), "grad must be on the CPU and of the weight's shape"),
]


@pytest.mark.native
@pytest.mark.parametrize(("operation", "args", "message"), HOSTILE, ids=[f"{o}: {m}" for o, _, m in HOSTILE])
def test_raw_calls_stay_within_memory(operation: Any, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operation(*args)


def test_every_operation_is_checked() -> None:
    found = [*vars(dispatch).items(), *vars(dual_ops).items()]
    defined = {name for name, value in found if isinstance(value, torch._ops.OpOverload) and name[0] != "_"}
    assert {re.sub(r"^pqk_fast::|\.default$", "", operation.name()) for operation in OPERATIONS} == defined
