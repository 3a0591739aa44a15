"""The C source: strict C99, PyTorch's outputs, sanitizers without a finding, flash and RAM as they are reported."""

import functools
import itertools
import os
import re
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import required
from test_packed import student
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast.data.features import MFCC
from pqk_fast.data.speech_commands import read_wav
from pqk_fast.deploy.c_source import CReport, export_c
from pqk_fast.deploy.graph import read_graph
from pqk_fast.deploy.memory_plan import make_plan
from pqk_fast.models import create_model

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wshadow", "-Wdouble-promotion", "-Werror", "-pedantic", "-O2"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
# Every byte of scratch and logits is 0xff (NaN) before each call; all three arrays end where their memory ends.
MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "student.h"

int main(void)
{
    const size_t in = STUDENT_INPUT_FLOATS * sizeof(float), out = STUDENT_OUTPUT_FLOATS * sizeof(float);
    float *input = malloc(in), *before = malloc(in), *logits = malloc(out), *scratch = malloc(STUDENT_SCRATCH_BYTES);
    while (fread(input, 1, in, stdin) == in) {
        memcpy(before, input, in);
        memset(logits, 0xff, out);
        memset(scratch, 0xff, STUDENT_SCRATCH_BYTES);
        student_run(input, logits, scratch);
        if (memcmp(before, input, in) != 0)
            return 1;
        fwrite(logits, 1, out, stdout);
    }
    free(input), free(before), free(logits), free(scratch);
    return 0;
}
"""


class EveryOperation(nn.Module):
    """Each kind of operation, in forms that the paper's networks do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, (3, 4), padding="same", dilation=2, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.same = nn.Conv2d(6, 6, 3, padding=1)
        self.strided = nn.Conv2d(6, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1))
        self.branch = nn.BatchNorm2d(5)
        self.row = nn.Conv1d(5, 4, 3, stride=2, padding=1)
        self.after = nn.BatchNorm1d(4)
        self.heads = nn.ModuleList(nn.Linear(size, 5) for size in (10, 8, 4, 2))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.grouped(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        x = x + F.relu(self.same(x))  # the convolution needs all planes of what the sum could overwrite
        kept = x
        x = x.clone()
        x += F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = self.strided(F.relu(x + kept))
        x = F.avg_pool2d(x + self.branch(x), 3, 2, 1, ceil_mode=True)  # [1, 5, 4, 3]
        row = self.after(F.relu(self.row(x.transpose(2, 3)[:, :, 1:].flatten(2))))
        row = F.max_pool1d(F.avg_pool1d(row, 2, stride=1), 2, stride=1)  # [1, 4, 2]
        parts = (
            F.relu(F.adaptive_avg_pool2d(x, (2, 1)).flatten(1)),
            row.permute(0, 2, 1).reshape(1, 8),
            row.mean(2),
            row[:, 1],
        )
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        for head, part in zip(self.heads, parts, strict=True):
            x = x + head(part)
        return F.relu(self.last(F.dropout(x, training=self.training)))


class Sum(nn.Module):
    """Layers of every number of bits with many, some and few kept weights, and one with none, side by side."""

    LAYERS = (*itertools.product(range(2, 9), (1.0, 0.5, 0.05)), (4, 0.0))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for bits, density in self.LAYERS:
            layer = student(nn.Conv2d(2, 5, 3, bias=False), bits=bits, sparsity=0.5)
            step, most = layer.weight_step, 2 ** (bits - 1) - 1
            q = torch.randint(1, most + 1, layer.weight.shape) * (torch.randint(0, 2, layer.weight.shape) * 2 - 1)
            layer.weight.data = step.detach() * q
            layer.weight_mask.copy_(torch.rand(layer.weight.shape) < density)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        total = F.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            total = total + F.relu(layer(x))
        return total.mean((2, 3))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A student and an example."""
    torch.manual_seed(0)
    if name == "sum":
        return Sum(), torch.zeros(1, 2, 6, 5)
    if name == "every operation":
        config = {"sparsity": 0.5, "per_channel": True, "exclude": ("last",)}
        return student(EveryOperation(), **config), torch.zeros(1, 3, 11, 17)
    shape = (1, 101, 40) if name.startswith("res8") else (1, 3, 32, 32)
    return student(create_model(name, 12)), torch.zeros(shape)


@dataclass
class Exported:
    model: nn.Module
    example: Tensor
    report: CReport


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @functools.cache
    def export(name: str) -> Exported:
        model, example = make(name)
        return Exported(model, example, export_c(model, example, tmp_path_factory.mktemp("c")))

    return export


@pytest.fixture(scope="module")
def gcc() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        (pytest.fail if required("NATIVE") else pytest.skip)("needs gcc or cc")
    return found


def run(command: list[str], folder: Path, **more: Any) -> bytes:
    """Standard output. A sanitizer that this process runs under is not handed on."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, **more)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def outputs(report: CReport, inputs: Tensor, gcc: str, flags: list[str]) -> Tensor:
    """What the C function computes of each input."""
    folder = report.source.parent
    (folder / "main.c").write_text(MAIN)
    run([gcc, *STRICT, *flags, "main.c", report.source.name, "-o", "main"], folder)
    logits = np.frombuffer(run(["./main"], folder, input=inputs.numpy().tobytes()), np.float32)
    return torch.from_numpy(logits.copy()).reshape(len(inputs), -1)


def assert_same(exported: Exported, inputs: Tensor, gcc: str, flags: list[str]) -> None:
    """To a tenth of what is promised."""
    plain = pqk.convert(exported.model).eval()
    with torch.no_grad():
        expected = torch.cat([plain(x[None]) for x in inputs])
    found = outputs(exported.report, inputs, gcc, flags)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std(0).mean() > 0.01 * expected.abs().max()  # outputs that hardly depend on the input prove nothing


@pytest.mark.parametrize("name", ["res8_narrow", "resnet20", "every operation", "sum"])
def test_outputs_are_those_of_pytorch(name: str, exported: Callable[[str], Exported], gcc: str) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, in scratch full of NaN."""
    made = exported(name)
    loudness = torch.tensor([0.1, 1, 10]).reshape(-1, *[1] * (made.example.dim() - 1))
    assert_same(made, loudness * torch.randn(3, *made.example.shape[1:]), gcc, SANITIZED)


@pytest.mark.slow
def test_real_clips(real_speech: Path, exported: Callable[[str], Exported], gcc: str) -> None:
    names = (real_speech / "testing_list.txt").read_text().split()[::200]
    clips = torch.zeros(len(names), 16_000)
    for row, name in zip(clips, names, strict=True):
        samples = torch.from_numpy(read_wav(real_speech / name)[:16_000] / np.float32(32_768))
        row[: len(samples)] = samples
    assert len(clips) > 5
    for name in ("res8_narrow", "res8"):
        assert_same(exported(name), MFCC()(clips), gcc, [])


def test_flash_and_ram_are_what_is_reported(exported: Callable[[str], Exported], gcc: str) -> None:
    """And nothing in the object file can be written to."""
    report = exported("res8_narrow").report
    folder, source = report.source.parent, report.source.read_text()
    names = re.findall(r"^static const \w+ (\w+)", source, re.MULTILINE)
    prints = "".join(f'printf("{name} %zu\\n", sizeof {name});' for name in names)
    text = f'#include <stdio.h>\n#include "student.c"\nint main(void) {{ {prints} return 0; }}\n'
    (folder / "sizes.c").write_text(text)
    run([gcc, "-std=c99", "sizes.c", "-o", "sizes"], folder)
    sizes = {name: int(size) for name, size in map(str.split, run(["./sizes"], folder).decode().splitlines())}
    assert len(sizes) > 15
    assert report.weights == sum(size for name, size in sizes.items() if name.endswith("_weights"))
    assert report.tables == sum(size for name, size in sizes.items() if not name.endswith("_weights"))
    assert report.weights == sum(layer.bytes for layer in report.layers)
    run([gcc, "-std=c99", "-Os", "-c", "student.c"], folder)
    text_size, data, bss = map(int, run(["size", "student.o"], folder).decode().splitlines()[1].split()[:3])
    assert (data, bss) == (0, 0)
    assert report.code is not None
    assert 1000 < report.code < text_size - report.weights
    assert report.flash == report.weights + report.tables + report.code < 6500
    # three results of 19 x 25 x 13 at once and a plane of a fourth
    assert report.scratch == 4 * (3 * 19 + 1) * 25 * 13
    header = report.header.read_text()
    assert f"scratch {report.scratch} bytes" in header
    assert f"weights {report.weights} bytes, tables {report.tables} bytes, code {report.code} bytes (" in header
    assert f"#define STUDENT_SCRATCH_FLOATS {report.scratch // 4}\n" in header


def test_it_compiles_for_32_bits_without_a_c_library(exported: Callable[[str], Exported], gcc: str) -> None:
    report = exported("every operation").report
    command = [gcc, *STRICT, "-m32", "-ffreestanding", "-c", "-o", "freestanding.o"]
    if subprocess.run([*command, "-x", "c", "-"], input=b"int x;", cwd=report.source.parent).returncode:
        pytest.skip("the compiler knows no -m32")
    run([*command, report.source.name], report.source.parent)


def test_each_layer_takes_the_smallest_layout(exported: Callable[[str], Exported]) -> None:
    made = exported("sum")
    found = dict(zip(Sum.LAYERS, made.report.layers, strict=True))
    for (bits, density), layer in found.items():
        mask = made.model.get_submodule(layer.name.removesuffix(".weight")).weight_mask
        kept = int(mask.sum())
        assert (layer.bits, layer.kept, layer.shape) == (bits, kept, (5, 2, 3, 3))
        dense, bitmap = -(-90 * bits // 8), 12 + -(-kept * bits // 8)
        assert layer.bytes <= min(dense, bitmap)
        if density == 1.0:
            assert (layer.layout, layer.bytes) == ("FIELDS", dense)
        elif density == 0.0:
            assert layer.bytes == 0
    assert {layer.layout for (_, density), layer in found.items() if density == 0.5} >= {"BITMAP"}
    assert all(layer.bytes < 12 for (_, density), layer in found.items() if density == 0.05)


@pytest.mark.parametrize("name", ["res8_narrow", "resnet20", "every operation"])
def test_no_two_results_that_are_needed_share_memory(name: str) -> None:
    """Lifetimes are reckoned anew here: from the stage that makes a result to the last one that reads it."""
    model, example = make(name)
    network = read_graph(pqk.convert(model).eval(), example)
    plan = make_plan(network)
    stage_of = {op.output: i for i, stage in enumerate(plan.stages) for op in stage}
    ops = {op.output: op for op in network.ops}
    order = list(ops)
    assert [op.output for stage in plan.stages for op in stage] == order
    readers = {name: [op.output for op in network.ops if name in op.inputs] for name in order}
    last = {name: max(stage_of[reader] for reader in readers[name] or [name]) for name in order}
    for one, two in itertools.combinations([name for name in order if plan.of[name] is not plan.result], 2):
        a, b = plan.of[one], plan.of[two]
        if last[one] < stage_of[two]:
            continue
        if a is not b:
            assert a.offset + a.floats <= b.offset or b.offset + b.floats <= a.offset, (one, two)
            continue
        # in place: what reads the older one reads it before the younger is made, or makes it
        chain = a.values[a.values.index(one) :]
        maker = chain[1]
        assert ops[maker].in_place
        assert one in ops[maker].inputs
        assert order.index(readers[one][-1]) == order.index(maker)
        early = [reader for reader in readers[one] if reader != maker and stage_of[reader] == stage_of[maker]]
        assert all(ops[reader].by_plane and stage_of[one] == stage_of[maker] for reader in early)
    for name in order:
        buffer = plan.of[name]
        assert buffer.whole or last[name] == stage_of[name]
        assert buffer.floats == ops[name].size * (ops[name].planes if buffer.whole else 1)
        assert buffer is plan.result or buffer.offset + buffer.floats <= plan.floats
    alive = [sum(b.floats for b in plan.buffers if b.first <= i <= b.last) for i in range(len(plan.stages))]
    assert plan.floats == max(alive)  # no arrangement takes less


def test_names_and_paths(tmp_path: Path, gcc: str) -> None:
    """Any name, next to another network, in a new folder; modules may be called what they like."""
    torch.manual_seed(0)
    names = ("for", "read", "a_b", "a*/", "0", "x_weights", "/*??/\\")
    model = nn.Sequential(OrderedDict([(name, nn.Linear(4, 4)) for name in names]))
    model.add_module("a", nn.Sequential(OrderedDict(b=nn.Linear(4, 4))))
    prepared = student(model, sparsity=0.2)
    report = export_c(prepared, torch.zeros(1, 4), tmp_path / "new" / "net.v2.c", "my_Net2")
    assert (report.source, report.header) == (tmp_path / "new" / "net.v2.c", tmp_path / "new" / "net.v2.h")
    run([gcc, *STRICT, "-c", "net.v2.c"], tmp_path / "new")
    assert "void my_Net2_run(const float *input, float *logits, float *scratch);" in report.header.read_text()
    assert "#define MY_NET2_SCRATCH_FLOATS 8\n" in report.header.read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["net.v2.c", "net.v2.h", "net.v2.o"]


def test_a_network_of_one_layer_needs_no_memory(tmp_path: Path, gcc: str) -> None:
    model = student(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), sparsity=0.2)
    before = [module.training for module in model.modules()]
    made = Exported(model, torch.zeros(1, 4), export_c(model, torch.zeros(1, 4), tmp_path / "student"))
    assert made.report.scratch == 0
    assert [module.training for module in model.modules()] == before
    assert_same(made, torch.randn(5, 4), gcc, SANITIZED)


def test_without_a_compiler_the_code_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = export_c(student(nn.Sequential(nn.Linear(4, 2))), torch.zeros(1, 4), tmp_path / "student")
    assert (report.code, report.flash) == (None, report.weights + report.tables)
    assert "code not measured." in report.header.read_text()


class Computes(nn.Module):
    """A layer of 4 inputs and outputs, and a function of the input and its output."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: y.sigmoid(), r"sigmoid: aten.sigmoid.default is not supported. Known are: conv2d, conv1d, lin"),
        (lambda x, y: (x, y), "a network that gives one tensor"),
        (lambda x, y: x.unsqueeze(0), "computes nothing"),
        (lambda x, y: y + 1, "a constant or a parameter"),
        (lambda x, y: torch.add(x, y, alpha=2), "alpha=1"),
        (lambda x, y: y + y.view(4, 1), "two values of one shape"),
        (lambda x, y: y.view(2, 2).mean(0), "a mean over the last dimensions"),
        (lambda x, y: F.dropout(y, training=True), "it is in training mode"),
        (lambda x, y: y.expand(2, 4), "without a copy"),
        (lambda x, y: y.double(), "not supported"),
        (lambda x, y: F.max_pool1d(y.view(2, 1, 2), 2), r"expected a value \[1, channels, size\]"),
        (lambda x, y: F.max_pool1d(y.view(1, 1, 4), 2, dilation=2), "dilation is not supported"),
        (lambda x, y: F.avg_pool2d(y.view(1, 1, 2, 2), 2, divisor_override=3), "divisor_override"),
        (lambda x, y: F.adaptive_avg_pool1d(y.view(1, 1, 4), 3), "an output that divides"),
        (lambda x, y: F.batch_norm(y.view(1, 2, 2), None, None, training=True), "the statistics of training"),
        (lambda x, y: F.linear(y, y), "parameters and buffers, not values"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(function: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_c(student(Computes(function)), torch.zeros(1, 4), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    x, model = torch.zeros(1, 4), student(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
    for example in (torch.zeros(2, 4), x.double(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="an example of one fp32 input"):
            export_c(model, example, tmp_path / "student")
    for name in ("", "2nd", "a-b", "ä", "a b"):
        with pytest.raises(ValueError, match="must be a C identifier"):
            export_c(model, x, tmp_path / "student", name)
    with pytest.raises(ValueError, match="expected a file name of"):
        export_c(model, x, tmp_path / 'a"b')
    with pytest.raises(ValueError, match="no PQK layers"):
        export_c(nn.Linear(4, 2), x, tmp_path / "student")
    with pytest.raises(ValueError, match="bits=32 prunes without quantizing"):
        export_c(student(nn.Sequential(nn.Linear(4, 2)), bits=32), x, tmp_path / "student")
    with pytest.raises(ValueError, match=r"0: expected sizes up to 65535, .* got 65536"):
        export_c(student(nn.Sequential(nn.Linear(65_536, 1))), torch.zeros(1, 65_536), tmp_path / "student")
    with pytest.raises(ValueError, match="one row of inputs"):
        export_c(student(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3))), x, tmp_path / "student")
    statistic = "0: a weight, step size, bias or statistic is"
    for name, value, says in (
        ("0.weight", torch.nan, "layer '0': some weights are not finite"),
        ("0.weight_step", torch.inf, "layer '0': expected step sizes that are finite"),
        ("0.bias", torch.inf, statistic),
        ("1.running_mean", torch.nan, statistic),
    ):
        broken = student(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), sparsity=0.2)
        broken.state_dict()[name].view(-1)[0] = value
        with pytest.raises(ValueError, match=says):
            export_c(broken, x, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_both_files_are_written_or_none(tmp_path: Path) -> None:
    (tmp_path / "student.c").write_text("old")
    (tmp_path / "student.h").mkdir()
    with pytest.raises(OSError, match=r"student\.h"):
        export_c(student(nn.Sequential(nn.Linear(4, 2))), torch.zeros(1, 4), tmp_path / "student")
    assert (tmp_path / "student.c").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.c", "student.h"]
