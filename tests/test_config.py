"""Settings: every one that cannot be is refused, with what was expected; what may be makes a round trip."""

import json
import math
import re

import pytest
from small_run import recipe

from pqk_fast.config import (
    DataConfig,
    DistillConfig,
    FinetuneConfig,
    Phase2Config,
    PhaseConfig,
    PQKConfig,
    recipe_from_dict,
)
from pqk_fast.patterns import matches
from pqk_fast.settings import ConfigError, check_bits, check_sparsity, nearest, to_dict

NAN, INF = math.nan, math.inf


def refused(message: str):
    """ConfigError with ``message`` in it, word for word."""
    return pytest.raises(ConfigError, match=re.escape(message))


# --- single settings


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        *[
            (PQKConfig, {"bits": bits}, f"bits must be an integer in 2..8, got {bits!r}; or 32, to prune")
            for bits in (1, 9, 16, True, 4.0)
        ],
        *[
            (PQKConfig, {name: value}, f"{name} must lie in [0, 1): the fraction of weights pruned; got {value}")
            for name in ("sparsity", "initial_sparsity")
            for value in (1.0, -0.1)
        ],
        (PQKConfig, {"sparsity": NAN}, "sparsity must be finite, got nan"),
        (PQKConfig, {"sparsity": "0.9"}, "sparsity must be float, got '0.9' (str)"),
        (PQKConfig, {"layer_sparsity": {"conv0": 1.0}}, "layer_sparsity['conv0'] must lie in [0, 1)"),
        (PQKConfig, {"layer_sparsity": {"conv0": NAN}}, "layer_sparsity['conv0'] must lie in [0, 1)"),
        (PQKConfig, {"layer_sparsity": {"conv0": "x"}}, "layer_sparsity['conv0'] must lie in [0, 1)"),
        (PQKConfig, {"layer_bits": {"conv0": 32}}, "bits must be an integer in 2..8, got 32 (layer_bits['conv0'])"),
        (DataConfig, {"name": "cifar100", "time_mask": 5}, "data.time_mask is for speech, got 5 for cifar100"),
        (PhaseConfig, {"steps": 30, "lr_warmup": 31}, "lr_warmup must be a number of the 30 steps, got 31"),
        (PQKConfig, {"layer_bits": {"re:(": 4}}, "'re:(' is not a regular expression: "),
        (PQKConfig, {"layer_sparsity": [0.5]}, "layer_sparsity must be a table, got [0.5]"),
        (PQKConfig, {"layer_sparsity": {"re:(": 0.5}}, "'re:(' is not a regular expression: "),
        (PQKConfig, {"exclude": ("re:[",)}, "'re:[' is not a regular expression: "),
        (PQKConfig, {"exclude": "conv0"}, "exclude must be a list, got 'conv0'"),
        (PQKConfig, {"scope": "group", "sparsity": 0.9}, "in groups of 4 sparsity is 1/4 or a multiple of it, got 0.9"),
        (PQKConfig, {"scope": "group", "sparsity": 0.5, "layer_sparsity": {"a": 0.3}}, "multiple of it, got 0.3"),
        (PQKConfig, {"group_size": 1}, r"group_size must lie in 2..16, got 1"),
        (PQKConfig, {"group_size": 17}, r"group_size must lie in 2..16, got 17"),
        (PQKConfig, {"scope": "block"}, "scope must be one of global, layer, group; got 'block'"),
        (PQKConfig, {"step_init": "std"}, "step_init must be one of mean, lsq, max, mse; got 'std'"),
        (PQKConfig, {"ste": "lsq"}, "ste must be one of identity, clipped; got 'lsq'"),
        (PQKConfig, {"teacher_weights": "full"}, "teacher_weights must be one of latent, shared; got 'full'"),
        (PQKConfig, {"teacher_bn": "old"}, "teacher_bn must be one of fresh, copy; got 'old'"),
        (PQKConfig, {"mask_interval": 0}, "mask_interval must be at least 1 step, got 0"),
        (PQKConfig, {"mask_interval": 2.5}, "mask_interval must be int, got 2.5 (float)"),
        (PQKConfig, {"mask_end": 0.0}, "mask_end must lie in (0, 1], a part of phase 1; got 0.0"),
        (PQKConfig, {"mask_end": 1.1}, "mask_end must lie in (0, 1], a part of phase 1; got 1.1"),
        (PQKConfig, {"mask_end": NAN}, "mask_end must be finite, got nan"),
        (PQKConfig, {"per_channel": "no"}, "per_channel must be bool, got 'no' (str)"),
        (
            DataConfig,
            {"name": "mnist"},
            "data.name must be one of speech_commands, spoken_words, cifar100; got 'mnist'",
        ),
        (DataConfig, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (DataConfig, {"classes": 1}, "classes must be at least 2, got 1"),
        (DataConfig, {"unknown": -0.1}, "data.unknown must not be negative, got -0.1"),
        (DataConfig, {"silence": NAN}, "silence must be finite, got nan"),
        (DataConfig, {"validation": 1.0}, "data.validation must lie in [0, 1), got 1.0"),
        *[
            case
            for phase in (PhaseConfig, Phase2Config)
            for case in [
                (phase, {"steps": 0}, "steps must be at least 1, got 0"),
                (phase, {"steps": 2.5}, "steps must be int, got 2.5 (float)"),
                (phase, {"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
                (phase, {"lr": 0.0}, "lr must be positive, got 0.0"),
                (phase, {"lr": NAN}, "lr must be finite, got nan"),
                (phase, {"lr": INF}, "lr must be finite, got inf"),
                (phase, {"lr_schedule": "step"}, "lr_schedule must be one of drops, cosine, constant; got 'step'"),
                (phase, {"lr_drops": (2000, 1000)}, "lr_drops must be rising step numbers, got (2000, 1000)"),
                (phase, {"lr_gamma": 0.0}, "lr_gamma must be positive, got 0.0"),
                (phase, {"lr_gamma": NAN}, "lr_gamma must be finite, got nan"),
                (phase, {"momentum": 1.0}, "momentum must lie in [0, 1), got 1.0"),
                (phase, {"momentum": NAN}, "momentum must be finite, got nan"),
                (phase, {"weight_decay": -1e-5}, "weight_decay must not be negative, got -1e-05"),
                (phase, {"step_lr_scale": -1.0}, "step_lr_scale must not be negative, got -1.0"),
                (phase, {"step_lr_rule": "none"}, "step_lr_rule must be one of flat, lsq; got 'none'"),
            ]
        ],
        (Phase2Config, {"distill_start": -1}, "distill_start must be a step of phase 2, 0..3122, got -1"),
        (Phase2Config, {"distill_start": 3123}, "distill_start must be a step of phase 2, 0..3122, got 3123"),
        (
            PQKConfig,
            {"sparsity": 0.5, "initial_sparsity": 0.6},
            "initial_sparsity must not be above sparsity 0.5, got 0.6",
        ),
        (PQKConfig, {"layer_sparsity": {1: 0.5}}, "patterns are module names or 're:...', got 1"),
        (PhaseConfig, {"lr_drops": (-5, 3)}, "lr_drops must be rising step numbers, got (-5, 3)"),
        (Phase2Config, {"alpha": -0.5}, "alpha and beta must be >= 0, got -0.5, 0.5"),
        (Phase2Config, {"beta": NAN}, "beta must be finite, got nan"),
        (Phase2Config, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (Phase2Config, {"temperature": INF}, "temperature must be finite, got inf"),
        (Phase2Config, {"forward": "both"}, "forward must be one of auto, two_pass, stacked; got 'both'"),
        (PQKConfig, {"bits": 32.0}, "bits must be int, got 32.0 (float)"),
        (DistillConfig, {"co_study": -1}, "distill.co_study must be a number of steps, 0 or more, got -1"),
        (DistillConfig, {"co_study": True}, "co_study must be int, got True (bool)"),
        (FinetuneConfig, {"lr": 0.0}, "finetune.lr must be positive, got 0.0"),
        (FinetuneConfig, {"lr": NAN}, "lr must be finite, got nan"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:60],
)
def test_a_setting_that_cannot_be(config: type, settings: dict, message: str) -> None:
    with refused(message):
        config(**settings)


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'bits'"):
        PQKConfig().bits = 8


def test_checks_return_what_they_let_pass() -> None:
    assert [check_bits(bits) for bits in range(2, 9)] == [2, 3, 4, 5, 6, 7, 8]
    assert [check_sparsity(p) for p in (0, 0.0, 0.999)] == [0, 0.0, 0.999]
    with refused("sparsity must lie in [0, 1): the fraction of weights pruned; got nan"):
        check_sparsity(NAN)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("conv1", "conv1", True),
        ("conv10", "conv1", False),
        ("block.conv1", "block", True),
        ("block.conv1", "conv1", False),
        ("block", "block.conv1", False),
        ("block.conv1", "re:.*conv\\d", True),
        ("block.conv10", "re:.*conv\\d", False),  # all of it
    ],
)
def test_matching_module_names(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_nearest() -> None:
    assert nearest("bitz", ["sparsity", "bits"]) == "; did you mean 'bits'?"
    assert nearest("bitz", ["sparsity", "bits"], "pqk.") == "; did you mean 'pqk.bits'?"
    assert nearest("xyz", ["sparsity", "bits"]) == "; known: bits, sparsity"


# --- whole recipes


DISTILLING = {
    "stages": ("vanilla", "phase1", "distill"),
    "pqk": PQKConfig(sparsity=0.5, mask_interval=4),
    "phase1": PhaseConfig(steps=12, lr_drops=()),
    "phase2": Phase2Config(steps=12, lr_drops=(), distill_start=6),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": ("phase1", "distill")},
            "stages: distill needs the vanilla network: add 'vanilla' to ['phase1', 'distill']",
        ),
        (
            {"stages": ("phase1",), "phase1_start": "vanilla"},
            "stages: phase1_start needs the vanilla network: add 'vanilla' to ['phase1']",
        ),
        ({"stages": ("vanilla", "distill")}, "stages: distill need phase1's network: add 'phase1' to ['vanilla', "),
        ({"pqk": PQKConfig(sparsity=0.0, mask_interval=4)}, "stages: distill need pruned weights, but pqk.sparsity is"),
        (
            {"distill": DistillConfig(12)},
            "distill.co_study must leave steps for the frozen teacher, at most 11, got 12",
        ),
        ({"phase1_start": "zero"}, "phase1_start must be one of scratch, vanilla; got 'zero'"),
        ({"stages": ("distil",)}, "stages must be one of vanilla, phase1, phase2, finetune, distill; got 'distil'"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be(changes: dict, message: str) -> None:
    recipe(**DISTILLING, distill=DistillConfig(11))
    with refused(message):
        recipe(**(DISTILLING | changes))


def test_co_study_is_of_no_consequence_without_the_stage() -> None:
    recipe(**{**DISTILLING, "stages": ("phase1",)}, distill=DistillConfig(12))


@pytest.mark.parametrize("vanilla", [None, PhaseConfig(steps=7, lr_drops=(2, 5), step_lr_rule="lsq")], ids=str)
def test_a_recipe_makes_a_round_trip(vanilla: PhaseConfig | None) -> None:
    whole = recipe(**DISTILLING, distill=DistillConfig(3), vanilla=vanilla, phase1_start="vanilla")
    assert recipe_from_dict(json.loads(json.dumps(to_dict(whole)))) == whole


def test_a_dictionary_without_name_and_model_is_refused() -> None:
    with refused("a recipe must set name and model"):
        recipe_from_dict({})
    with refused("a recipe must set model"):
        recipe_from_dict({"name": "mine"})
