"""The packed runtime: the sparse convolution against its definition and torch's, and whole students."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import every_isa, on_threads, run_with
from small_run import net
from test_packed import INPUTS, MAKES, student
from torch import nn

from pqk_fast import dispatch, reference
from pqk_fast.deploy import runtime
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.reader import PackedLayer
from pqk_fast.deploy.runtime import PackedConv1d, PackedConv2d, PackedLinear, choose_by_time, load_runtime

# outputs, inputs, kernel, stride, padding, dilation, groups; height and width of the input
CASES = [
    ((19, 19, (3, 3), 1, 1, 1, 1), (25, 13)),
    ((7, 1, (3, 3), 1, 1, 1, 1), (101, 40)),
    ((6, 4, (3, 3), 2, 1, 1, 1), (32, 32)),
    ((6, 4, (1, 1), 2, 0, 1, 1), (9, 8)),
    ((6, 4, (5, 3), (3, 2), (2, 0), 1, 2), (17, 11)),
    ((4, 4, (3, 3), 1, 2, 2, 4), (7, 7)),
    ((3, 2, (2, 4), (1, 3), (0, 3), (2, 1), 1), (6, 5)),
    ((1, 1, (1, 1), 1, 0, 1, 1), (1, 1)),
    ((5, 3, (3, 3), 1, 0, 1, 1), (3, 3)),
    ((2, 3, (3, 3), 1, 1, 1, 1), (5, 700)),
]


def packed(shape: tuple[int, ...], density: float = 0.3, bits: int = 4, seed: int = 0) -> PackedLayer:
    generator = np.random.default_rng(seed)
    most = 2 ** (bits - 1) - 1
    drawn = generator.integers(1, most + 1, shape) * generator.choice([-1, 1], shape)
    q = np.where(generator.random(shape) < density, drawn, 0).astype(np.int8)
    return PackedLayer(q, np.array([0.03], np.float32), bits, "dense", 0)


def conv(case, density: float = 0.3, bias: bool = True) -> tuple[nn.Conv2d, PackedConv2d]:
    """The float layer with the packed one's weight, and the packed one, computing sparsely."""
    outputs, inputs, kernel, stride, padding, dilation, groups = case
    torch.manual_seed(0)
    plain = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias).requires_grad_(False)
    layer = packed(tuple(plain.weight.shape), density)
    plain.weight.copy_(torch.from_numpy(layer.weight()))
    made = PackedConv2d(layer, plain)
    made.sparse = True
    return plain, made


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("case", "size"), CASES)
def test_a_sparse_convolution_is_the_dense_one(case, size, batch: int) -> None:
    plain, made = conv(case)
    x = torch.randn(batch, case[1], *size)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("case", "size"), CASES)
def test_the_operation_is_its_definition(case, size) -> None:
    _, made = conv(case)
    x = torch.randn(2, case[1], *size)
    arguments = (x, made.first, made.offsets(*size), made.value, made.bias, made.geometry)
    for relu in (False, True):
        torch.testing.assert_close(
            dispatch.sparse_conv2d(*arguments, relu), reference.sparse_conv2d(*arguments, relu), rtol=1e-5, atol=1e-6
        )
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    assert dispatch.sparse_conv2d(*meta, False).shape == dispatch.sparse_conv2d(*arguments, False).shape


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_any_number_of_taps(density: float) -> None:
    plain, made = conv(CASES[0][0], density, bias=density > 0)
    x = torch.randn(1, 19, 25, 13)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-5)


def test_nothing_but_zeros_gives_the_bias() -> None:
    _, made = conv(CASES[0][0], 0.0)
    assert torch.equal(made(torch.randn(1, 19, 5, 5)), made.bias[:, None, None].expand(1, 19, 5, 5))


@pytest.mark.parametrize("make", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :, ::2, 1:]])
def test_inputs_of_any_layout(make) -> None:
    plain, made = conv(CASES[0][0])
    x = make(torch.randn(2, 19, 24, 14))
    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)


def test_relu_keeps_nan() -> None:
    plain, made = conv(CASES[0][0])
    made.relu = True
    x = torch.randn(1, 19, 9, 9)
    torch.testing.assert_close(made(x), plain(x).relu(), rtol=1e-5, atol=1e-6)
    assert torch.isnan(made(x.fill_(torch.nan))).any()


@pytest.mark.native
def test_threads_and_memory_that_was_never_written_change_nothing(poisoned_memory: None) -> None:
    _, made = conv(CASES[1][0])
    x = torch.randn(2, 1, 101, 40)
    with on_threads(1):
        alone = made(x)
    with on_threads(3):
        assert torch.equal(made(x), alone)


@pytest.mark.native
@every_isa
def test_every_instruction_set(isa: str) -> None:
    run_with(
        isa,
        "import torch, test_runtime as t\n"
        "for case, size in t.CASES:\n"
        "    plain, made = t.conv(case)\n"
        "    x = torch.randn(2, case[1], *size)\n"
        "    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)\n",
    )


