"""Settings and recipes: the shipped ones hold the paper's numbers, overrides and inheritance, and every refusal."""

import json
import math
import re
from pathlib import Path

import pytest

from pqk_fast.config import (
    STAGES,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    Phase2Config,
    PhaseConfig,
    PQKConfig,
    Recipe,
    check_bits,
    check_sparsity,
    matches,
    nearest,
    recipe_from_dict,
    to_dict,
)
from pqk_fast.recipe_files import RECIPES, load_recipe, recipe_names

NAN, INF = math.nan, math.inf


def refused(message: str):
    """ConfigError with ``message`` in it, word for word."""
    return pytest.raises(ConfigError, match=re.escape(message))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- the recipes that come with the library

PAPER_RECIPES = [
    *[f"kws-res8-w{bits}-p{percent}" for bits in (4, 8) for percent in (50, 70, 90)],
    *[f"{model}-w{bits}-p90" for model in ("kws-res8-narrow", "cifar100-resnet32") for bits in (4, 8)],
]


def test_there_is_a_recipe_for_each_cell_of_the_tables() -> None:
    assert set(recipe_names()) == {*PAPER_RECIPES, "demo"}
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*recipe_names(), "_kws", "_cifar100"}


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_what_the_papers_recipes_share(name: str) -> None:
    recipe = load_recipe(name)
    data_set, model, bits, percent = re.fullmatch(r"([a-z0-9]+)-(.*)-w(\d)-p(\d\d)", name).groups()
    assert recipe.name == name
    assert recipe.data.name == {"kws": "speech_commands", "cifar100": "cifar100"}[data_set]
    assert recipe.model == model.replace("-", "_")
    assert (recipe.pqk.bits, recipe.pqk.sparsity) == (int(bits), int(percent) / 100)
    assert recipe.stages == STAGES
    assert (recipe.pqk.mask_interval, recipe.pqk.initial_sparsity, recipe.pqk.mask_end) == (32, 0.0, 1.0)
    assert (recipe.pqk.scope, recipe.pqk.ste, recipe.pqk.mask_gradients) == ("global", "identity", False)
    assert (recipe.pqk.teacher_weights, recipe.pqk.teacher_bn) == ("latent", "fresh")
    assert (recipe.phase2.temperature, recipe.phase2.alpha, recipe.phase2.beta) == (2.0, 0.5, 0.5)
    for phase in (recipe.phase1, recipe.phase2):
        assert (phase.momentum, phase.step_lr_scale, phase.lr_schedule, phase.lr_gamma) == (0.9, 1e-4, "drops", 0.1)
    assert recipe.finetune.lr in (0.1, 0.01, 0.001)


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if name.startswith("kws")])
def test_keyword_spotting_as_in_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    one, two = recipe.phase1, recipe.phase2
    assert (recipe.data.batch_size, recipe.data.classes) == (64, 12)
    assert (recipe.data.unknown, recipe.data.silence) == (0.1, 0.1)
    assert (one.steps, one.epoch_steps, two.steps, two.epoch_steps) == (9022, 347, 3123, 347)
    assert (one.steps / one.epoch_steps, two.steps / two.epoch_steps) == (26, 9)
    assert (one.lr, one.lr_drops, one.weight_decay) == (0.1, (3000, 6000), 1e-5)
    assert (two.lr, two.lr_drops, two.weight_decay) == (0.1, (1000, 2000), 1e-5)
    assert two.distill_start == 1500


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if name.startswith("cifar100")])
def test_cifar_as_in_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    one, two = recipe.phase1, recipe.phase2
    assert (recipe.data.batch_size, recipe.data.classes, recipe.data.validation) == (128, 100, 0.0)
    epoch = 50_000 // 128
    assert (one.epoch_steps, two.epoch_steps) == (epoch, epoch)
    assert (one.steps, two.steps) == (164 * epoch, 60 * epoch)
    assert (one.lr, one.lr_drops, one.weight_decay) == (0.1, (82 * epoch, 123 * epoch), 1e-4)
    assert (two.lr, two.lr_drops, two.weight_decay) == (0.2, (20 * epoch, 40 * epoch), 1e-4)
    assert two.distill_start == 30 * epoch


def test_the_demo_is_keyword_spotting_made_short() -> None:
    demo, paper = load_recipe("demo"), load_recipe("kws-res8-narrow-w4-p90")
    assert demo.data.name == "spoken_words"
    assert (demo.model, demo.pqk.bits, demo.pqk.sparsity) == (paper.model, paper.pqk.bits, paper.pqk.sparsity)
    assert demo.phase1.steps < paper.phase1.steps
    assert demo.phase2.distill_start < demo.phase2.steps < paper.phase2.steps


