"""The launchers of fake_quant themselves, on a GPU or interpreted: lists of layers, tickets, flags.

The arithmetic is tested through the operations (test_fake_quant.py), which run on these kernels on a GPU, and on the
CPU where there is no C++ library and Triton is interpreted.
"""

from collections.abc import Iterator

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    KERNEL_DEVICE,
    STE,
    Case,
    assert_within,
    needs_triton,
    normal_like,
    on_kernel_device,
    quantizer_inputs,
    same_bits,
    step_gradient_magnitude,
)

needs_triton()

from pqk_fast import dispatch, gpu, reference
from pqk_fast.triton_kernels import blocks, operands
from pqk_fast.triton_kernels import fake_quant as kernels

pytestmark = on_kernel_device
poisoned = pytest.mark.usefixtures("poisoned_memory")
DEVICE = KERNEL_DEVICE


@pytest.fixture(autouse=True)
def _flags_down() -> Iterator[None]:
    operands.error_flags(DEVICE).zero_()
    yield
    operands.error_flags(DEVICE).zero_()


def some_layers(count: int, dtype: torch.dtype = torch.float32) -> list[list]:
    """Layers of all cases in turn; some share a step size, some have one a channel."""
    cases = [CASES[i % len(CASES)] for i in range(count)]
    made = [quantizer_inputs(case, 2 + i % 7, dtype, DEVICE.type, seed=i) for i, case in enumerate(cases)]
    return [list(each) for each in zip(*made, strict=True)] + [[2 + i % 7 for i in range(count)]]


@poisoned
@pytest.mark.parametrize("count", [1, 7, 8, 9, 150])
def test_layers_of_any_number_and_kind(count: int) -> None:
    """More than a launch takes; a step size each, and one a channel, side by side."""
    lists = some_layers(count)
    made = kernels.fake_quant_all(*lists, torch.float32)
    for out, *layer in zip(made, *lists, strict=True):
        same_bits(out, reference.fake_quant(*layer))
        assert out.stride() == torch.empty_like(layer[0]).stride()


@poisoned
@pytest.mark.parametrize(("ste", "mask_gradients"), STE)
def test_gradients_of_many_layers(ste: str, mask_gradients: bool) -> None:
    lists = some_layers(40)
    grads = [normal_like(weight, seed=i) for i, weight in enumerate(lists[0])]
    flags = (ste == "clipped", mask_gradients, True, True)
    for _ in range(2):  # the tickets must have gone back to zero
        grad_weights, grad_steps = kernels.fake_quant_all_backward(grads, *lists, *flags)
        for grad, of_weight, of_step, *layer in zip(grads, grad_weights, grad_steps, *lists, strict=True):
            expected, expected_step = reference.fake_quant_backward(grad, *layer, ste, mask_gradients)
            assert torch.equal(of_weight, expected)
            assert of_weight.stride() == torch.empty_like(layer[0]).stride()
            assert_within(of_step, expected_step, step_gradient_magnitude(grad, *layer), torch.float32)
        assert all(not tickets.any() for tickets in operands._counters.values())


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", ["[1]", "[C]"])
def test_many_programs_share_a_step(steps: str, dtype: torch.dtype) -> None:
    weight, mask, step = quantizer_inputs(Case((5, 10_007), step=steps), 4, dtype, DEVICE.type)
    grad = normal_like(weight).to(torch.float32)
    made, of_step = kernels.fake_quant_backward(grad, weight, mask, step, 4, True, False, True, True)
    expected, expected_step = reference.fake_quant_backward(grad, weight, mask, step, 4, "clipped")
    assert torch.equal(made, expected)
    assert_within(of_step, expected_step, step_gradient_magnitude(grad, weight, mask, step, 4), torch.float32)
    again = kernels.fake_quant_backward(grad, weight, mask, step, 4, True, False, True, True)
    assert torch.equal(of_step, again[1])


@poisoned
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_steps_that_clip_everything_and_nothing(scale: float, kept: bool) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)), device=DEVICE.type)
    mask.fill_(kept)
    same_bits(
        kernels.fake_quant(weight, mask, step * scale, 4, torch.float32),
        reference.fake_quant(weight, mask, step * scale, 4),
    )
    for need_weight, need_step in [(True, False), (False, True)]:
        made = kernels.fake_quant_backward(weight, weight, mask, step * scale, 4, True, False, need_weight, need_step)
        expected = reference.fake_quant_backward(weight, weight, mask, step * scale, 4, "clipped")
        for needed, one, other in zip((need_weight, need_step), made, expected, strict=True):
            assert one.numel() == (other.numel() if needed else 0)
        if need_weight:
            assert torch.equal(made[0], expected[0])


@poisoned
@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[6], CASES[10], CASES[14], CASES[18]], ids=str)
def test_the_bits_are_those_of_the_cpp_library(case: Case, dtype: torch.dtype) -> None:
    weight, mask, step = quantizer_inputs(case, 4, dtype)
    grad = normal_like(weight)
    there = [tensor.to(DEVICE) for tensor in (weight, mask, step)]
    for out in DTYPES:
        made = kernels.fake_quant(*there, 4, out)
        same_bits(made.cpu(), dispatch.fake_quant(weight, mask, step, 4, out))
    settings = (4, True, True, True, False)
    made, _ = kernels.fake_quant_backward(grad.to(DEVICE), *there, *settings)
    assert torch.equal(made.cpu(), dispatch.fake_quant_backward(grad, weight, mask, step, *settings)[0])


