"""Recipe files: the shipped ones hold the paper's numbers and the baselines'; overrides, inheritance, and refusals."""

import json
import re
from pathlib import Path

import pytest

from pqk_fast.config import DistillConfig, PhaseConfig, Recipe, recipe_from_dict
from pqk_fast.recipe_files import RECIPES, load_recipe, recipe_names
from pqk_fast.schedule import last_mask_step, sparsity_of_mask
from pqk_fast.settings import ConfigError, to_dict


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
# What a user might have picked instead: how each recipe differs from the paper's smallest one, and nothing else.
BASE = "kws-res8-narrow-w4-p90"
LONG = {"stages": ("phase1",), "phase1.steps": 12145, "phase1.lr_drops": (4038, 8077)}
BASELINES = {
    "baseline-dpf": {**LONG, "pqk.mask_interval": 16, "pqk.mask_end": 0.5},
    "baseline-gradual": {"stages": ("phase1", "finetune"), "pqk.mask_gradients": True},
    "baseline-kd": {"stages": ("vanilla", "phase1", "distill")},
    "baseline-lsq": {
        **LONG,
        "pqk.sparsity": 0.0,
        "pqk.step_init": "lsq",
        "pqk.ste": "clipped",
        "phase1.step_lr_scale": 1.0,
        "phase1.step_lr_rule": "lsq",
    },
    "baseline-one-shot": {
        "stages": ("vanilla", "phase1"),
        "phase1_start": "vanilla",
        "vanilla": "phase1",
        "pqk.initial_sparsity": 0.9,
        "pqk.mask_end": 1e-6,
        "pqk.mask_gradients": True,
        "phase1.steps": 3123,
        "phase1.lr_drops": (1000, 2000),
    },
    "baseline-pruning": {"stages": ("phase1", "finetune"), "pqk.bits": 32},
    "baseline-qkd": {"stages": ("vanilla", "phase1", "distill"), "distill.co_study": 1561},
}


def test_there_is_a_recipe_for_each_cell_of_the_tables() -> None:
    assert set(recipe_names()) == {*PAPER_RECIPES, *BASELINES, *PLUS, "demo"}
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*recipe_names(), "_kws", "_cifar100"}


PLUS = ("kws-res8-narrow-plus-w4-p90", "kws-res8-plus-w4-p90", "cifar100-resnet32-plus-w4-p90")


@pytest.mark.parametrize("name", PLUS)
def test_plus_takes_the_papers_passes_and_grid(name: str) -> None:
    plus, paper = load_recipe(name), load_recipe(name.replace("-plus", ""))
    assert (plus.pqk.bits, plus.pqk.sparsity, plus.data) == (paper.pqk.bits, paper.pqk.sparsity, paper.data)
    assert plus.phase1.steps + plus.phase2.steps == paper.phase1.steps + paper.phase2.steps
    assert plus.data.batch_size == paper.data.batch_size


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_what_the_papers_recipes_share(name: str) -> None:
    recipe = load_recipe(name)
    data_set, model, bits, percent = re.fullmatch(r"([a-z0-9]+)-(.*)-w(\d)-p(\d\d)", name).groups()
    assert recipe.name == name
    assert recipe.data.name == {"kws": "speech_commands", "cifar100": "cifar100"}[data_set]
    assert recipe.model == model.replace("-", "_")
    assert (recipe.pqk.bits, recipe.pqk.sparsity) == (int(bits), int(percent) / 100)
    assert recipe.stages == ("vanilla", "phase1", "phase2", "finetune")
    assert (recipe.phase1_start, recipe.vanilla) == ("scratch", None)
    assert (recipe.pqk.mask_interval, recipe.pqk.initial_sparsity, recipe.pqk.mask_end) == (32, 0.0, 1.0)
    assert (recipe.pqk.scope, recipe.pqk.ste, recipe.pqk.mask_gradients) == ("global", "identity", False)
    assert (recipe.pqk.teacher_weights, recipe.pqk.teacher_bn) == ("latent", "fresh")
    assert (recipe.phase2.temperature, recipe.phase2.alpha, recipe.phase2.beta) == (2.0, 0.5, 0.5)
    for phase in (recipe.phase1, recipe.phase2):
        assert (phase.momentum, phase.step_lr_scale, phase.lr_schedule, phase.lr_gamma) == (0.9, 1e-4, "drops", 0.1)
        assert phase.step_lr_rule == "flat"
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


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_the_papers_recipe_but_for_what_makes_it_another_method(name: str) -> None:
    expected = to_dict(load_recipe(BASE))
    for path, value in BASELINES[name].items():
        *parents, last = path.split(".")
        tree = expected
        for part in parents:
            tree = tree[part]
        tree[last] = to_dict(load_recipe(BASE).phase1) if path == "vanilla" else value
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.startswith("Baseline: ")
    assert to_dict(recipe) == {**expected, "name": name, "description": recipe.description}


