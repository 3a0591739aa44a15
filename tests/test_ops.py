"""What holds for all operations: one compiled graph, and every refusal."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import (
    TOLERANCES,
    Case,
    assert_within,
    normal_like,
    quantizer_inputs,
    step_gradient_magnitude,
    with_gradients,
)
from torch import Tensor

from pqk_fast import ops
from pqk_fast.settings import ConfigError

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, *layer: ops.fake_quant(*layer),
        lambda x, *layer: ops.fake_quant(*layer, ste="clipped"),
        lambda x, *layer: ops.fake_quant(*layer, mask_gradients=True, dtype=torch.bfloat16),
        lambda x, *layer: torch.cat(ops.fake_quant_all(*[[value, value] for value in layer[:3]], bits=[4, 2])),
        lambda x, *layer: ops.teacher_weight(*layer),
        ops.dual_linear,
        lambda x, *layer: ops.dual_linear(x, *layer, teacher_weights="shared", ste="clipped"),
        lambda x, *layer: ops.dual_conv2d(
            x[..., None, None], layer[0][..., None, None], layer[1][..., None, None], *layer[2:]
        ),
    ],
    ids=["identity", "clipped", "masked-bf16", "all", "teacher", "dual_linear", "dual_linear-shared", "dual_conv2d"],
)
def test_compiles_as_one_graph(operation: Callable[..., Tensor]) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31), step="[C]"))
    rows = normal_like(torch.empty(6, 31), seed=2)

    def run(function: Callable[..., Tensor]) -> list[Tensor | None]:
        x, w, s = with_gradients(rows, weight.clone(), step.clone())
        out = function(x, w, mask, s, 4)
        out.backward(normal_like(out))
        return [out.detach(), x.grad, w.grad, s.grad]

    torch.compiler.reset()
    compiled, eager = run(torch.compile(operation, fullgraph=True, backend="aot_eager")), run(operation)
    assert eager[2].any()
    for value, expected in zip(compiled[:3], eager[:3], strict=True):
        assert (value is None) == (expected is None)
        assert expected is None or torch.equal(value, expected)
    assert (compiled[3] is None) == (eager[3] is None)
    if eager[3] is not None:  # the compiler is given the plain definition, which adds up in another order
        grads = normal_like(eager[0]).reshape(-1, *weight.shape)
        magnitude = sum(step_gradient_magnitude(grad, weight, mask, step, 4) for grad in grads)
        assert_within(compiled[3], eager[3], magnitude, torch.float32)


def test_selection_and_packing_compile_as_one_graph() -> None:
    weights = [normal_like(torch.empty(12, 8), seed) for seed in (1, 2)]
    masks = [torch.empty(12, 8, dtype=torch.bool) for _ in weights]

    def every(k: Tensor) -> list[Tensor]:
        ops.topk_mask_(masks, weights, k)
        group = ops.group_mask(weights[0], 2, 4)
        q = (weights[0] * 3).to(torch.int8)
        packed, bits = ops.pack_ints(q, 5), ops.pack_bits(group)
        return [
            masks[0].clone(), masks[1].clone(), group, packed, bits,
            ops.unpack_ints(packed, q.numel(), 5), ops.unpack_bits(bits, group.numel()),
            ops.magnitude_histogram(weights, 0, k * 0), ops.tie_counts(weights, k * 0),
        ]  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for kept in (20, 150):
        for value, expected in zip(compiled(torch.tensor(kept)), every(torch.tensor(kept)), strict=True):
            assert torch.equal(value, expected)
        assert sum(int(mask.sum()) for mask in masks) == kept


W, M, S = quantizer_inputs(Case((4, 3)))
X = torch.zeros(2, 3)
BYTES = torch.zeros(2, dtype=torch.uint8)
CALLS = {
    "fake_quant": ops.fake_quant,
    "fake_quant_all": lambda w, m, s, k, **options: ops.fake_quant_all([w], [m], [s], k, **options),
    "teacher_weight": ops.teacher_weight,
    "dual_linear": partial(ops.dual_linear, X),
    "dual_conv2d": partial(ops.dual_conv2d, torch.zeros(2, 3, 5, 5)),
}
QUANTIZER_ERRORS = [
    *[
        ((W, M, S, bits), ConfigError, rf"bits must be an integer in 2\.\.8, got {bits}")
        for bits in (1, 9, True, 4.0, -4)
    ],
    ((W, M.float(), S, 4), ValueError, r"mask must be bool .* \(4, 3\), got torch.float32 \(4, 3\)"),
    ((W, M.T, S, 4), ValueError, r"mask must be bool of the weight's shape \(4, 3\), got torch.bool \(3, 4\)"),
    ((W, M[0], S, 4), ValueError, r"mask must be bool of the weight's shape \(4, 3\), got torch.bool \(3,\)"),
    ((W, M, S.expand(3), 4), ValueError, r"shape \[\], \[1\] or \[4\] .* got torch.float32 \(3,\)"),
    ((W, M, S.expand(4, 1), 4), ValueError, r"shape \[\], \[1\] or \[4\] .* got torch.float32 \(4, 1\)"),
    ((W, M, S.int(), 4), ValueError, r"step must be floating point .* got torch.int32 \(1,\)"),
    ((W[0, 0], M[0, 0], S.expand(2), 4), ValueError, r"\[\], \[1\] or \[1\] .* got torch.float32 \(2,\)"),
    ((W.double(), M, S, 4), TypeError, r"got torch.float64; use weight.float\(\)"),
    ((W.int(), M, S, 4), TypeError, r"weight must be floating point \(fp32, bf16 or fp16\), got torch.int32"),
]


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize(
    ("args", "error", "message"), QUANTIZER_ERRORS, ids=[message for *_, message in QUANTIZER_ERRORS]
)
def test_bad_quantizer_inputs_are_refused(operation: str, args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[operation](*args)


@pytest.mark.parametrize("operation", [name for name in CALLS if name != "teacher_weight"])
def test_an_unknown_ste_is_refused(operation: str) -> None:
    with pytest.raises(ConfigError, match="ste must be one of identity, clipped; got 'lsq'"):
        CALLS[operation](W, M, S, 4, ste="lsq")


@pytest.mark.parametrize("operation", ["teacher_weight", "dual_linear", "dual_conv2d"])
def test_unknown_teacher_weights_are_refused(operation: str) -> None:
    with pytest.raises(ConfigError, match="teacher_weights must be one of latent, shared; got 'full'"):
        CALLS[operation](W, M, S, 4, teacher_weights="full")


@pytest.mark.parametrize("operation", ["fake_quant", "fake_quant_all"])
def test_an_integer_result_is_refused(operation: str) -> None:
    with pytest.raises(TypeError, match=r"dtype must be floating point .*, got torch.int8"):
        CALLS[operation](W, M, S, 4, dtype=torch.int8)


@pytest.mark.parametrize("counts", [(1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 3, 2), (2, 2, 2, 1)])
def test_lists_of_other_lengths_are_refused(counts: tuple[int, int, int, int]) -> None:
    lists = [[value] * count for value, count in zip((W, M, S, 4), counts, strict=True)]
    got = "{}, {}, {} and {}".format(*counts)
    with pytest.raises(ValueError, match=f"one entry for each layer, got {got}"):
        ops.fake_quant_all(*lists)


@pytest.mark.parametrize(
    ("operation", "x", "message"),
    [
        ("dual_linear", torch.zeros(5, 3), r"must be \[2B, \.\.\., 3\], .* got \(5, 3\); .*torch.cat"),
        ("dual_linear", torch.zeros(4), r"must be \[2B, \.\.\., 3\], .* got \(4,\)"),
        ("dual_conv2d", torch.zeros(3, 3, 5, 5), r"must be \[2B, 3, H, W\], .* got \(3, 3, 5, 5\)"),
        ("dual_conv2d", torch.zeros(2, 2, 3, 5, 5), r"must be \[2B, 3, H, W\], .* got \(2, 2, 3, 5, 5\)"),
        ("dual_conv2d", torch.zeros(2, 5, 5), r"must be \[2B, 3, H, W\], .* got \(2, 5, 5\)"),
    ],
)
def test_what_cannot_be_halved_is_refused(operation: str, x: Tensor, message: str) -> None:
    kernel = (W, M) if operation == "dual_linear" else (W[..., None, None], M[..., None, None])
    with pytest.raises(ValueError, match=message):
        getattr(ops, operation)(x, *kernel, S, 4)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_a_bias_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias must have one value per output, \[4\], got"):
        ops.dual_linear(torch.zeros(2, 3), W, M, S, 4, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"bias must have one value per output, \[4\], got"):
        ops.dual_conv2d(torch.zeros(2, 3, 5, 5), W[..., None, None], M[..., None, None], S, 4, torch.zeros(shape))


def test_x_of_another_dtype_than_the_weight_is_refused_without_autocast() -> None:
    with pytest.raises(TypeError, match=r"x must have the weight's dtype torch.float32, got torch.bfloat16; use autoc"):
        ops.dual_linear(torch.zeros(2, 3, dtype=torch.bfloat16), W, M, S, 4)


MASKS = [torch.ones(4, 3, dtype=torch.bool)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *[
            (partial(ops.topk_mask, [W], p), ConfigError, rf"sparsity must lie in \[0, 1\).* got {p!r}")
            for p in (1.0, 1, -0.1, NAN, INF, True, "0.5")
        ],
        (partial(ops.masked_count, [W], 1.5), ConfigError, r"sparsity must lie in \[0, 1\).* got 1.5"),
        (partial(ops.topk_mask, [], 0.5), ValueError, "at least one weight tensor .* got an empty list"),
        (partial(ops.topk_mask, [W, W.int()], 0.5), TypeError, r"weights\[1\] must be floating point, got torch.int32"),
        (partial(ops.topk_mask_, [], [], 0), ValueError, "at least one weight tensor .* got an empty list"),
        (partial(ops.topk_mask_, MASKS, [W, W], 1), ValueError, "one mask for each weight, got 1 masks and 2 weights"),
        (
            partial(ops.topk_mask_, [W], [W], 1),
            ValueError,
            r"masks\[0\] must be bool of shape \(4, 3\), got torch.float",
        ),
        (
            partial(ops.topk_mask_, [*MASKS, M.T], [W, W], 1),
            ValueError,
            r"masks\[1\] must be bool of shape \(4, 3\), got torch.bool \(3, 4\)",
        ),
        *[
            (partial(ops.topk_mask_, MASKS, [W], k), ValueError, rf"k must be an integer in 0\.\.12.* got {k!r}")
            for k in (-1, 13, 2.0, True, None)
        ],
        *[
            (partial(ops.topk_mask_, MASKS, [W], k), ValueError, rf"k must be an int32 or int64 tensor .* got {got}")
            for k, got in [
                (torch.tensor([1, 2]), r"torch.int64 \(2,\)"),
                (torch.tensor(2.0), r"torch.float32 \(\)"),
                (torch.tensor(True), r"torch.bool \(\)"),
            ]
        ],
        (partial(ops.pack_int4, torch.tensor([8])), ValueError, r"q must lie in -8\.\.7, got 8\.\.8"),
        (partial(ops.pack_int4, torch.tensor([-9, 3])), ValueError, r"q must lie in -8\.\.7, got -9\.\.3"),
        (partial(ops.pack_int4, torch.tensor([1.0])), TypeError, "q must be an integer tensor, got torch.float32"),
        (partial(ops.pack_int4, torch.tensor([True])), TypeError, "q must be an integer tensor, got torch.bool"),
        (partial(ops.pack_bits, torch.tensor([1])), TypeError, "mask must be bool, got torch.int64"),
        (partial(ops.unpack_int4, BYTES, 2), ValueError, "2 values of 4 bits take 1 bytes, got 2"),
        (partial(ops.unpack_int4, BYTES, 5), ValueError, "5 values of 4 bits take 3 bytes, got 2"),
        (partial(ops.unpack_int4, BYTES[:0], -1), ValueError, "-1 values of 4 bits take 0 bytes, got 0"),
        (partial(ops.unpack_bits, BYTES, 8), ValueError, "8 values of 1 bits take 1 bytes, got 2"),
        (partial(ops.unpack_bits, BYTES, 17), ValueError, "17 values of 1 bits take 3 bytes, got 2"),
        (partial(ops.unpack_bits, BYTES[:0], -7), ValueError, "-7 values of 1 bits take 0 bytes, got 0"),
        (partial(ops.unpack_int4, BYTES.char(), 4), TypeError, r"flat uint8 tensor, got torch.int8 \(2,\)"),
        (partial(ops.unpack_bits, BYTES[None], 16), TypeError, r"flat uint8 tensor, got torch.uint8 \(1, 2\)"),
    ],
)
def test_bad_selections_and_bytes_are_refused(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert MASKS[0].all()


def test_tolerances_are_roundings_of_their_dtype() -> None:
    """A table that is loosened by mistake shows: no entry is above 16 roundings of its dtype."""
    for dtype, tolerance in TOLERANCES.items():
        assert tolerance <= 8 * torch.finfo(dtype).eps
