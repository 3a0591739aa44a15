"""Packed students: bit for bit what was trained, small, read with numpy alone, and nothing in a file is trusted."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import package
from small_run import net
from torch import nn

import pqk_fast as pqk
from pqk_fast import PQKConfig, reference
from pqk_fast.branches import pqk_layers
from pqk_fast.deploy import reader
from pqk_fast.deploy.encodings import entropy_bound
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.reader import PackedError, parse_packed, read_packed
from pqk_fast.deploy.runtime import PackedConv2d, load_runtime
from pqk_fast.models import create_model


def student(model: nn.Module, **config) -> nn.Module:
    """Prepared, pruned once, with batch statistics of its own, in phase 2."""
    torch.manual_seed(1)
    model = pqk.prepare(model, PQKConfig(**{"bits": 4, "sparsity": 0.9, "mask_interval": 1, **config}))
    for layer in pqk_layers(model).values():
        layer.weight_step.data.mul_(1.7)
    pqk.Pruner(model, 1, 1)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return pqk.start_phase2(model).eval()


def res8_narrow() -> nn.Module:
    torch.manual_seed(0)
    return create_model("res8_narrow", 12)


MAKES = {
    "res8_narrow": res8_narrow,
    "linear": net,
    "conv1d": lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(8 * 6, 3)),
}
INPUTS = {"res8_narrow": (5, 101, 40), "linear": (5, 8), "conv1d": (5, 3, 8)}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MAKES)
def test_a_loaded_student_is_the_trained_one(name: str, bits: int, per_channel: bool, tmp_path: Path) -> None:
    model = student(MAKES[name](), bits=bits, per_channel=per_channel)
    size = save_packed(model, tmp_path / "student.pqk")
    loaded = load_packed(tmp_path / "student.pqk", MAKES[name]())
    assert size == (tmp_path / "student.pqk").stat().st_size
    plain = pqk.convert(model).state_dict()
    for key, value in loaded.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, plain[key]), key
    x = torch.randn(INPUTS[name])
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training


def test_the_network_is_built_from_the_files_metadata(tmp_path: Path) -> None:
    path = tmp_path / "student.pqk"
    model = student(res8_narrow())
    save_packed(model, path, {"model": "res8_narrow", "classes": 12, "labels": ["a", "ö"]})
    assert read_packed(path).metadata == {"model": "res8_narrow", "classes": 12, "labels": ["a", "ö"]}
    x = torch.randn(2, 101, 40)
    assert torch.equal(load_packed(path)(x), model(x))
    save_packed(model, path)
    with pytest.raises(ValueError, match="does not say which network it is of"):
        load_packed(path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_packed(path, create_model("res8", 12))


def test_sizes_at_four_bits_and_ninety_percent(tmp_path: Path) -> None:
    """Bell-shaped weights under one global threshold, as at a network's beginning."""
    save_packed(student(res8_narrow()), tmp_path / "s.pqk", {"model": "res8_narrow", "classes": 12})
    packed = read_packed(tmp_path / "s.pqk")
    payload = sum(layer.payload for layer in packed.layers.values())
    bound = sum(entropy_bound(layer.q.reshape(-1)) for layer in packed.layers.values())
    assert bound < payload < 1.15 * bound
    assert packed.header <= 600
    assert packed.size == (tmp_path / "s.pqk").stat().st_size <= 4300
    floats = sum(4 * tensor.size for tensor in packed.tensors.values()) + 4 * len(packed.layers)
    assert packed.header + payload + floats == packed.size


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    safe_open = package("safetensors").safe_open
    save_packed(student(net()), tmp_path / "s.pqk")
    with safe_open(str(tmp_path / "s.pqk"), "np") as file:
        assert file.metadata() == {"format": "pqk_fast packed", "version": "1"}
        assert list(file.keys()) == ["data"]
        assert file.get_tensor("data").dtype == np.uint8