def test_defaults_are_the_papers_keyword_spotting() -> None:
    assert Recipe(name="kws-res8-w4-p90", model="res8", description=load_recipe("kws-res8-w4-p90").description) == (
        load_recipe("kws-res8-w4-p90")
    )


@pytest.mark.parametrize("name", [*PAPER_RECIPES, "demo"])
def test_round_trip_through_json(name: str) -> None:
    recipe = load_recipe(name, ["pqk.layer_sparsity={'re:conv.*': 0.5}", "pqk.exclude=['output']", "seed=3"])
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


# --- overrides


@pytest.mark.parametrize(
    ("pair", "path", "expected"),
    [
        ("pqk.bits=8", "pqk.bits", 8),
        ("seed = 7", "seed", 7),
        ("pqk.sparsity=0.5", "pqk.sparsity", 0.5),
        ("phase1.lr=1", "phase1.lr", 1.0),  # a whole number where a float belongs
        ("phase1.weight_decay=1e-3", "phase1.weight_decay", 1e-3),
        ("pqk.per_channel=true", "pqk.per_channel", True),
        ("pqk.per_channel=True", "pqk.per_channel", True),
        ("pqk.mask_gradients=false", "pqk.mask_gradients", False),
        ("pqk.ste=clipped", "pqk.ste", "clipped"),
        ("pqk.ste='clipped'", "pqk.ste", "clipped"),
        ("description=a = b", "description", "a = b"),
        ("description=", "description", ""),
        ("phase1.lr_drops=[10, 20]", "phase1.lr_drops", (10, 20)),
        ("phase2.lr_drops=[]", "phase2.lr_drops", ()),
        ("pqk.exclude=['conv0', 're:.*bn']", "pqk.exclude", ("conv0", "re:.*bn")),
        ("stages=['vanilla']", "stages", ("vanilla",)),
        ("pqk.layer_sparsity={'conv0': 0.5}", "pqk.layer_sparsity", {"conv0": 0.5}),
        ("pqk.layer_sparsity.conv0=0.25", "pqk.layer_sparsity", {"conv0": 0.25}),
    ],
)
def test_override(pair: str, path: str, expected: object) -> None:
    value = recipe = load_recipe("demo", [pair])
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)
    # nothing else moved
    changed, original = to_dict(recipe), to_dict(load_recipe("demo"))
    for tree in (changed, original):
        *parents, last = path.split(".")
        for part in parents:
            tree = tree[part]
        del tree[last]
    assert changed == original


def test_the_last_of_several_overrides_holds() -> None:
    recipe = load_recipe("demo", ["pqk.bits=8", "pqk.sparsity=0.5", "pqk.bits=2"])
    assert (recipe.pqk.bits, recipe.pqk.sparsity) == (2, 0.5)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("pqk.bitz=8", "unknown key 'pqk.bitz'; did you mean 'pqk.bits'?"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'?"),
        ("phase2.distil_start=1", "unknown key 'phase2.distil_start'; did you mean 'phase2.distill_start'?"),
        (
            "data.zzz=1",
            "unknown key 'data.zzz'; known: data.batch_size, data.classes, data.name, data.silence, data.unknown, "
            "data.validation",
        ),
        ("pqk.bits=9", "bits must be an integer in 2..8, got 9"),
        ("pqk.bits=4.0", "pqk.bits must be int, got 4.0 (float)"),
        ("pqk.bits=true", "pqk.bits must be int, got True (bool)"),
        ("pqk.bits=four", "pqk.bits must be int, got 'four' (str)"),
        ("pqk.bits={[]: 1}", "pqk.bits must be int, got '{[]: 1}' (str)"),
        ("phase1.lr=true", "phase1.lr must be float, got True (bool)"),
        ("phase1.lr=nan", "phase1.lr must be float, got 'nan' (str)"),
        ("phase1.lr=1e999", "phase1.lr must be finite, got inf"),
        ("pqk.per_channel=1", "pqk.per_channel must be bool, got 1 (int)"),
        ("pqk.ste=4", "pqk.ste must be str, got 4 (int)"),
        ("pqk.exclude=conv0", "pqk.exclude must be a list, got 'conv0'"),
        ("pqk.exclude=[1]", "pqk.exclude must be str, got 1 (int)"),
        ("phase1.lr_drops=[1.5]", "phase1.lr_drops must be int, got 1.5 (float)"),
        ("pqk.layer_sparsity=0.5", "pqk.layer_sparsity must be a table, got 0.5"),
        ("pqk=4", "pqk must be a table ([pqk]), got 4"),
        ("seed.x=1", "seed must be int, got {'x': 1} (dict)"),
        ("pqk.bits", "expected KEY=VALUE such as pqk.bits=8, got 'pqk.bits'"),
        ("=8", "expected KEY=VALUE such as pqk.bits=8, got '=8'"),
        ("stages=[]", "stages must name at least one of vanilla, phase1, phase2, finetune"),
        ("stages=['phase3']", "stages must be one of vanilla, phase1, phase2, finetune; got 'phase3'"),
        ("stages=['vanilla', 'phase2']", "phase2 need phase1's network: add 'phase1' to ['vanilla', 'phase2']"),
    ],
)
def test_bad_override(pair: str, message: str) -> None:
    with refused(message):
        load_recipe("demo", [pair])