@poisoned
def test_a_list_of_mixed_dtypes() -> None:
    dtypes = [*DTYPES, *DTYPES]
    layers = [quantizer_inputs(Case((13, 31)), 4, dtype, DEVICE.type, seed=i) for i, dtype in enumerate(dtypes)]
    lists = [list(each) for each in zip(*layers, strict=True)]
    made = kernels.fake_quant_all(*lists, [4] * 6, torch.bfloat16)
    for out, layer in zip(made, layers, strict=True):
        same_bits(out, reference.fake_quant(*layer, 4, torch.bfloat16))


@poisoned
@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("steps", ["[1]", "[C]"])
def test_a_bad_step_raises_the_flag(steps: str, bad: float) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31), step=steps), device=DEVICE.type)
    kernels.fake_quant(weight, mask, step, 4, torch.float32)
    assert not gpu.errors(DEVICE)
    step[-1] = bad
    kernels.fake_quant(weight, mask, step, 4, torch.float32)
    assert gpu.errors(DEVICE)
    assert not gpu.errors(DEVICE), "reading the flag lowers it"
    kernels.fake_quant_backward(weight, weight, mask, step, 4, False, False, False, True)
    assert gpu.errors(DEVICE)


@poisoned
def test_non_finite_weights_give_what_the_definition_gives() -> None:
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -0.0, torch.nan], device=DEVICE)
    mask = torch.tensor([True, True, True, True, True, False], device=DEVICE)
    step = torch.tensor([0.5], device=DEVICE)
    made, expected = (f(weight, mask, step, 4, torch.float32) for f in (kernels.fake_quant, reference.fake_quant))
    assert torch.equal(made.nan_to_num(77.0), expected.nan_to_num(77.0))
    grads = kernels.fake_quant_backward(weight, weight, mask, step, 4, True, False, True, True)
    expected = reference.fake_quant_backward(weight, weight, mask, step, 4, "clipped")
    for one, other in zip(grads, expected, strict=True):
        assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))


@pytest.mark.parametrize("steps", ["[1]", "[C]"])
def test_more_weights_than_32_bits_count(monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    """Only the last programs of a launch: the memory before their tiles is reserved, but never touched."""
    rows, columns = 3, 2**30 + 100
    tail = quantizer_inputs(Case((1, 5000)), 4, torch.float16, DEVICE.type)
    weight, mask = (torch.empty(rows, columns, dtype=t.dtype, device=DEVICE) for t in tail[:2])
    weight[-1, -5000:], mask[-1, -5000:] = tail[0][0], tail[1][0]
    step = torch.full((rows,), float(tail[2]), device=DEVICE) if steps == "[C]" else tail[2]
    table = blocks.table_of
    monkeypatch.setattr(blocks, "table_of", lambda *settings: table(*settings)[-4:].clone())
    out = kernels.fake_quant(weight, mask, step, 4, torch.float16)
    same_bits(out[-1, -3000:], reference.fake_quant(*tail, 4)[0, -3000:])
    made, _ = kernels.fake_quant_backward(weight, weight, mask, step, 4, True, False, True, False)
    expected, _ = reference.fake_quant_backward(tail[0], *tail, 4, "clipped")
    assert torch.equal(made[-1, -3000:], expected[0, -3000:])
    table.cache_clear()  # of a million rows


@poisoned
@pytest.mark.parametrize("need_weight", [False, True])
def test_rows_that_are_no_whole_loads_beside_those_that_are(need_weight: bool) -> None:
    """A step a channel and one for all, in one launch; layers lie in memory between NaN that must not be read."""
    shapes = [(Case((64, 32), step="[C]"), 4), (Case((1, 37)), 4), (Case((5, 27), step="[C]"), 3)]
    made = [quantizer_inputs(case, bits, device=DEVICE.type, seed=i) for i, (case, bits) in enumerate(shapes)]
    framed = []
    for weight, _, _ in made:
        frame = torch.full((weight.numel() + 128,), torch.nan, device=DEVICE)
        framed.append(frame[64 : 64 + weight.numel()].view(weight.shape).copy_(weight))
    lists = [framed, [mask for _, mask, _ in made], [step for _, _, step in made], [bits for _, bits in shapes]]
    for out, *layer in zip(kernels.fake_quant_all(*lists, torch.float32), *lists, strict=True):
        same_bits(out, reference.fake_quant(*layer))
    grads = [normal_like(weight, seed=i) for i, weight in enumerate(framed)]
    _, grad_steps = kernels.fake_quant_all_backward(grads, *lists, True, False, need_weight, True)
    for grad, of_step, *layer in zip(grads, grad_steps, *lists, strict=True):
        _, expected = reference.fake_quant_backward(grad, *layer, "clipped")
        assert_within(of_step, expected, step_gradient_magnitude(grad, *layer), torch.float32)


def test_first_used_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for later calls must not belong to the mode of the first."""
    monkeypatch.setattr(operands, "_flags", {})
    monkeypatch.setattr(operands, "_counters", {})
    weight, mask, step = quantizer_inputs(Case((13, 31)), device=DEVICE.type)
    with torch.inference_mode():
        kernels.fake_quant_backward(weight, weight, mask, -step, 4, False, False, False, True)
    assert gpu.errors(DEVICE)
    assert not gpu.errors(DEVICE)
