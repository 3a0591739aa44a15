"""ONNX files: integers and step sizes that give the student's weights bit for bit, and its outputs by onnxruntime."""

import copy
import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import package
from small_run import net
from test_packed import student
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import PQKConfig, reference
from pqk_fast.branches import pqk_layers
from pqk_fast.data.features import MFCC
from pqk_fast.data.speech_commands import read_wav
from pqk_fast.deploy import onnx as deploy
from pqk_fast.deploy.onnx import export_onnx
from pqk_fast.models import create_model

INT4, INT8, FLOAT = 22, 3, 1  # of onnx.TensorProto


@pytest.fixture(autouse=True)
def _packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        package(name)


def conv1d() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6, 3))


def sequences() -> nn.Module:
    """Linear layers of three dimensions, which torch would write as MatMul."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 5, bias=False), nn.Flatten(), nn.Linear(35, 3))


MAKES = {
    "linear": (net, (5, 8)),
    "conv1d": (conv1d, (5, 3, 8)),
    "sequences": (sequences, (5, 7, 33)),
    "res8_narrow": (lambda: create_model("res8_narrow", 12), (5, 101, 40)),
    "resnet20": (lambda: create_model("resnet20", 100), (3, 3, 32, 32)),
}
GRIDS = [(2, False), (3, True), (4, False), (4, True), (5, False), (8, False), (8, True)]  # bits, per channel
SMALL = [(name, *grid) for name in ("linear", "conv1d", "sequences") for grid in GRIDS]
LARGE = [("res8_narrow", 4, False), ("res8_narrow", 8, True), ("resnet20", 4, True)]


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    ort = package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)})


def assert_same(path: Path, model: nn.Module, x: Tensor) -> None:
    """Within 1e-5 of the logits' scale, and the same answers; rows together and one alone."""
    with torch.no_grad():
        expected = model(x).numpy()
    for rows in (len(x), 1):
        (actual,) = run(path, x[:rows])
        assert actual.shape == expected[:rows].shape
        assert np.abs(actual - expected[:rows]).max() <= 1e-5 * np.abs(expected).max()
        assert np.array_equal(actual.argmax(-1), expected[:rows].argmax(-1))


def content(path: Path) -> tuple:
    """The model, its initializers by name, and of every DequantizeLinear its inputs and axis by its output's name."""
    onnx = package("onnx")
    model = onnx.load(path)
    nodes = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    axes = {name: [a.i for a in node.attribute if a.name == "axis"] for name, node in nodes.items()}
    return (
        model,
        {tensor.name: tensor for tensor in model.graph.initializer},
        {name: (list(node.input), axes[name]) for name, node in nodes.items()},
    )


@cache
def unpacked(raw: bytes, count: int) -> np.ndarray:
    """Two's complement halves of bytes, the low one first."""
    fields = np.array([half for byte in raw for half in (byte & 15, byte >> 4)], np.int16)[:count]
    return np.where(fields > 7, fields - 16, fields)


@pytest.mark.parametrize(("name", "bits", "per_channel"), SMALL + LARGE)
def test_onnxruntime_gives_what_pytorch_gives(name: str, bits: int, per_channel: bool, tmp_path: Path) -> None:
    onnx = package("onnx")
    make, shape = MAKES[name]
    model = student(make(), bits=bits, per_channel=per_channel, sparsity=0.6)
    path = tmp_path / "student.onnx"
    x = torch.randn(shape)
    assert export_onnx(model, x, path) == path.stat().st_size
    assert_same(path, model, x)

    proto, stored, dequantized = content(path)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    layers = pqk_layers(model)
    assert set(dequantized) == {f"{layer}.weight" for layer in layers}
    plain = pqk.convert(model).state_dict()
    for layer_name, layer in layers.items():
        (values, scale), axis = dequantized[f"{layer_name}.weight"]
        assert axis == ([0] if per_channel else [])
        assert list(stored[scale].dims) == ([len(layer.weight)] if per_channel else [])
        count = layer.weight.numel()
        q = reference.quantize(layer.weight, layer.weight_mask, layer.weight_step, bits).detach().numpy()
        assert list(stored[values].dims) == list(q.shape)
        raw = stored[values].raw_data
        if bits <= 4:
            assert (stored[values].data_type, len(raw)) == (INT4, (count + 1) // 2)
            assert np.array_equal(unpacked(raw, count), q.reshape(-1))
        else:
            assert (stored[values].data_type, len(raw)) == (INT8, count)
            assert np.array_equal(np.frombuffer(raw, np.int8), q.reshape(-1))
        step = onnx.numpy_helper.to_array(stored[scale])
        assert step.dtype == np.float32
        weight = q * step.reshape(-1, *[1] * (q.ndim - 1))
        assert weight.tobytes() == plain[f"{layer_name}.weight"].numpy().tobytes()
    # no weight is there in fp32 too: what else is stored are vectors
    assert all(len(t.dims) <= 1 for t in stored.values() if t.data_type == FLOAT)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64)])