@pytest.mark.parametrize("name", [BASE, *BASELINES])
def test_all_students_get_as_many_steps(name: str) -> None:
    """A teacher's own training, and a vanilla network that nothing starts from, do not count."""
    recipe = load_recipe(name)
    first = [recipe.vanilla] if recipe.phase1_start == "vanilla" else []
    second = [recipe.phase2] if {"phase2", "finetune", "distill"} & {*recipe.stages} else []
    assert sum(phase.steps for phase in (*first, recipe.phase1, *second)) == 12145 == 9022 + 3123


def test_what_the_baselines_settings_come_to() -> None:
    one_shot, long, qkd = (load_recipe(f"baseline-{name}") for name in ("one-shot", "dpf", "qkd"))
    start = one_shot.pqk
    assert last_mask_step(one_shot.phase1.steps, start.mask_interval, start.mask_end) == 0, "the first mask is the last"
    schedule = {"steps": 3123, "epoch_steps": 347, "interval": start.mask_interval, "mask_end": start.mask_end}
    assert sparsity_of_mask(0, **schedule, target=0.9, initial=start.initial_sparsity) == 0.9
    assert last_mask_step(long.phase1.steps, long.pqk.mask_interval, long.pqk.mask_end) == 6064, "half of the way"
    share = [drop / 9022 for drop in load_recipe(BASE).phase1.lr_drops]
    assert [drop / 12145 for drop in long.phase1.lr_drops] == pytest.approx(share, abs=1e-4)
    assert abs((qkd.phase2.steps - qkd.distill.co_study) - qkd.distill.co_study) <= 1


@pytest.mark.parametrize("name", [*PAPER_RECIPES, *BASELINES, "demo"])
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
        ("phase1_start=vanilla", "phase1_start", "vanilla"),
        ("vanilla={'steps': 3}", "vanilla", PhaseConfig(steps=3)),
        ("distill.co_study=7", "distill.co_study", 7),
        ("phase1.step_lr_rule=lsq", "phase1.step_lr_rule", "lsq"),
        ("pqk.bits=32", "pqk.bits", 32),
        ("pqk.layer_sparsity={'conv0': 0.5}", "pqk.layer_sparsity", {"conv0": 0.5}),
        ("pqk.layer_sparsity.conv0=0.25", "pqk.layer_sparsity", {"conv0": 0.25}),
        ("pqk.layer_bits.layer1.0.conv1=3", "pqk.layer_bits", {"layer1.0.conv1": 3}),
        ("pqk.layer_bits.re:.*head=3", "pqk.layer_bits", {"re:.*head": 3}),
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
            "unknown key 'data.zzz'; known: data.batch_size, data.classes, data.name, data.silence, data.time_mask, "
            "data.unknown, data.validation",
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
        ("stages=[]", "stages must name at least one of vanilla, phase1, phase2, finetune, distill"),
        ("stages=['phase3']", "stages must be one of vanilla, phase1, phase2, finetune, distill; got 'phase3'"),
        ("stages=['vanilla', 'phase2']", "phase2 need phase1's network: add 'phase1' to ['vanilla', 'phase2']"),
        ("stages=['phase1', 'distill']", "distill needs the vanilla network: add 'vanilla' to ['phase1', 'distill']"),
        ("distill.co_studi=1", "unknown key 'distill.co_studi'; did you mean 'distill.co_study'?"),
        ("phase1.step_lr_rule=LSQ", "step_lr_rule must be one of flat, lsq; got 'LSQ'"),
    ],
)
def test_bad_override(pair: str, message: str) -> None:
    with refused(message):
        load_recipe("demo", [pair])


# --- files and inheritance


def test_unknown_recipes_are_refused_with_the_nearest() -> None:
    with refused("no recipe named 'kws-res8-w4-p95'; did you mean 'kws-res8-w4-p90'?"):
        load_recipe("kws-res8-w4-p95")
    with refused("no recipe named 'xyz'; known: baseline-dpf, "):
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


TOML = """
extends = "kws-res8-narrow-w4-p90"
name = "mine"
stages = ["vanilla", "phase1", "distill"]
phase1_start = "vanilla"

[distill]
co_study = 7
"""


def test_recipe_files_have_the_new_tables(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", TOML)
    mine = load_recipe(path)
    assert (mine.vanilla, mine.phase1_start, mine.distill) == (None, "vanilla", DistillConfig(7))
    write(tmp_path, "mine", TOML + '\n[vanilla]\nsteps = 5\nlr = 1\nstep_lr_rule = "lsq"\n')
    mine = load_recipe(path)
    assert mine.vanilla == PhaseConfig(steps=5, lr=1.0, step_lr_rule="lsq"), "defaults, not phase 1's settings"
    assert load_recipe(path, ["vanilla.steps=6"]).vanilla.steps == 6
    assert load_recipe(path, ["vanilla=None"]).vanilla is None
    with refused("unknown key 'vanilla.step'; did you mean 'vanilla.steps'"):
        load_recipe(path, ["vanilla.step=6"])
    with refused("vanilla must be a table ([vanilla]), got 3"):
        load_recipe(path, ["vanilla=3"])
