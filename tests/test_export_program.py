"""torch.export programs of students: the same outputs for any batch size, and nothing else in the file."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small_run import net
from test_packed import student
from torch import nn

import pqk_fast as pqk
from pqk_fast import PQKConfig
from pqk_fast.deploy.program import export_program
from pqk_fast.models import create_model

MAKES = {
    "res8_narrow": (lambda: create_model("res8_narrow", 12), (5, 101, 40)),
    "resnet20": (lambda: create_model("resnet20", 100), (2, 3, 32, 32)),
    "linear": (net, (5, 8)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(48, 3)),
        (5, 3, 8),
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_loaded_program_gives_what_the_student_gives(name: str, tmp_path: Path) -> None:
    make, shape = MAKES[name]
    torch.manual_seed(0)
    model = student(make(), sparsity=0.6)
    path = tmp_path / "student.pt2"
    assert export_program(model, torch.zeros(1, *shape[1:]), path) == path.stat().st_size
    program = torch.export.load(path)
    x = torch.randn(shape)
    for rows in (len(x), 1):
        assert torch.equal(program.module()(x[:rows]), model(x[:rows]))
    # no operation of this library: it loads with torch alone
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert used
    assert all(target.startswith("aten.") for target in used)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("bits", [4, 32])
def test_phases_and_the_callers_model_is_untouched(phase: int, bits: int, tmp_path: Path) -> None:
    model = pqk.prepare(net(), PQKConfig(bits=bits, sparsity=0.5)) if phase == 1 else student(net(), bits=bits)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_program(model, torch.zeros(3, 8), tmp_path / "s.pt2")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    x = torch.randn(4, 8)
    assert torch.equal(torch.export.load(tmp_path / "s.pt2").module()(x), model.eval()(x))


def test_metadata_and_nothing_of_the_example_or_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "s.pt2"
    export_program(student(net()), torch.full((1, 8), 1234.5), path, {"model": "small", "labels": ["a", "ö"]})
    extra = {"metadata.json": ""}
    assert torch.export.load(path, extra_files=extra).example_inputs is None
    assert json.loads(extra["metadata.json"]) == {"model": "small", "labels": ["a", "ö"], "bits": 4}
    with zipfile.ZipFile(path) as file:
        content = b"".join(file.read(name) for name in file.namelist())
    for secret in (
        torch.tensor(1234.5).numpy().tobytes(),
        str(Path(pqk.__file__).parent).encode(),
        sys.prefix.encode(),
    ):
        assert secret not in content


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt2"
    with pytest.raises(ValueError, match="no PQK layers"):
        export_program(net(), torch.zeros(1, 8), path)
    with pytest.raises(TypeError, match=r"a tensor or a tuple of tensors, .* got list"):
        export_program(student(net()), [1.0], path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"does not take the example \(float32 \[1, 9\]\)"):
        export_program(student(net()), torch.zeros(1, 9), path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        export_program(student(net()), torch.zeros(1, 8), path, {"labels": {1, 2}})
    assert not list(tmp_path.iterdir())