def test_linear_layers_of_any_dimensions(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    """As many inputs as onnxruntime's own quantized products want."""
    torch.manual_seed(0)
    model = student(nn.Sequential(nn.Linear(64, 32, bias=bias)), sparsity=0.5, bits=8)
    export_onnx(model, torch.zeros(1, *shape), tmp_path / "s.onnx")
    x = torch.randn(3, *shape)
    (actual,) = run(tmp_path / "s.onnx", x)
    expected = model(x).detach().numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_odd_number_of_four_bit_weights(tmp_path: Path) -> None:
    model = student(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), sparsity=0.2)
    export_onnx(model, torch.randn(2, 3), tmp_path / "s.onnx")
    _, stored, dequantized = content(tmp_path / "s.onnx")
    raw = [stored[dequantized[name][0][0]].raw_data for name in ("0.weight", "2.weight")]
    assert [len(part) for part in raw] == [5, 2]
    assert [part[-1] >> 4 for part in raw] == [0, 0]
    assert_same(tmp_path / "s.onnx", model, torch.randn(4, 3))


def test_a_layer_that_is_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = student(nn.Linear(5, 4), sparsity=0.5)
    export_onnx(model, torch.randn(2, 5), tmp_path / "s.onnx")
    assert list(content(tmp_path / "s.onnx")[2]) == ["weight"]
    assert_same(tmp_path / "s.onnx", model, torch.randn(4, 5))


class Tied(nn.Module):
    """``a`` and ``b`` share a weight, ``c`` and ``d`` are one layer, nobody uses ``unused``; the twins are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.d = self.c
        self.twins = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.twins[1].load_state_dict(self.twins[0].state_dict())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = self.c(x) + torch.relu(self.d(-x))
        return self.head(self.twins[0](x) - self.twins[1](torch.relu(x)))


def test_tied_excluded_and_unused_layers(tmp_path: Path) -> None:
    model = student(Tied(), sparsity=0.5, exclude=("head",))
    export_onnx(model, torch.randn(2, 8), tmp_path / "s.onnx")
    assert_same(tmp_path / "s.onnx", model, torch.randn(6, 8))
    _, stored, dequantized = content(tmp_path / "s.onnx")
    quantized = sorted(tuple(tensor.dims) for tensor in stored.values() if tensor.data_type == INT4)
    assert quantized == [(6, 6), (6, 8), (8, 8)]  # each once
    assert len(dequantized) == 3
    floats = [name for name, tensor in stored.items() if tensor.data_type == FLOAT and len(tensor.dims) > 1]
    assert floats == ["head.weight"]
    weight = np.frombuffer(stored["head.weight"].raw_data, np.float32).reshape(3, 6)
    assert np.array_equal(weight, model.head.weight.detach().numpy())


def test_phase_one_and_the_callers_model_is_untouched(tmp_path: Path) -> None:
    first = pqk.prepare(conv1d(), PQKConfig(bits=4, sparsity=0.5))
    pqk.Pruner(first, 1, 1)
    first[1].running_var.uniform_(0.5, 2)
    second = pqk.start_phase2(copy.deepcopy(first))
    x = torch.randn(4, 3, 8)
    for name, each in (("one", first), ("two", second)):
        pqk.fuse(each).train()
        before = {key: value.clone() for key, value in each.state_dict().items()}
        state = torch.get_rng_state()
        export_onnx(each, x, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in each.state_dict().items())
        assert all(module.training for module in each.modules())
        assert all(p.grad is None for p in each.parameters())
        assert pqk_layers(each)["0"].fused
        assert_same(tmp_path / name, each.eval(), x)
    assert (first[0].phase, second[0].phase) == (1, 2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        both = self.left(audio) + self.right(video)
        return both, both.flip(1)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = student(Several(), sparsity=0.5)
    export_onnx(model, (torch.zeros(1, 4), torch.zeros(1, 3)), tmp_path / "s.onnx")
    graph = content(tmp_path / "s.onnx")[0].graph
    assert [value.name for value in graph.input] == ["audio", "video"]
    inputs = torch.randn(3, 4), torch.randn(3, 3)
    for actual, expected in zip(run(tmp_path / "s.onnx", *inputs), model(*inputs), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-6)


def test_names_metadata_and_nothing_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "s.onnx"
    model = student(net(), bits=3)
    export_onnx(model, torch.zeros(1, 8), path, {"model": "small", "labels": ["yes", "nö"], "classes": 3})
    proto = content(path)[0]
    (given,), (made,) = proto.graph.input, proto.graph.output
    assert (given.name, made.name) == ("input", "output")
    for value, size in ((given, 8), (made, 3)):
        dims = value.type.tensor_type.shape.dim
        assert (dims[0].dim_param, dims[1].dim_value) == ("batch", size)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert properties == {"model": "small", "labels": '["yes", "nö"]', "classes": "3", "bits": "3"}
    assert str(Path(pqk.__file__).parent).encode() not in path.read_bytes()
    assert sys.prefix.encode() not in path.read_bytes()
    assert b"pkg.torch" not in path.read_bytes()


def test_layers_of_different_bits(tmp_path: Path) -> None:
    model = net()
    model[0] = pqk.prepare(model[0], PQKConfig(bits=4))
    model[3] = pqk.prepare(model[3], PQKConfig(bits=8))
    model.eval()
    export_onnx(model, torch.zeros(1, 8), tmp_path / "s.onnx")
    proto, stored, dequantized = content(tmp_path / "s.onnx")
    assert [stored[dequantized[f"{n}.weight"][0][0]].data_type for n in (0, 3)] == [INT4, INT8]
    assert json.loads(proto.metadata_props[0].value) == {"0": 4, "3": 8}
    assert_same(tmp_path / "s.onnx", model, torch.randn(6, 8))


@pytest.mark.slow
def test_real_clips(real_speech: Path, tmp_path: Path) -> None:
    names = (real_speech / "testing_list.txt").read_text().split()[::100]
    clips = torch.zeros(len(names), 16_000)
    for row, name in zip(clips, names, strict=True):
        samples = torch.from_numpy(read_wav(real_speech / name)[:16_000] / np.float32(32_768))
        row[: len(samples)] = samples
    model = student(create_model("res8_narrow", 12))
    export_onnx(model, torch.zeros(1, 101, 40), tmp_path / "s.onnx")
    assert len(clips) > 10
    assert_same(tmp_path / "s.onnx", model, MFCC()(clips))


def bad_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[3].weight[model[3].weight_mask] = torch.nan
    return model


class Fixed(nn.Module):
    """Takes two rows, no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(2, 8))