@pytest.mark.native
@pytest.mark.parametrize(
    "change",
    [
        lambda first, offset, value: (first[:-1], offset, value),
        lambda first, offset, value: (first, offset + 10_000, value),
        lambda first, offset, value: (first, offset - 1000, value),
        lambda first, offset, value: (first, offset[:-1], value),
        lambda first, offset, value: (first, offset, value[:-1]),
        lambda first, offset, value: (first.flip(0), offset, value),
        lambda first, offset, value: (first.long(), offset, value),
        lambda first, offset, value: (first[:0], offset, value),
    ],
)
def test_taps_that_lie_elsewhere_are_refused(change) -> None:
    _, made = conv(CASES[0][0])
    x = torch.randn(1, 19, 25, 13)
    taps = change(made.first, made.offsets(25, 13), made.value)
    with pytest.raises(RuntimeError):
        dispatch.sparse_conv2d(x, *taps, None, made.geometry, False)


@pytest.mark.native
def test_places_of_another_size_are_refused() -> None:
    _, made = conv(CASES[0][0])
    with pytest.raises(RuntimeError, match="of another size"):
        dispatch.sparse_conv2d(
            torch.randn(1, 19, 5, 5), made.first, made.offsets(25, 13), made.value, None, made.geometry, False
        )
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        dispatch.sparse_conv2d(
            torch.randn(1, 19, 1, 1), made.first, made.offsets(25, 13), made.value, None, [5, 5, 1, 1, 0, 0], False
        )


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (0, 8)])
def test_linear_takes_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(8, 5).requires_grad_(False)
    layer = packed((5, 8))
    plain.weight.copy_(torch.from_numpy(layer.weight()))
    made = PackedLinear(layer, plain)
    for made.sparse in (True, False):
        x = torch.randn(shape)
        torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 3, 1, 2), (3, 1, 2, 1)])
def test_conv1d(stride: int, padding: int, dilation: int, groups: int) -> None:
    plain = nn.Conv1d(4, 6, 3, stride, padding, dilation, groups).requires_grad_(False)
    layer = packed(tuple(plain.weight.shape))
    plain.weight.copy_(torch.from_numpy(layer.weight()))
    made = PackedConv1d(layer, plain)
    x = torch.randn(2, 4, 19)
    for made.sparse in (True, False):
        torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_a_students_runtime_gives_its_outputs(name: str, per_channel: bool, tmp_path: Path) -> None:
    path = tmp_path / "s.pqk"
    save_packed(student(MAKES[name](), per_channel=per_channel), path)
    plain, fast = load_packed(path, MAKES[name]()), load_runtime(path, MAKES[name]())
    layers = [module for module in fast.modules() if isinstance(module, runtime._PackedConv)]
    assert all(layer.sparse for layer in layers if layer.density < 0.5)
    x = torch.randn(INPUTS[name])
    with torch.inference_mode():
        expected = plain(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        for layer in layers:
            layer.sparse = not layer.sparse
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast(x.half().float()), plain(x.half().float()), rtol=1e-5, atol=1e-5)


def test_the_faster_way_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_packed(student(net()), tmp_path / "s.pqk")
    fast = load_runtime(tmp_path / "s.pqk", net())
    monkeypatch.setattr(runtime, "_is_faster_sparse", lambda layer, x, rounds: x.shape[-1] == 8)
    assert choose_by_time(fast, torch.randn(4, 8)) == {"0": "sparse", "3": "dense"}
    assert [module.sparse for module in (fast[0], fast[3])] == [True, False]


def test_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = conv(CASES[0][0])
    clock = [0.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock[0])
    for slow in (True, False):
        monkeypatch.setattr(
            made, "forward", lambda x, slow=slow: clock.__setitem__(0, clock[0] + (2.0 if made.sparse is slow else 1.0))
        )
        assert runtime._is_faster_sparse(made, torch.zeros(1), 5) is not slow


def test_paddings_that_are_not_zeros_are_refused() -> None:
    layer = packed((4, 4, 3, 3))
    for plain in (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same")):
        with pytest.raises(ValueError, match="expected padding with zeros, given in numbers"):
            PackedConv2d(layer, plain)


def test_other_dtypes_are_computed_densely() -> None:
    plain, made = conv(CASES[0][0])
    x = torch.randn(1, 19, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(made(x), F.conv2d(x, plain.weight.double(), plain.bias.double(), padding=1))
    linear = nn.Linear(8, 4)
    layer = packed((4, 8))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = F.linear(x, torch.from_numpy(layer.weight()).double(), linear.bias.double())
    torch.testing.assert_close(PackedLinear(layer, linear)(x), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_inputs_without_a_batch(sparse: bool) -> None:
    plain, made = conv(CASES[0][0])
    made.sparse = sparse
    x = torch.randn(19, 9, 8)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-5)
    line = nn.Conv1d(4, 6, 3, padding=1).requires_grad_(False)
    layer = packed((6, 4, 3))
    line.weight.copy_(torch.from_numpy(layer.weight()))
    one = PackedConv1d(layer, line)
    one.sparse = sparse
    for shape in ((4, 10), (2, 4, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(one(x), line(x), rtol=1e-5, atol=1e-5)


def test_other_paddings_and_torchs_own_layers_run_too(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(6, 8, 3, padding="same"), nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        )  # fmt: skip

    with pytest.warns(UserWarning, match="left in floating point"):
        model = student(make())
    save_packed(model, tmp_path / "s.pqk")
    plain, fast = load_packed(tmp_path / "s.pqk", make()), load_runtime(tmp_path / "s.pqk", make())
    assert [type(fast[0]), type(fast[1]), type(fast[2].linear1)] == [nn.Conv1d, nn.Conv1d, PackedLinear]
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