# --- files and inheritance


def test_unknown_recipes_are_refused_with_the_nearest() -> None:
    with refused("no recipe named 'kws-res8-w4-p95'; did you mean 'kws-res8-w4-p90'?"):
        load_recipe("kws-res8-w4-p95")
    with refused("no recipe named 'xyz'; known: cifar100-resnet32-w4-p90, "):
        load_recipe("xyz")
    with refused("no recipe named '_kws'"):
        load_recipe("_kws")
    with refused("no recipe file nowhere/mine.toml; `pqk-fast recipes` lists the named ones"):
        load_recipe("nowhere/mine.toml")


def test_a_file_lies_over_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path, "base", 'extends = "kws-res8-w4-p90"\nmodel = "res8_narrow"\n[pqk]\nbits = 2\nste = "clipped"\n')
    path = write(tmp_path, "mine", 'extends = "base"\nname = "mine"\n[pqk]\nbits = 3\n[phase1]\nlr_drops = [5]\n')
    for source in (path, str(path)):
        recipe = load_recipe(source, ["pqk.sparsity=0.25"])
        assert (recipe.name, recipe.model) == ("mine", "res8_narrow")
        assert (recipe.pqk.bits, recipe.pqk.ste, recipe.pqk.sparsity) == (3, "clipped", 0.25)
        assert recipe.phase1.lr_drops == (5,)  # a list is replaced, not joined
        assert recipe.phase2.distill_start == 1500


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'extends = "b"', "b": 'extends = "c"', "c": 'extends = "b"'}, "goes round in a circle: b -> c -> b"),
        ({"a": 'extends = "a"'}, "a.toml: 'extends' goes round in a circle: a -> a"),
        ({"a": 'extends = "gone"'}, "a.toml extends 'gone', but there is no gone.toml beside it or in the library"),
        ({"a": "bits ="}, "a.toml is not valid TOML: "),
        ({"a": 'model = "res8"'}, "a.toml must set name"),
        ({"a": ""}, "a.toml must set name and model"),
        ({"a": 'name = "a"\nmodel = "res8"\n[pqk]\nbits = "4"'}, "pqk.bits must be int, got '4' (str)"),
        ({"a": 'name = "a"\nmodel = "res8"\n[phase1]\nlr = nan'}, "phase1.lr must be finite, got nan"),
        ({"a": 'name = "a"\nmodel = "res8"\n[pqc]\nbits = 4'}, "unknown key 'pqc'; did you mean 'pqk'?"),
        ({"a": 'name = "a"\nmodel = "res8"\npqk = 4'}, "pqk must be a table ([pqk]), got 4"),
    ],
)
def test_bad_recipe_file(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(tmp_path, name, text)
    with refused(message):
        load_recipe(tmp_path / "a.toml")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('description = "für"'.encode("latin-1"))
    with refused("latin.toml is not valid TOML: 'utf-8' codec"):
        load_recipe(path)


def test_a_dictionary_without_name_and_model_is_refused() -> None:
    with refused("a recipe must set name and model"):
        recipe_from_dict({})
    with refused("a recipe must set model"):
        recipe_from_dict({"name": "mine"})


# --- single settings


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        *[(PQKConfig, {"bits": bits}, f"bits must be an integer in 2..8, got {bits!r}") for bits in (1, 9, True, 4.0)],
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
