"""Tasks and their keys: what recipes share, what they do not, and that keys stay what they are."""

import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

from pqk_fast import config
from pqk_fast.config import Phase2Config, PhaseConfig, PQKConfig, Recipe, recipe_from_dict
from pqk_fast.experiments import tasks
from pqk_fast.experiments.tasks import NEEDS, STAGE_SEEDS, tasks_of
from pqk_fast.recipe_files import load_recipe
from pqk_fast.settings import to_dict

CELL = "kws-res8-narrow-w4-p90"
STAGES = ("vanilla", "phase1", "finetune", "distill", "phase2")
ALL, NONE = set(STAGES), set()
STUDENTS = ALL - {"vanilla"}
CHILDREN = STUDENTS - {"phase1"}
TAUGHT = {"phase2", "distill"}

# For every setting: another value than the cell's, and the stages whose results depend on it.
CASES = {
    "name=other": NONE,
    "description=other": NONE,
    "model=res8": ALL,
    "seed=1": ALL,
    "stages=['distill', 'phase2', 'finetune', 'phase1', 'vanilla']": NONE,
    "phase1_start=vanilla": STUDENTS,
    "data.name=spoken_words": ALL,
    "data.batch_size=32": ALL,
    "data.classes=13": ALL,
    "data.unknown=1.0": ALL,
    "data.silence=0.2": ALL,
    "data.validation=0.2": ALL,
    "data.time_mask=20": ALL,
    "pqk.bits=8": STUDENTS,
    "pqk.sparsity=0.7": STUDENTS,
    "pqk.scope=layer": STUDENTS,
    "pqk.group_size=8": STUDENTS,
    "pqk.layer_sparsity={'output': 0.5}": STUDENTS,
    "pqk.layer_bits={'output': 8}": STUDENTS,
    "pqk.exclude=('conv0',)": STUDENTS,
    "pqk.mask_interval=16": STUDENTS,
    "pqk.mask_end=0.5": STUDENTS,
    "pqk.initial_sparsity=0.5": STUDENTS,
    "pqk.step_init=lsq": STUDENTS,
    "pqk.step_tracking=10": STUDENTS,
    "pqk.per_channel=True": STUDENTS,
    "pqk.ste=clipped": STUDENTS,
    "pqk.mask_gradients=True": STUDENTS,
    "pqk.teacher_weights=shared": STUDENTS,
    "pqk.teacher_bn=copy": STUDENTS,
    # without a [vanilla] table the plain network has phase 1's schedule, but no step sizes
    "phase1.steps=9000": ALL,
    "phase1.epoch_steps=300": ALL,
    "phase1.lr=0.2": ALL,
    "phase1.lr_schedule=cosine": ALL,
    "phase1.lr_drops=(3000,)": ALL,
    "phase1.lr_gamma=0.2": ALL,
    "phase1.lr_warmup=100": ALL,
    "phase1.label_smoothing=0.1": ALL,
    "phase1.average_steps=100": ALL,
    "phase1.momentum=0.8": ALL,
    "phase1.weight_decay=1e-4": ALL,
    "phase1.step_lr_scale=1e-3": STUDENTS,
    "phase1.step_lr_rule=lsq": STUDENTS,
    # "distill" has the plain network for a teacher
    "vanilla.steps=9000": {"vanilla", "distill"},
    "vanilla.epoch_steps=300": {"vanilla", "distill"},
    "vanilla.lr=0.2": {"vanilla", "distill"},
    "vanilla.lr_schedule=cosine": {"vanilla", "distill"},
    "vanilla.lr_drops=(3000,)": {"vanilla", "distill"},
    "vanilla.lr_gamma=0.2": {"vanilla", "distill"},
    "vanilla.lr_warmup=100": {"vanilla", "distill"},
    "vanilla.label_smoothing=0.1": {"vanilla", "distill"},
    "vanilla.average_steps=100": {"vanilla", "distill"},
    "vanilla.momentum=0.8": {"vanilla", "distill"},
    "vanilla.weight_decay=1e-4": {"vanilla", "distill"},
    "vanilla.step_lr_scale=1e-3": NONE,
    "vanilla.step_lr_rule=lsq": NONE,
    "phase2.steps=3000": CHILDREN,
    "phase2.epoch_steps=300": CHILDREN,
    "phase2.lr=0.2": TAUGHT,  # finetune has a rate of its own
    "phase2.lr_schedule=cosine": CHILDREN,
    "phase2.lr_drops=(1000,)": CHILDREN,
    "phase2.lr_gamma=0.2": CHILDREN,
    "phase2.lr_warmup=100": CHILDREN,
    "phase2.label_smoothing=0.1": CHILDREN,
    "phase2.momentum=0.8": CHILDREN,
    "phase2.weight_decay=1e-4": CHILDREN,
    "phase2.step_lr_scale=1e-3": CHILDREN,
    "phase2.step_lr_rule=lsq": CHILDREN,
    "phase2.average_steps=100": CHILDREN,
    "phase2.step_size=learned": CHILDREN,
    "phase2.distill_start=1000": {"phase2"},
    "phase2.alpha=0.7": TAUGHT,
    "phase2.beta=0.7": TAUGHT,
    "phase2.temperature=4.0": TAUGHT,
    "phase2.distillation=one_way": {"phase2"},
    "phase2.teacher_rest=500": {"phase2"},
    "phase2.teacher_average=100": {"phase2"},
    "phase2.forward=two_pass": {"phase2"},
    "finetune.lr=0.01": {"finetune"},
    "distill.co_study=10": {"distill"},
}


