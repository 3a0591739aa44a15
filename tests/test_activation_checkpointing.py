"""Activation checkpointing: the gradients of the network without it, or a refusal that says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pqk_fast as pqk

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3
REFUSED = "computed again during backward.*whether as student or as teacher"

both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Net(nn.Module):
    """Its parts are checkpointed if ``reentrant`` is True or False; the second has no prepared layer but BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.second = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
        self.last = nn.Linear(6, 3)
        self.reentrant: bool | None = None
        self.nested = False
        self.aside: Tensor | None = None

    def part(self, run: Callable, x: Tensor) -> Tensor:
        return run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        h = self.part(self.first, x)
        h = self.part((lambda h: self.part(self.second, h)) if self.nested else self.second, h)
        out: Tensor = self.last(h)
        self.aside = self.part(self.first, x).square().mean()
        return out


def prepared(phase: int) -> Net:
    torch.manual_seed(0)
    model = pqk.prepare(Net(), pqk.PQKConfig(sparsity=0.5, mask_interval=1))
    pqk.Pruner(model, 1, 1)
    if phase == 2:
        pqk.start_phase2(model)
        for name, parameter in model.named_parameters():  # so that the wrong branch's would show
            if "teacher_weight" in name:
                parameter.data += 0.5
    return model


def student(model: Net, x: Tensor) -> Tensor:
    return F.cross_entropy(pqk.branch(model, "student")(x), Y)


def full_net(model: Net, x: Tensor) -> Tensor:
    return F.cross_entropy(pqk.branch(model, "teacher")(x), Y)


def both(mode: str) -> Callable[[Net, Tensor], Tensor]:
    return lambda model, x: pqk.MutualDistillationLoss()(*pqk.dual_forward(model, x, mode), Y)


def twice(model: Net, x: Tensor) -> Tensor:
    """Two batches, one backward."""
    return both("two_pass")(model, x) + both("two_pass")(model, x.flip(0))


LOSSES: dict[str, tuple[int, Callable[[Net, Tensor], Tensor]]] = {
    "phase 1": (1, lambda model, x: F.cross_entropy(model(x), Y)),
    "student": (2, student),
    "teacher": (2, full_net),
    "two_pass": (2, both("two_pass")),
    "stacked": (2, both("stacked")),
    "auto": (2, both("auto")),
}


def gradients(model: Net, loss: Callable[[Net, Tensor], Tensor]) -> dict[str, Tensor]:
    x = X.clone().requires_grad_()
    loss(model, x).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}  # type: ignore[dict-item]


@both_kinds
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_are_the_same(name: str, reentrant: bool) -> None:
    phase, loss = LOSSES[name]
    plain = prepared(phase)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    torch.testing.assert_close(gradients(model, loss), gradients(plain, loss), rtol=1e-6, atol=1e-8)


@both_kinds
def test_several_forwards_and_one_backward_are_told_apart(reentrant: bool) -> None:
    plain = prepared(2)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    torch.testing.assert_close(gradients(model, twice), gradients(plain, twice), rtol=1e-6, atol=1e-8)


def test_checkpoints_in_checkpoints() -> None:
    plain = prepared(2)
    model = copy.deepcopy(plain)
    model.reentrant, model.nested = False, True
    loss = both("two_pass")
    torch.testing.assert_close(gradients(model, loss), gradients(plain, loss), rtol=1e-6, atol=1e-8)
    model.reentrant = True
    with pytest.raises(RuntimeError, match=REFUSED):
        gradients(model, loss)


@both_kinds
def test_what_cannot_be_told_is_refused(reentrant: bool) -> None:
    model = prepared(2)
    model.reentrant = reentrant

    def within(model: Net, x: Tensor) -> Tensor:
        with pqk.branch(model, "teacher"):
            return F.cross_entropy(model(x), Y)

    def aside_of_student(model: Net, x: Tensor) -> Tensor:
        pqk.branch(model, "student")(x)
        aside = model.aside
        return full_net(model, x) + aside  # reached past the student's output

    for loss in (within, aside_of_student, LOSSES["phase 1"][1]):
        with pytest.raises(RuntimeError, match=REFUSED):
            gradients(model, loss)
    gradients(model, both("two_pass"))  # a backward that failed leaves nothing behind
    with pytest.raises(RuntimeError, match=REFUSED):
        gradients(model, within)


def test_what_another_thread_s_backward_told_does_not_count() -> None:
    """Each thread counts autograd's nodes from 0."""
    model = prepared(2)
    model.reentrant = False

    def plainly(model: Net, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), Y)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(gradients, model, full_net).result()
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match=REFUSED):
        thread.submit(gradients, model, plainly).result()


@both_kinds
def test_batch_norm_alone_is_refused_as_well(reentrant: bool) -> None:
    model = prepared(2)
    with pqk.branch(model, "teacher"):
        out = checkpoint(model.second, X.clone().requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=REFUSED):
        out.sum().backward()


@both_kinds
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_backward_within_the_branch(name: str, reentrant: bool) -> None:
    plain = prepared(2)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    found = []
    for net in (plain, model):
        x = X.clone().requires_grad_()
        with pqk.branch(net, name):
            F.cross_entropy(net(x), Y).backward()
        found.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