class Odd(nn.Sequential):
    """With an operation that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(super().forward(x))


X = torch.zeros(1, 8)
REFUSED = {
    "unprepared": (net, X, ValueError, "no PQK layers: call pqk_fast.prepare"),
    "bits=32": (lambda: student(net(), bits=32), X, ValueError, "layer '0': bits=32 prunes without quantizing"),
    "bf16": (lambda: student(net()).bfloat16(), X, ValueError, "layer '0' is torch.bfloat16: .* model.float"),
    "NaN": (
        lambda: bad_weight(student(net(), sparsity=0.5)), X, ValueError,
        r"layer '3': some weights are not finite.*find_problems",
    ),
    "a number": (lambda: student(net()), 1, TypeError, "a tensor or a tuple of tensors, .* got int"),
    "a list": (lambda: student(net()), [X], TypeError, "a tensor or a tuple of tensors, .* got list"),
    "numbers": (lambda: student(net()), (X, 1), TypeError, "got tuple of Tensor, int"),
    "nothing": (lambda: student(net()), (), TypeError, "got tuple of nothing"),
    "no batch": (lambda: student(net()), torch.zeros(()), ValueError, r"batch as its first dimension.*float32 \[\]"),
    "no rows": (lambda: student(net()), torch.zeros(0, 8), ValueError, r"at least one row, got float32 \[0, 8\]"),
    "other shape": (
        lambda: student(net()), torch.zeros(1, 9), ValueError,
        r"Sequential does not take the example \(float32 \[1, 9\]\): .*cannot be multiplied.*\. Give one as",
    ),
    "two inputs": (lambda: student(net()), (X, X), ValueError, "does not take the example .*positional arg"),
    "fixed batch": (lambda: student(Fixed()), X, ValueError, "Fixed cannot be traced for any batch size"),
    "no such operation": (lambda: student(Odd(nn.Linear(8, 3))), X, ValueError, "cannot be written as ONNX: .*bessel"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_refused(what: str, tmp_path: Path) -> None:
    make, example, error, says = REFUSED[what]
    (tmp_path / "s.onnx").write_text("as it was")
    with pytest.raises(error, match=re.compile(says, re.DOTALL)):
        export_onnx(make(), example, tmp_path / "s.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("s.onnx", "as it was")]


def test_an_exporter_that_changes_a_weight_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers or a scale that differ, and a weight that is not turned into integers."""
    encode = deploy.encode
    model = student(net(), sparsity=0.5)
    for change in (lambda q: q[::-1].copy(), lambda q: np.where(np.arange(q.size) == 5, (q == 0).astype(np.int8), q)):
        monkeypatch.setattr(deploy, "encode", lambda q, *rest, change=change: encode(change(q), *rest))
        with pytest.raises(RuntimeError, match=r"[03]\.weight did not come out .* nothing was written"):
            export_onnx(model, X, tmp_path / "s.onnx")
    monkeypatch.setattr(deploy, "encode", encode)
    monkeypatch.setattr(deploy, "_quantize", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"0\.weight did not come out"):
        export_onnx(model, X, tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript.optimizer"])
def test_without_the_packages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs the packages onnx and onnxscript .*pip install 'pqk-fast\[onnx\]'"):
        export_onnx(student(net()), X, tmp_path / "s.onnx")
