"""What each layer minds: rows against changes made by hand, the choice of bits, and the command."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import package
from small_run import net
from test_cli import speech  # noqa: F401
from test_deploy_commands import networks, run  # noqa: F401
from test_packed import student

from pqk_fast import cli
from pqk_fast.branches import pqk_layers
from pqk_fast.deploy.sensitivity import Row, choose_bits, least_bytes, payload, sensitivity
from pqk_fast.recipe_files import load_recipe
from pqk_fast.step_size import initial_step


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(n, 8), torch.randint(3, (n,))) for n in (7, 5)]


def measured(model, data) -> tuple[float, float]:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    logits = model(x)
    return F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).float().mean().item()


def test_every_row_is_the_student_with_one_layer_changed() -> None:
    model, data = student(net(), bits=4, sparsity=0.5).train(), batches()
    for layer in pqk_layers(model).values():  # as phase 2 may leave them: the full net's own are the largest
        layer.weight.data = torch.where(layer.weight_mask, layer.weight, 9 * layer.weight)
    before = copy.deepcopy(model.state_dict())
    rows = list(sensitivity(model, data, (2, 3, 4, 8), (0.3, 0.9)))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(layer.bits == 4 for layer in pqk_layers(model).values())
    model.eval()
    assert (rows[0].loss, rows[0].accuracy) == pytest.approx(measured(model, data))
    assert rows[0].bytes == sum(payload(name, layer) for name, layer in pqk_layers(model).items())
    tried = {(row.layer, row.change, row.value): row for row in rows[1:]}
    assert len(tried) == len(rows) - 1
    for name, layer in pqk_layers(model).items():
        denser = 1 - float(layer.weight_mask.float().mean()) >= 0.3
        assert {key[1:] for key in tried if key[0] == name} == {
            ("bits", 2), ("bits", 3), ("bits", 4), ("sparsity", 0.9), *([] if denser else [("sparsity", 0.3)])
        }  # fmt: skip
        assert tried[name, "bits", 4].loss == rows[0].loss
        for bits in (2, 3):
            other = copy.deepcopy(model)
            changed = pqk_layers(other)[name]
            changed.weight.data = changed.student_weight().detach()
            changed.bits = bits
            changed.weight_step.data = initial_step(changed.weight, changed.weight_mask, bits, "mse")
            row = tried[name, "bits", bits]
            assert (row.loss, row.accuracy) == pytest.approx(measured(other, data))
            assert row.bytes == payload(name, changed)
        other = copy.deepcopy(model)
        changed = pqk_layers(other)[name]
        kept = changed.weight.numel() - int(0.9 * changed.weight.numel())
        order = (changed.weight * changed.weight_mask).abs().flatten().argsort(descending=True, stable=True)[:kept]
        changed.weight_mask.fill_(False).view(-1)[order] = True
        assert tried[name, "sparsity", 0.9].loss == pytest.approx(measured(other, data)[0])


def test_a_model_is_given_back_when_it_is_interrupted() -> None:
    model = student(net(), sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    rows = sensitivity(model, batches(), (2,))
    next(rows), next(rows)
    rows.close()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="the batches are empty"):
        list(sensitivity(student(net()), []))
    with pytest.raises(ValueError, match=r"bits must be an integer in 2\.\.8, got 9"):
        list(sensitivity(student(net()), batches(), (9,)))
    with pytest.raises(ValueError, match="no PQK layers"):
        list(sensitivity(net(), batches()))


def test_the_bits_that_are_chosen_are_the_best_that_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [Row("", "as it is", 0, 100, 1.0, 50.0), Row("a", "sparsity", 0.9, 1, -9.0, 50.0)]
    for layer in "abcd":
        sizes = torch.randint(5, 60, (4,), generator=generator).sort().values.tolist()
        losses = torch.rand(4, generator=generator).tolist()
        rows += [Row(layer, "bits", b, s, v, 0.0) for b, s, v in zip((2, 3, 4, 8), sizes, losses, strict=True)]
    options = [[row for row in rows if row.layer == layer and row.change == "bits"] for layer in "abcd"]
    every = list(itertools.product(*options))
    least = min(sum(row.bytes for row in chosen) for chosen in every)
    assert least_bytes(rows) == least
    for budget in range(least, 260, 7):
        fitting = [chosen for chosen in every if sum(row.bytes for row in chosen) <= budget]
        best = min(sum(row.loss for row in chosen) for chosen in fitting)
        bits = choose_bits(rows, budget)
        chosen = [next(row for row in rows if (row.layer, row.value) == pair) for pair in bits.items()]
        assert sum(row.bytes for row in chosen) <= budget
        assert sum(row.loss for row in chosen) == pytest.approx(best)
    with pytest.raises(ValueError, match=f"at least {least} bytes with the bits that were tried, got {least - 1}"):
        choose_bits(rows, least - 1)


def test_the_command_writes_a_table_a_picture_and_a_record(run: Path, speech, tmp_path: Path, capsys) -> None:  # noqa: F811
    package("matplotlib")
    arguments = ["sensitivity", str(run), "--data", str(speech), "--bits", "2", "--sparsities", "0.98"]
    assert cli.main([*arguments, "--bytes", "100000", "--page", str(tmp_path / "page")]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "page" / "sensitivity.json").read_text())
    mixed = tmp_path / "mixed.toml"
    mixed.write_text('extends = "demo"\n' + shown[shown.index("[pqk.layer_bits]") :])
    assert load_recipe(mixed).pqk.layer_bits == choose_bits([Row(**row) for row in record["rows"]], 100000)
    assert record["rows"][0]["change"] == "as it is"
    text = (tmp_path / "page" / "sensitivity.md").read_text()
    assert "2 bits" in text
    assert "98 % sparse" in text
    assert (tmp_path / "page" / "sensitivity" / "sensitivity.png").is_file()
    assert cli.main([*arguments, "--bytes", "1", "--page", str(tmp_path / "other")]) == 1
    assert "got 1" in capsys.readouterr().err
    assert (tmp_path / "other" / "sensitivity.json").is_file(), "what was measured is not lost"
