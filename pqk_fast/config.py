"""What can be set. Every invalid combination is refused here, with what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pqk_fast.reference import STE_MODES, TEACHER_WEIGHTS
from pqk_fast.settings import (
    ConfigError,
    build,
    check_bits,
    check_choice,
    check_sparsity,
    check_types,
    is_quantized,
    require,
)

STEP_INITS = ("mean", "lsq", "max", "mse")
STEP_LR_RULES = ("flat", "lsq")
PHASE2_STEPS = ("frozen", "learned")
STAGES = ("vanilla", "phase1", "phase2", "finetune", "distill")


def pruned_of_group(sparsity: float, group_size: int) -> int:
    """How many weights of a group a sparsity prunes: rounded down, but for what binary fractions miss."""
    return int(sparsity * group_size + 1e-6)


@dataclass(frozen=True)
class PQKConfig:
    """How layers are pruned, quantized and taught. Defaults are the paper's, or our reading where it is silent.

    Attributes:
        bits: weight bits k, 2..8; the grid is ``-Q..Q`` with ``Q = 2^(k-1) - 1``. 32 prunes alone: no quantization.
        sparsity: target fraction of pruned weights p_t, in [0, 1).
        scope: "global" ranks all layers together, "layer" gives every layer the same sparsity, "group" every
            ``group_size`` inputs of each (N:M sparsity: 0.5 in groups of 4 ends at 2:4).
        group_size: M of N:M, 2..16, for scope "group"; ``sparsity * group_size`` must be whole.
        layer_sparsity: name or ``re:`` pattern -> that layer's own sparsity, outside the global pool.
        layer_bits: name or ``re:`` pattern -> that layer's own bits, 2..8: mixed precision.
        exclude: names or ``re:`` patterns of Linear and convolution layers (or what holds them) that stay as they are.
        mask_interval: optimizer steps between mask updates, p_u.
        mask_end: part of phase 1, in (0, 1], after which p_t is reached and the mask no longer moves.
        initial_sparsity: p_i of Eq. 1.
        step_tracking: every so many mask updates S becomes the step size of least squared error for the kept weights
            (``step_init``'s "mse"), and is learned as ever in between; 0: never.
        step_init: "mean" ``mean|w|``, "lsq" ``2 mean|w| / sqrt(Q)``, "max" ``max|w| / Q``, "mse" (least squared error).
        per_channel: one step size per output channel instead of one per layer.
        ste: "identity" passes every weight's gradient, "clipped" not those outside the grid (LSQ).
        mask_gradients: True gives the classical hard mask: pruned weights get no gradient in phase 1.
        teacher_weights: phase 2's full net uses "latent" fp32 weights, or "shared" (kept part fake-quantized).
        teacher_bn: the full net's BatchNorm starts phase 2 "fresh" (0, 1) or as a "copy" of the student's.
    """

    bits: int = 4
    sparsity: float = 0.9
    scope: str = "global"
    group_size: int = 4
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    mask_interval: int = 32
    mask_end: float = 1.0
    initial_sparsity: float = 0.0
    step_init: str = "mean"
    step_tracking: int = 0
    per_channel: bool = False
    ste: str = "identity"
    mask_gradients: bool = False
    teacher_weights: str = "latent"
    teacher_bn: str = "fresh"

    def __post_init__(self) -> None:
        if is_quantized(self.bits):
            check_bits(self.bits, "; or 32, to prune without quantization")
        check_types(self)
        check_sparsity(self.sparsity)
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        require(
            self.initial_sparsity <= self.sparsity,
            f"initial_sparsity must not be above sparsity {self.sparsity}, got {self.initial_sparsity}",
        )
        for name, value in self.layer_sparsity.items():
            check_sparsity(value, f"layer_sparsity[{name!r}]")
        for name, value in self.layer_bits.items():
            check_bits(value, f" (layer_bits[{name!r}])")
        for pattern in (*self.exclude, *self.layer_sparsity, *self.layer_bits):
            require(isinstance(pattern, str), f"patterns are module names or 're:...', got {pattern!r}")
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None
        check_choice("scope", self.scope, ("global", "layer", "group"))
        require(2 <= self.group_size <= 16, f"group_size must lie in 2..16, got {self.group_size}")
        if self.scope == "group":
            for value in (self.sparsity, *self.layer_sparsity.values()):
                whole = pruned_of_group(value, self.group_size)
                require(
                    abs(value * self.group_size - whole) < 1e-6,
                    f"in groups of {self.group_size} sparsity is 1/{self.group_size} or a multiple of it, got {value}",
                )
        check_choice("step_init", self.step_init, STEP_INITS)
        check_choice("ste", self.ste, STE_MODES)
        check_choice("teacher_weights", self.teacher_weights, TEACHER_WEIGHTS)
        check_choice("teacher_bn", self.teacher_bn, ("fresh", "copy"))
        require(self.mask_interval >= 1, f"mask_interval must be at least 1 step, got {self.mask_interval}")
        require(self.step_tracking >= 0, f"step_tracking must not be negative, got {self.step_tracking}")
        require(0 < self.mask_end <= 1, f"mask_end must lie in (0, 1], a part of phase 1; got {self.mask_end}")


@dataclass(frozen=True)
class DataConfig:
    """What to train on. Speech only: ``unknown`` and ``silence`` are fractions of the keyword count, and ``time_mask``
    frames at most are hidden in a clip's features in training (SpecAugment; Park et al., Interspeech 2019)."""

    name: str = "speech_commands"
    batch_size: int = 64
    classes: int = 12
    unknown: float = 0.1
    silence: float = 0.1
    validation: float = 0.1
    time_mask: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("data.name", self.name, ("speech_commands", "spoken_words", "cifar100"))
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(self.classes >= 2, f"classes must be at least 2, got {self.classes}")
        for name in ("unknown", "silence", "time_mask"):
            require(getattr(self, name) >= 0, f"data.{name} must not be negative, got {getattr(self, name)}")
        speech = self.name != "cifar100"
        require(speech or self.time_mask == 0, f"data.time_mask is for speech, got {self.time_mask} for {self.name}")
        require(0 <= self.validation < 1, f"data.validation must lie in [0, 1), got {self.validation}")


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase; everything is counted in optimizer steps, so that it fits a data set of any size.

    ``epoch_steps`` is what Eq. 1, the curves and the validation call an epoch. ``lr_schedule`` "drops" multiplies the
    rate by ``lr_gamma`` at each step of ``lr_drops``, "cosine" decays to 0, "constant" stays; in the first
    ``lr_warmup`` steps the rate rises in a line to what the schedule says. ``label_smoothing`` is the cross-entropy's.
    The last ``average_steps`` steps' mean weights take the weights' place at the end, BatchNorm's statistics made anew.
    ``step_lr_scale`` is the step sizes' share of the rate, which ``step_lr_rule`` "lsq" divides by ``sqrt(N Q)`` for a
    step size of N weights (with SGD this is LSQ's gradient scale; Esser et al., ICLR 2020) and "flat" leaves as it is.
    """

    steps: int = 9022
    epoch_steps: int = 347
    lr: float = 0.1
    lr_schedule: str = "drops"
    lr_drops: tuple[int, ...] = (3000, 6000)
    lr_gamma: float = 0.1
    lr_warmup: int = 0
    label_smoothing: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-5
    step_lr_scale: float = 1e-4
    step_lr_rule: str = "flat"
    average_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        require(self.epoch_steps >= 1, f"epoch_steps must be at least 1, got {self.epoch_steps}")
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        check_choice("lr_schedule", self.lr_schedule, ("drops", "cosine", "constant"))
        require(
            list(self.lr_drops) == sorted(self.lr_drops) and all(drop >= 0 for drop in self.lr_drops),
            f"lr_drops must be rising step numbers, got {self.lr_drops}",
        )
        require(self.lr_gamma > 0, f"lr_gamma must be positive, got {self.lr_gamma}")
        warmup = self.lr_warmup
        require(0 <= warmup <= self.steps, f"lr_warmup must be a number of the {self.steps} steps, got {warmup}")
        require(0 <= self.label_smoothing < 1, f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        require(self.step_lr_scale >= 0, f"step_lr_scale must not be negative, got {self.step_lr_scale}")
        check_choice("step_lr_rule", self.step_lr_rule, STEP_LR_RULES)
        average, steps = self.average_steps, self.steps
        require(0 <= average <= steps, f"average_steps must be a number of the {steps} steps, got {average}")


@dataclass(frozen=True)
class Phase2Config(PhaseConfig):
    """Phase 2: cross-entropy alone for ``distill_start`` steps (s), then ``alpha`` CE + ``beta`` T^2 KL (Eqs 9, 10).

    With ``distillation`` "one_way" the full net learns from the labels alone, with "mutual" from the student too. In
    the last ``teacher_rest`` steps the teacher is a frozen copy of the full net, which learns no more and is not moved
    by what the student learns: of the mean of its weights in the ``teacher_average`` steps before that, if any. (The
    one in the model is of no use then.) ``step_size`` "learned" lets S learn on from the student's loss.
    """

    steps: int = 3123
    lr_drops: tuple[int, ...] = (1000, 2000)
    distill_start: int = 1500
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 2.0
    distillation: str = "mutual"
    teacher_rest: int = 0
    teacher_average: int = 0
    step_size: str = "frozen"
    forward: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.distill_start < self.steps,
            f"distill_start must be a step of phase 2, 0..{self.steps - 1}, got {self.distill_start}",
        )
        require(self.alpha >= 0 and self.beta >= 0, f"alpha and beta must be >= 0, got {self.alpha}, {self.beta}")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        check_choice("distillation", self.distillation, ("mutual", "one_way"))
        check_choice("step_size", self.step_size, PHASE2_STEPS)
        rest, average = self.teacher_rest, self.teacher_average
        before = self.steps - rest if rest else 0
        most = self.steps - self.distill_start
        require(0 <= rest <= most, f"teacher_rest must be 0 to {most}, the steps with distillation, got {rest}")
        require(0 <= average <= before, f"teacher_average must be 0 to {before}, the steps before rest, got {average}")
        check_choice("forward", self.forward, ("auto", "two_pass", "stacked"))


@dataclass(frozen=True)
class FinetuneConfig:
    """The baseline of the paper's Table 2: phase 2's schedule with cross-entropy alone, from this learning rate."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        require(self.lr > 0, f"finetune.lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class DistillConfig:
    """The baseline with a teacher of its own, the vanilla network: phase 2's schedule, alpha, beta and temperature.

    Distillation starts at the first step. For ``co_study`` steps the teacher learns too, from the student (QKD's
    co-studying; Kim et al. 2019); then, or from the beginning if it is 0, the teacher is frozen.
    """

    co_study: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.co_study >= 0, f"distill.co_study must be a number of steps, 0 or more, got {self.co_study}")


@dataclass(frozen=True)
class Recipe:
    """One run, whole: what a recipe file says.

    ``phase1_start`` "vanilla" starts phase 1 from the trained vanilla network instead of from scratch; ``vanilla`` is
    that network's own schedule, by default phase 1's.
    """

    name: str
    model: str
    description: str = ""
    seed: int = 0
    stages: tuple[str, ...] = ("vanilla", "phase1", "phase2", "finetune")
    phase1_start: str = "scratch"
    data: DataConfig = field(default_factory=DataConfig)
    pqk: PQKConfig = field(default_factory=PQKConfig)
    vanilla: PhaseConfig | None = None
    phase1: PhaseConfig = field(default_factory=PhaseConfig)
    phase2: Phase2Config = field(default_factory=Phase2Config)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        for stage in self.stages:
            check_choice("stages", stage, STAGES)
        require(len(self.stages) > 0, "stages must name at least one of " + ", ".join(STAGES))
        require(len(set(self.stages)) == len(self.stages), f"stages names one twice: {list(self.stages)}")
        check_choice("phase1_start", self.phase1_start, ("scratch", "vanilla"))
        later = [stage for stage in ("phase2", "finetune", "distill") if stage in self.stages]
        for needs, what in ((self.phase1_start == "vanilla", "phase1_start"), ("distill" in self.stages, "distill")):
            require(
                not needs or "vanilla" in self.stages,
                f"stages: {what} needs the vanilla network: add 'vanilla' to {list(self.stages)}",
            )
        require(
            "distill" not in self.stages or self.distill.co_study < self.phase2.steps,
            f"distill.co_study must leave steps for the frozen teacher, at most {self.phase2.steps - 1}, got "
            f"{self.distill.co_study}",
        )
        require(
            not later or "phase1" in self.stages,
            f"stages: {' and '.join(later)} need phase1's network: add 'phase1' to {list(self.stages)}",
        )
        require(
            not later or self.pqk.sparsity > 0,
            f"stages: {' and '.join(later)} need pruned weights, but pqk.sparsity is 0",
        )
        require(
            "phase1" not in self.stages or self.phase1.steps > self.pqk.mask_interval,
            f"phase1.steps = {self.phase1.steps} leaves no time to prune: a mask is made every pqk.mask_interval = "
            f"{self.pqk.mask_interval} steps",
        )


def recipe_from_dict(values: Mapping[str, Any], source: str = "a recipe") -> Recipe:
    """The inverse of :func:`to_dict` (tuples may have become lists); ``source`` is what errors call it."""
    missing = [key for key in ("name", "model") if key not in values]
    require(not missing, f"{source} must set {' and '.join(missing)}")
    recipe: Recipe = build(Recipe, values)
    return recipe
