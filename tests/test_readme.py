"""The README's example runs as it stands, and its commands exist."""

import re
from pathlib import Path

import torch
from test_packed import res8_narrow, student
from torch import nn

from pqk_fast import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_drop_in_example_gives_a_sparse_low_bit_model():
    example = EXAMPLES[0]
    torch.manual_seed(0)
    batch = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))

    def my_net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))

    names = {"MyNet": my_net, "loader": [batch] * 25, "epochs": 4, "warm_up": 10}
    exec(example, names)
    student = names["student"]
    weights = [student[0].weight, student[4].weight]
    total, zeros = sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
    assert zeros >= int(0.9 * total)
    assert all(w.unique().numel() <= 15 for w in weights)


def test_the_packed_example_gives_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = student(res8_narrow()), torch.randn(2, 101, 40)
    names = {"model": model, "x": x}
    exec(EXAMPLES[1], names)
    assert torch.equal(names["plain"](x), model(x))
    for fast in ("fast", "layers"):
        torch.testing.assert_close(names[fast](x), model(x), rtol=1e-5, atol=1e-5)
    assert len(EXAMPLES) == 2


def test_the_commands_are_there():
    commands = set(re.findall(r"pqk-fast (\w+)", README))
    assert commands >= {"train", "eval", "recipes", "doctor"}
    listed = set(re.findall(r"^    (\w+)(?: |$)", cli._parser().format_help(), re.MULTILINE))
    assert commands <= listed