GIVEN = {"phase2.teacher_average=100": ("phase2.teacher_rest=500",)}  # what a case has no sense without


def recipe_with(*overrides: str, plain: bool = True) -> Recipe:
    """The cell with all stages; ``plain`` gives it a [vanilla] table, equal to phase 1's."""
    return load_recipe(CELL, [f"stages={STAGES}", *(["vanilla.steps=9022"] if plain else []), *overrides])


def keys(recipe: Recipe) -> dict[str, str]:
    return {stage: task.key for stage, task in tasks_of(recipe).items()}


def settings_of(kind: type, place: str = "") -> set[str]:
    """``pqk.bits`` and the like, of every setting that there is."""
    found = set()
    for entry in fields(kind):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        inner = PhaseConfig() if entry.name == "vanilla" else default
        nested = is_dataclass(inner) and not isinstance(inner, type)
        found |= settings_of(type(inner), f"{entry.name}.") if nested else {place + entry.name}
    return found


def test_the_table_has_every_setting() -> None:
    assert {case.partition("=")[0] for case in CASES} == settings_of(Recipe)


@pytest.mark.parametrize("case", CASES)
def test_a_key_depends_on_what_its_result_depends_on_and_nothing_else(case: str) -> None:
    own_schedule = not case.startswith("phase1.")
    given = GIVEN.get(case, ())
    before, after = (tasks_of(recipe_with(*given, *changes, plain=own_schedule)) for changes in ((), (case,)))
    assert {stage for stage in STAGES if before[stage].key != after[stage].key} == CASES[case]
    # a record is compared with the task whole
    assert {stage for stage in STAGES if before[stage] != after[stage]} == CASES[case]


def test_a_literal_key_of_a_shipped_recipe() -> None:
    """Whoever changes these makes users train again what they have."""
    assert keys(load_recipe(CELL)) == {
        "vanilla": "e8754d27c090db02",
        "phase1": "6930b618f9e39a1e",
        "finetune": "f32b4de8a6a3a53a",
        "phase2": "1b44ed801f2deb77",
    }
    assert keys(load_recipe("baseline-qkd"))["distill"] == "2927f3f50503aca3"
    assert keys(load_recipe("baseline-one-shot"))["phase1"] == "8eaa9e5affce7541"


def test_what_recipes_share() -> None:
    cell = keys(load_recipe(CELL))
    for rate in ("finetune.lr=0.01", "finetune.lr=0.001"):
        other = keys(load_recipe(CELL, [rate]))
        assert {stage for stage in cell if cell[stage] == other[stage]} == {"vanilla", "phase1", "phase2"}
    eight, wide = keys(load_recipe("kws-res8-narrow-w8-p90")), keys(load_recipe("kws-res8-w4-p90"))
    assert {stage for stage in cell if cell[stage] == eight[stage]} == {"vanilla"}
    assert not set(cell.values()) & set(wide.values())
    assert keys(load_recipe("kws-res8-w4-p50"))["vanilla"] == wide["vanilla"]
    one_shot = load_recipe("baseline-one-shot")
    assert (one_shot.vanilla, one_shot.phase1.steps) == (load_recipe(CELL).phase1, 3123)
    assert keys(one_shot)["vanilla"] == cell["vanilla"]
    assert keys(one_shot)["phase1"] != cell["phase1"]
    kd, qkd = keys(load_recipe("baseline-kd")), keys(load_recipe("baseline-qkd"))
    assert kd["phase1"] == qkd["phase1"] == cell["phase1"]
    assert kd["distill"] != qkd["distill"]