def test_numpy_alone_reads_it(tmp_path: Path) -> None:
    """The reader, copied away from the library, where torch cannot be imported."""
    model = student(net())
    save_packed(model, tmp_path / "s.pqk")
    (tmp_path / "reader.py").write_bytes(Path(reader.__file__).read_bytes())
    code = (
        "import sys; sys.modules['torch'] = sys.modules['pqk_fast'] = sys.modules['safetensors'] = None\n"
        "import numpy as np, reader\n"
        "np.savez('out.npz', **reader.read_packed('s.pqk').state_dict())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    plain = pqk.convert(model).state_dict()
    with np.load(tmp_path / "out.npz") as out:
        assert set(out) == {name for name in plain if not name.endswith("num_batches_tracked")}
        assert all(np.array_equal(out[name], plain[name].numpy()) for name in out)


def test_the_integers_are_those_of_the_second_equation(tmp_path: Path) -> None:
    model = student(net(), bits=3)
    save_packed(model, tmp_path / "s.pqk")
    for name, layer in pqk_layers(model).items():
        packed = read_packed(tmp_path / "s.pqk").layers[name]
        q = reference.quantize(layer.weight, layer.weight_mask, layer.weight_step, 3)
        assert np.array_equal(packed.q, q.detach().numpy())
        assert (packed.bits, packed.step.item()) == (3, layer.weight_step.item())


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PQK layers"):
        save_packed(net(), tmp_path / "s.pqk")
    with pytest.raises(ValueError, match="bits=32 prunes without quantizing"):
        save_packed(student(net(), bits=32), tmp_path / "s.pqk")
    for bad in (float("nan"), float("inf")):
        model = student(net(), sparsity=0.5)
        layer = next(iter(pqk_layers(model).values()))
        layer.weight.data[tuple(layer.weight_mask.nonzero()[0])] = bad
        with pytest.raises(ValueError, match=r"layer '0': some weights are not finite.*find_problems"):
            save_packed(model, tmp_path / "s.pqk")
        layer.weight_step.data.fill_(bad)
        with pytest.raises(ValueError, match="layer '0': expected step sizes that are finite and positive"):
            save_packed(model, tmp_path / "s.pqk")
    model = student(net())
    model.register_buffer("large", torch.tensor([2**40 + 1]))
    with pytest.raises(ValueError, match=r"large \(torch.int64\) holds values that fp32 cannot"):
        save_packed(model, tmp_path / "s.pqk")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "s.pqk"
    torch.manual_seed(3)
    save_packed(student(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2)), sparsity=0.5), path)
    return path.read_bytes()


def test_a_file_cut_off_anywhere_is_refused(whole: bytes) -> None:
    for size in range(len(whole)):
        with pytest.raises(PackedError):
            parse_packed(whole[:size])
    with pytest.raises(PackedError, match="that follow the header"):
        parse_packed(whole + b"\0")


def test_every_flipped_bit_is_noticed(whole: bytes) -> None:
    parse_packed(whole)
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            with pytest.raises(PackedError):
                parse_packed(bytes(flipped))


def rebuilt(index, body: bytes = b"", header=None) -> bytes:
    """A file whose checksums are right, whatever it says."""
    packed = zlib.compress(index if isinstance(index, bytes) else json.dumps(index).encode())
    data = struct.pack("<II", len(packed), zlib.crc32(packed + body)) + packed + body
    made = {
        "__metadata__": {"format": "pqk_fast packed", "version": "1"},
        "data": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
    }
    text = json.dumps({**made, **(header or {})}).encode()
    return len(text).to_bytes(8, "little") + text + data


LAYER = ["a", [2, 2], 4, 0, 1, 2]
STEP = struct.pack("<f", 0.5)


