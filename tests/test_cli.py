"""The command line on a tiny data set: train, eval, recipes, doctor, and every way to get it wrong."""

import json
import os
import shutil
import signal
import wave
from itertools import chain

import numpy as np
import pytest
import torch
from cases import package

from pqk_fast import cli
from pqk_fast.callbacks import ProgressDisplay
from pqk_fast.commands import training
from pqk_fast.data.speech_commands import KEYWORDS

TINY = [
    "phase1.steps=6", "phase1.epoch_steps=3", "phase2.steps=4", "phase2.epoch_steps=2", "phase2.distill_start=2",
    "data.batch_size=8", "pqk.mask_interval=2",
]  # fmt: skip
SETTINGS = [part for setting in TINY for part in ("--set", setting)]
SPEAKERS = {"train": ["a0", "a1", "a2"], "validation": ["b0"], "testing": ["c0"]}


def write_wav(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Every word a tone of its own, three training speakers, one each for validation and testing."""
    root = tmp_path_factory.mktemp("speech")
    random = np.random.default_rng(0)
    time = np.arange(16_000) / 16_000
    for number, word in enumerate((*KEYWORDS, "bed", "cat")):
        for speaker in chain.from_iterable(SPEAKERS.values()):
            tone = 8000 * np.sin(2 * np.pi * (200 + 150 * number) * time) + 300 * random.standard_normal(16_000)
            write_wav(root / word / f"{speaker}_nohash_0.wav", tone)
    write_wav(root / "_background_noise_" / "white.wav", 3000 * random.standard_normal(40_000))
    for split in ("validation", "testing"):
        lines = [f"{word}/{s}_nohash_0.wav" for word in (*KEYWORDS, "bed", "cat") for s in SPEAKERS[split]]
        (root / f"{split}_list.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def run(speech, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(out), *SETTINGS]
    assert cli.main([*command, "--device", "cpu"]) == 0
    return out


def test_train_writes_the_record_that_the_tables_are_made_from(run):
    record = json.loads((run / "record.json").read_text())
    assert set(record) >= {"recipe", "versions", "hardware", "seed", "curves", "results", "kept_fraction", "layers"}
    assert set(record["results"]) == {"vanilla", "phase1_p", "phase2_p", "phase2_f", "finetune"}
    for result in record["results"].values():
        assert set(result) == {"last", "best_dev", "confusion"}
        assert 0 <= result["last"]["testing"] <= 100
        assert set(result["last"]) == {"validation", "testing"}
    assert set(record["curves"]) == {"vanilla", "phase1", "phase2", "finetune"}
    assert record["recipe"]["phase1"]["steps"] == 6
    weights = sum(layer["weights"] for layer in record["layers"])
    assert sum(layer["kept"] for layer in record["layers"]) == weights - int(0.9 * weights)
    assert record["kept_fraction"] == pytest.approx(1 - int(0.9 * weights) / weights)
    assert {"name", "kept", "step_size", "clipped_fraction"} <= set(record["layers"][0])
    data = record["data"]
    assert len(data.pop("fingerprint")) == 16
    assert data.pop("classes") == ["silence", "unknown", *KEYWORDS]
    assert data == {"name": "speech_commands", "train": 36, "validation": 12, "testing": 12}


def test_eval_repeats_the_records_accuracies(run, speech, capsys):
    record = json.loads((run / "record.json").read_text())
    for split in ("validation", "testing"):
        assert cli.main(["eval", str(run), "--data", str(speech), "--split", split, "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        for name, result in record["results"].items():
            row = next(line for line in printed.splitlines() if name in line)
            numbers = [result[moment][split] for moment in ("last", "best_dev")]
            shown = [cell.strip() for cell in row.split("│")[2:4]]
            assert shown == [f"{number:.1f}" for number in numbers], (name, split)


def test_eval_all_takes_every_clip_without_list_files(run, speech, tmp_path, capsys):
    for word in (*KEYWORDS, "bed"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "x.wav").write_bytes((speech / word / "a0_nohash_0.wav").read_bytes())
    assert cli.main(["eval", str(run), "--data", str(tmp_path), "--split", "all", "--device", "cpu"]) == 0
    assert "all clips" in capsys.readouterr().out


def test_the_number_of_classes_must_be_the_data_sets(speech, tmp_path, capsys):
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(tmp_path / "r")]
    assert cli.main([*command, "--set", "data.classes=5"]) == 1
    assert "data.classes is 5, but speech_commands has 12 classes" in capsys.readouterr().err


def test_a_finished_run_is_never_overwritten(run, speech, capsys):
    before = (run / "record.json").read_bytes()
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(run), *SETTINGS]
    assert cli.main(command) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert (run / "record.json").read_bytes() == before


def test_an_unfinished_run_goes_on_with_resume_and_is_not_started_over(speech, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(out), *SETTINGS]
    command += ["--device", "cpu", "--set", "stages=['phase1', 'phase2']"]

    class Stop(ProgressDisplay):
        def on_step(self, stage, step):
            if stage == "phase2":
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "ProgressDisplay", Stop)
        assert cli.main(command) == 128 + signal.SIGTERM
    printed = " ".join(capsys.readouterr().out.split())
    assert "SIGTERM: phase2 stopped after step 1 of 4" in printed
    assert "--resume" in printed
    assert not (out / "record.json").exists()
    assert cli.main(command) == 1
    assert "holds a run that was begun before: go on with --resume" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*command, "--resume", "--set", "phase2.steps=5"]) == 1
    assert "recipe.phase2.steps was 4, now it is 5" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*command, "--resume", "--precision", "bf16"]) == 1
    assert "options.precision was 'fp32', now it is 'bf16'" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["eval", str(out), "--data", str(speech), "--device", "cpu"]) == 0
    assert "phase2_p" in capsys.readouterr().out
    resume = ["train", "--resume", "--out", str(out), "--data", str(speech), "--device", "cpu"]
    assert cli.main([*resume, "--set", "seed=1"]) == 1
    assert cli.main(resume) == 0, "the recipe is in the checkpoint"
    record = json.loads((out / "record.json").read_text())
    assert [row["step"] for row in record["curves"]["phase2"]] == [2, 4]
    capsys.readouterr()
    assert cli.main(resume) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main([*command, "--resume", "--set", "phase2.steps=5"]) == 1
    assert "the finished run of another recipe: recipe.phase2.steps" in " ".join(capsys.readouterr().err.split())


def test_resume_without_a_checkpoint_starts_and_says_so(speech, tmp_path, capsys):
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(tmp_path / "run")]
    command += [*SETTINGS, "--device", "cpu", "--resume", "--set", "stages=['vanilla']", "--no-recycle"]
    assert cli.main([*command, "--keep-checkpoints", "1"]) == 0
    printed = capsys.readouterr().out
    assert "starting from the beginning" in printed
    assert "malloc" not in printed
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_scalars_for_tensorboard(speech, tmp_path):
    package("tensorboard")
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(speech), "--out", str(tmp_path / "run")]
    assert cli.main([*command, *SETTINGS, "--device", "cpu", "--set", "stages=['vanilla']", "--tensorboard"]) == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_only_some_stages(speech, tmp_path):
    command = ["train", "--recipe", "kws-res8-narrow-w8-p90", "--data", str(speech), "--out", str(tmp_path), *SETTINGS]
    assert cli.main([*command, "--set", "stages=['vanilla']", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert set(record["results"]) == {"vanilla"}
    assert "layers" not in record


def test_recipes_and_doctor(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in ("kws-res8-narrow-w4-p90", "kws-res8-w8-p50", "cifar100-resnet32-w4-p90", "demo"):
        assert name in printed
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    assert "fake_quant" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "kws-res8-narrow-w4-p9"], "did you mean 'kws-res8-narrow-w4-p90'"),
        (["train", "--recipe", "nowhere.toml"], "no recipe file"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90"], "--data DIR"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", "/does/not/exist"], "no such folder"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "pqk.bitz=8"], "did you mean 'pqk.bits'"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "pqk.bits=9"], "bits must be an integer in 2..8"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "pqk.sparsity=1.0"], "must lie in [0, 1)"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "bits"], "expected KEY=VALUE"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "pqk.sparsity=0"], "need pruned weights"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "phase1.steps=20"], "leaves no time to prune"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "pqk.layer_sparsity={1: .5}"], "got 1"),
        (["train", "--recipe", "kws-res8-narrow-w4-p90", "--set", "model=res9"], "did you mean res8"),
        (["train", "--data", "x"], "say what to train with --recipe NAME"),
        (["train", "--resume", "--out", "/does/not/exist", "--data", "x"], "no checkpoint in /does/not/exist"),
        (["eval", "/does/not/exist", "--data", "x"], "no checkpoint at"),
        (["eval", __file__, "--data", "x"], "torn or not a checkpoint"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_a_corrupt_clip_and_missing_words_are_named(speech, tmp_path, capsys):
    root = tmp_path / "broken"
    shutil.copytree(speech, root)
    clip = root / "yes" / "a0_nohash_0.wav"
    clip.write_bytes(clip.read_bytes()[:1000])
    command = ["train", "--recipe", "kws-res8-narrow-w4-p90", "--data", str(root), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert "a0_nohash_0.wav" in capsys.readouterr().err.replace("\n", "")
    shutil.rmtree(root / "stop")
    assert cli.main(command) == 1
    assert "missing: stop" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there_are_refused(capsys):
    for device in ("cuda:99", "warp", "meta"):
        with pytest.raises(SystemExit):
            cli.main(["demo", "--device", device])
        assert device in capsys.readouterr().err


def test_help_reads_well(capsys):
    for command in ([], ["train"], ["eval"], ["demo"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert "usage: pqk-fast" in capsys.readouterr().out


def test_the_demo_recipe_end_to_end_in_miniature(run, tmp_path, monkeypatch, speech, capsys):
    """`pqk-fast demo` with the synthesizer replaced by the tiny data set; the synthesizer has tests of its own."""
    from pqk_fast.data.speech_commands import load_speech_commands

    monkeypatch.setattr(training, "make_words", lambda recipe, progress: load_speech_commands(speech))
    command = ["demo", "--out", str(tmp_path / "demo"), "--device", "cpu", *SETTINGS]
    assert cli.main(command) == 0
    assert cli.main(command) == 0, "the demo can be run again"
    assert json.loads((tmp_path / "demo" / "record.json").read_text())["recipe"]["name"] == "demo"
    record = (run / "record.json").read_bytes()
    assert cli.main(["demo", "--out", str(run), "--device", "cpu", *SETTINGS]) == 1, "another run is not overwritten"
    assert (run / "record.json").read_bytes() == record
    printed = capsys.readouterr().out
    assert "phase2-P" in printed
    assert "whole demo" in printed