def test_no_two_different_tasks_have_one_name() -> None:
    every = [recipe_with(*GIVEN.get(case, ()), case, *seed) for case in CASES for seed in ([], ["seed=7"])]
    found = {task.key: task.folder for recipe in every for task in tasks_of(recipe).values()}
    assert len(found) > 200
    assert len(set(found.values())) == len(found)


def test_a_key_does_not_depend_on_how_the_recipe_was_written(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        f'extends = "{CELL}"\nname = "mine"\ndescription = "mine"\n[phase1]\nlr = 1\nlr_drops = [3000, 6000]\n'
        "[pqk]\nbits = 4\nste = 'identity'\n[vanilla]\nlr = 1.0\n"
    )
    mine = keys(load_recipe(tmp_path / "mine.toml"))
    assert mine == keys(load_recipe(CELL, ["phase1.lr=1.0"]))
    by_hand = Recipe("by hand", "res8_narrow", phase1=PhaseConfig(lr=1))
    assert keys(by_hand) == mine
    assert isinstance(by_hand.phase1.lr, int)


def test_each_stage_starts_from_what_it_needs_and_comes_after_it() -> None:
    made = tasks_of(recipe_with())
    assert list(made) == list(STAGE_SEEDS)
    for stage, task in made.items():
        assert task.stage == stage
        assert task.parents == tuple(made[need] for need in NEEDS.get(stage, ()))
        assert {need.stage for need in task.parents} <= set(list(made)[: list(made).index(stage)])
    assert [parent.stage for parent in made["distill"].parents] == ["phase1", "vanilla"]
    assert {stage: task.steps for stage, task in made.items()} == {
        "vanilla": 9022, "phase1": 9022, "finetune": 3123, "distill": 3123, "phase2": 3123
    }  # fmt: skip
    one_shot = tasks_of(load_recipe("baseline-one-shot"))
    assert {stage: task.steps for stage, task in one_shot.items()} == {"vanilla": 9022, "phase1": 3123}
    assert one_shot["phase1"].parents == (one_shot["vanilla"],)
    assert list(tasks_of(load_recipe("baseline-lsq"))) == ["phase1"]


def test_every_stage_can_follow_a_phase_1_that_starts_from_the_plain_network() -> None:
    made = tasks_of(recipe_with("phase1_start=vanilla"))
    assert made["phase1"].parents == (made["vanilla"],)
    for child in ("phase2", "finetune"):
        assert made[child].parents == (made["phase1"],)
    assert made["distill"].parents == (made["phase1"], made["vanilla"])


def test_a_folder_says_what_it_holds() -> None:
    made = tasks_of(replace(recipe_with(), pqk=PQKConfig(bits=8, sparsity=0.875), seed=3))
    assert made["vanilla"].folder == f"res8_narrow-vanilla-s3-{made['vanilla'].key[:8]}"
    assert made["phase2"].folder == f"res8_narrow-w8-p87.5-phase2-s3-{made['phase2'].key[:8]}"


def later_version(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The modules config and tasks as they would be if every config had one setting more."""
    made = []
    for module, name in ((config, "later_config"), (tasks, "later_tasks")):
        source = Path(module.__file__).read_text(encoding="utf-8")
        source = source.replace("from pqk_fast.config import", "from later_config import")
        source = source.replace("    def __post_init__(", "    novelty: float = 0.25\n\n    def __post_init__(")
        made.append(ModuleType(name))
        monkeypatch.setitem(sys.modules, name, made[-1])
        exec(compile(source, name, "exec"), made[-1].__dict__)
    return made[0], made[1]


def test_keys_stay_when_later_versions_have_more_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    later_config, later_tasks = later_version(monkeypatch)
    values = to_dict(recipe_with("pqk.bits=8", "vanilla.lr=0.2", "phase2.alpha=0.7", "distill.co_study=10"))
    later = later_config.recipe_from_dict(values)
    parts = (later, later.data, later.pqk, later.vanilla, later.phase1, later.phase2, later.finetune, later.distill)
    assert all(part.novelty == 0.25 for part in parts)
    expected = keys(recipe_from_dict(values))
    assert {stage: task.key for stage, task in later_tasks.tasks_of(later).items()} == expected
    changed = replace(later, phase2=replace(later.phase2, novelty=0.5))
    other = {stage: task.key for stage, task in later_tasks.tasks_of(changed).items()}
    assert {stage for stage in expected if expected[stage] != other[stage]} == CHILDREN


def test_settings_at_their_defaults_are_all_that_is_left_out() -> None:
    left = tasks._changed(replace(load_recipe(CELL), phase2=Phase2Config(beta=0.25)))
    assert left["phase2"] == {"beta": 0.25}
    assert set(left) == {"name", "description", "model", "phase2"}