@pytest.mark.parametrize(
    ("index", "body", "says"),
    [
        ([[LAYER], [], {}], STEP, "asks for 6 bytes of content, there are 4"),
        ([[LAYER], [], {}], struct.pack("<f", -1.0) + b"\0\0", "a step size is not positive"),
        ([[LAYER], [], {}], struct.pack("<f", float("nan")) + b"\0\0", "a step size is not positive"),
        ([[LAYER], [], {}], STEP + b"\x88\0", "a value is outside -7..7"),
        ([[["a", [2, 2], 9, 0, 1, 2]], [], {}], b"", "bits must be a whole number in 2..8"),
        ([[["a", [2, 2], 4, 4, 1, 2]], [], {}], b"", "the encoding must be a whole number in 0..3"),
        ([[["a", [2, 2], 4, 0, 3, 2]], [], {}], b"", "expected 1 or 2 step sizes"),
        ([[["a", [2, -2], 4, 0, 1, 2]], [], {}], b"", "a size must be a whole number"),
        ([[["a", [True], 4, 0, 1, 2]], [], {}], b"", "a size must be a whole number"),
        ([[["a", [1 << 29], 4, 3, 1, 2]], [], {}], b"", "more than 268435456 weights"),
        ([[["a", [1 << 39, 1 << 39], 4, 3, 1, 2]], [], {}], b"", "a shape of"),
        ([[["a", [1] * 9, 4, 0, 1, 2]], [], {}], b"", "at most 8 sizes"),
        ([[[3, [2], 4, 0, 1, 2]], [], {}], b"", "a name in the index is not text"),
        ([[LAYER[:3]], [], {}], b"", "the index is damaged"),
        ([[LAYER], [["a.weight", [1]]], {}], STEP + b"\0\0" + STEP, "names a tensor twice"),
        ([[LAYER], [["b", [1 << 40]]], {}], STEP + b"\0\0", "asks for"),
        ([[LAYER], []], STEP + b"\0\0", "the index is damaged"),
        ([[LAYER], [], []], STEP + b"\0\0", "no metadata"),
        ({}, b"", "the index is damaged"),
        (b"[" * 100_000, b"", "the index is damaged"),
        (b"\xff", b"", "the index is damaged"),
    ],
)
def test_a_file_that_lies_is_refused(index, body: bytes, says: str) -> None:
    with pytest.raises(PackedError, match=says.replace("(", r"\(")):
        parse_packed(rebuilt(index, body))


def test_the_least_file_is_read() -> None:
    layer = parse_packed(rebuilt([[LAYER], [["b", [1]]], {"x": 1}], STEP + STEP + b"\x1f\x07")).layers["a"]
    assert layer.q.tolist() == [[-1, 1], [7, 0]]
    assert layer.weight().tolist() == [[-0.5, 0.5], [3.5, 0.0]]


def test_bombs_do_not_unpack() -> None:
    bomb = json.dumps([[], [], {"x": " " * (reader.MOST_INDEX + 10)}]).encode()
    with pytest.raises(PackedError, match="larger than any that is written"):
        parse_packed(rebuilt(bomb))
    many = [[["a", [1 << 28], 8, 3, 1, 5]], [], {}]
    with pytest.raises(PackedError, match="expected at least"):
        parse_packed(rebuilt(many, STEP + bytes(5)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected a safetensors file, got 0 bytes"),
        (b"\xff" * 20, "cut off within its header"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not an object"),
        ((2).to_bytes(8, "little") + b"{}", "must have the format 'pqk_fast packed'"),
        (rebuilt([], header={"__metadata__": {"format": "pqk_fast packed", "version": "2"}}), "use a newer pqk_fast"),
        (rebuilt([], header={"more": {}}), "expected one tensor 'data'"),
    ],
)
def test_foreign_files_are_refused_by_what_they_are(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(PackedError, match=says) as error:
        read_packed(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.b(torch.relu(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("make", [Shared, lambda: nn.Linear(32, 16)])
def test_modules_with_two_names_and_with_none(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = student(make(), bits=4, sparsity=0.9)
    size = save_packed(model, tmp_path / "s.pqk")
    packed = read_packed(tmp_path / "s.pqk")
    assert not [name for name in packed.tensors if name.endswith("weight")], "each weight is there once, packed"
    assert size < 1000
    plain, expected = load_packed(tmp_path / "s.pqk", make()), pqk.convert(model).state_dict()
    torch.testing.assert_close(dict(plain.state_dict()), dict(expected), rtol=0, atol=0)
    runtime = load_runtime(tmp_path / "s.pqk", make())
    x = torch.randn(2, 8, 5, 5) if isinstance(plain, Shared) else torch.randn(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(runtime(x), plain(x), rtol=1e-5, atol=1e-5)
    if isinstance(runtime, Shared):
        assert runtime.a is runtime.b
        assert isinstance(runtime.a, PackedConv2d)


def test_statistics_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = student(net())
    model[1].running_var[0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.running_var holds NaN or infinity: training had diverged"):
        save_packed(model, tmp_path / "s.pqk")
