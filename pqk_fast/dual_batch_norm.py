"""BatchNorm for two branches in one network: the student's and the full net's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk_fast.batch_norm import batch_norm, sync_batch_norm
from pqk_fast.two_phase import TwoPhase, plain_copy, take_over

BATCH_NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class DualBatchNorm(TwoPhase, _BatchNorm):
    """BatchNorm with one set of statistics and affine parameters for the student, another for the full net.

    The student's keep the original names (``weight``, ``running_mean``, ...), the full net's are prefixed with
    ``teacher_`` and exist from the start, so that shapes never change; a float state dict loads strictly (the full
    net's entries then follow the student's). A class each for BatchNorm1d, 2d, 3d and SyncBatchNorm.
    """

    float_type: type[_BatchNorm]
    added = tuple(f"teacher_{name}" for name in BATCH_NORM_STATE)
    teacher_weight: nn.Parameter | None
    teacher_bias: nn.Parameter | None
    teacher_running_mean: Tensor | None
    teacher_running_var: Tensor | None
    teacher_num_batches_tracked: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach()

    def _attach(self) -> None:
        for name in BATCH_NORM_STATE:
            own = getattr(self, name)
            if name in ("weight", "bias"):
                frozen = None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
                self.register_parameter(f"teacher_{name}", frozen)
            else:
                self.register_buffer(f"teacher_{name}", None if own is None else own.clone())
        self._start()

    def set_phase(self, phase: int) -> None:
        """The full net's affine parameters learn in phase 2, where the student's do."""
        super().set_phase(phase)
        for name in ("weight", "bias"):
            own = getattr(self, name)
            if own is not None:
                getattr(self, f"teacher_{name}").requires_grad_(phase == 2 and own.requires_grad)

    def freeze_teacher(self) -> None:
        """For training of the student alone in phase 2: the full net's affine parameters do not learn."""
        for parameter in (self.teacher_weight, self.teacher_bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    @classmethod
    def from_float(cls, module: nn.Module) -> DualBatchNorm:
        """The dual layer around ``module``'s own parameters; TypeError for anything but ``BATCH_NORMS``."""
        kind = _DUAL_TYPES.get(type(module))
        if kind is None:
            raise TypeError(
                f"DualBatchNorm.from_float takes BatchNorm1d, 2d, 3d or SyncBatchNorm, got {type(module).__name__}"
            )
        dual = kind.__new__(kind)
        take_over(dual, module)
        dual._attach()
        return dual

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain BatchNorm with this branch's statistics and affine parameters; nothing is shared."""
        prefix = "teacher_" if branch == "teacher" else ""
        return plain_copy(self, self.float_type, {name: getattr(self, prefix + name) for name in BATCH_NORM_STATE})

    @torch.no_grad()
    def start_teacher(self, how: str) -> None:
        """Start the full net's set ``"fresh"`` (mean 0, variance 1, affine 1 and 0) or as a ``"copy"``.

        A frozen BatchNorm (affine parameters that do not learn) is copied in any case: a fresh one could not adapt.
        """
        frozen = self.weight is not None and not self.weight.requires_grad
        fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
        for name, value in fresh.items():
            teacher = getattr(self, f"teacher_{name}")
            if teacher is None:
                continue
            if how == "copy" or frozen:
                teacher.copy_(getattr(self, name))
            else:
                teacher.fill_(value)

    def _normalize(self, x: Tensor, prefix: str) -> Tensor:
        mean, var = getattr(self, f"{prefix}running_mean"), getattr(self, f"{prefix}running_var")
        factor = 0.0 if self.momentum is None else self.momentum
        tracked = getattr(self, f"{prefix}num_batches_tracked")
        if self.training and self.track_running_stats and tracked is not None:
            tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(tracked)
        update = not self.training or self.track_running_stats
        return self._function()(
            x,
            mean if update else None,
            var if update else None,
            getattr(self, f"{prefix}weight"),
            getattr(self, f"{prefix}bias"),
            self.training or mean is None,
            factor,
            self.eps,
        )

    def _function(self) -> Callable[..., Tensor]:
        return batch_norm

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        branch = self.branch_now()
        if branch != "stacked":
            return self._normalize(x, "teacher_" if branch == "teacher" else "")
        student, teacher = x.chunk(2)
        return torch.cat([self._normalize(student, ""), self._normalize(teacher, "teacher_")])

    def _read_prepared(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        alone = [name for name in BATCH_NORM_STATE if name in entries and f"teacher_{name}" not in entries]
        if alone:
            yield (
                f"teacher_{alone[0]} is missing beside {alone[0]}: give both, or leave out pqk_phase and all that "
                "begins with teacher_ to start the full net's BatchNorm anew"
            )
        yield from super()._read_prepared(entries, metadata)

    def _read_float(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        if any(name in entries for name in BATCH_NORM_STATE):
            if self.num_batches_tracked is not None and (metadata.get("version") or 1) < 2:  # as BatchNorm itself does
                entries.setdefault("num_batches_tracked", torch.tensor(0, dtype=torch.long))
            entries |= {f"teacher_{name}": value.clone() for name, value in entries.items()}
        yield from super()._read_float(entries, metadata)


class DualBatchNorm1d(DualBatchNorm, nn.BatchNorm1d):
    float_type = nn.BatchNorm1d


class DualBatchNorm2d(DualBatchNorm, nn.BatchNorm2d):
    float_type = nn.BatchNorm2d


class DualBatchNorm3d(DualBatchNorm, nn.BatchNorm3d):
    float_type = nn.BatchNorm3d


class DualSyncBatchNorm(DualBatchNorm):
    """In training, each branch's batch statistics are over the batches of all ranks of ``process_group`` (None: all).

    On any device that the group's backend knows. Ranks may have batches of different sizes. Otherwise (in evaluation,
    on one rank) as BatchNorm. No subclass of nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU.
    """

    float_type = nn.SyncBatchNorm
    process_group: Any

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {x.dim()}")

    def _function(self) -> Callable[..., Tensor]:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.training and together and torch.distributed.get_world_size(self.process_group) > 1:
            return partial(sync_batch_norm, group=self.process_group)
        return batch_norm


_DUAL_TYPES: dict[type, type[DualBatchNorm]] = {
    dual.float_type: dual for dual in (DualBatchNorm1d, DualBatchNorm2d, DualBatchNorm3d, DualSyncBatchNorm)
}
BATCH_NORMS = tuple(_DUAL_TYPES)  # what DualBatchNorm.from_float takes
