"""What is measured of a candidate, each made ready as one call.

- "fake_quant": a weight ``[out, in]`` put on a grid of 4 bits, and the gradients of the weight and of what else is
  learned. Candidates whose operation has a mask apply one of 90 %; the others do not, and have less to do.
- "step": res8-narrow as whole_cell.py writes it, batch 64 of noise, masks of 90 % and weights of 4 bits: forward,
  backward, SGD with momentum. It makes no masks, which 31 of 32 steps do not. "channels_last": the same with weights,
  and so activations, in that memory format, where a candidate's weights keep it.
- "masks": new masks of 90 % for all layers of res8-narrow, or for one layer of 1 M weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer import Peer, used_weights
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from whole_cell import BATCH, WIDTH, PlainRes8

SPARSITY = 0.9
LR, STEP_LR_SCALE = 1e-4, 1e-4
FAKE_QUANT = {"res8-narrow layer": (19, 171), "1 M": (1024, 1024), "16 M": (4096, 4096)}
MASKS = ("res8-narrow, all layers", "1 M")
STEPS = {"res8-narrow": torch.contiguous_format, "res8-narrow, channels_last": torch.channels_last}
STEPS_BEFORE_FILE = 20


def network(width: int = WIDTH["res8_narrow"]) -> PlainRes8:
    torch.manual_seed(0)
    return PlainRes8(width)


def noise(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 101, 40, generator=generator), torch.randint(12, (batch,), generator=generator)


def fake_quant(peer: Peer, shape: tuple[int, int]) -> tuple[Callable[[], Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) > SPARSITY
    function, learned = peer.quantizer(weight, mask)
    weight.requires_grad_()
    wanted = [weight, *learned]
    levels = len(function(weight).detach().unique())
    about = {"levels": levels, "learned": sum(each.numel() for each in learned)}
    return lambda: torch.autograd.grad(function(weight), wanted, grad), about


def groups(peer: Peer, model: nn.Module, lr: float, weight_decay: float, scale: float) -> list[dict[str, Any]]:
    """The optimizer's: step sizes get ``scale`` times the rate, as in the recipes, and no decay."""
    learned = peer.learned(model)
    own = {id(parameter) for parameter in learned}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    made = [{"params": rest, "lr": lr, "weight_decay": weight_decay, "lr_scale": 1.0}]
    if learned:
        made.append({"params": learned, "lr": lr * scale, "weight_decay": 0.0, "lr_scale": scale})
    return made


class Step:
    """One step of training; ``about`` is what the network computes with."""

    def __init__(
        self,
        peer: Peer,
        width: int = WIDTH["res8_narrow"],
        batch: int = BATCH,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.x, self.y = noise(batch)
        self.model = peer.add_masks(network(width).to(memory_format=memory_format), self.x)
        peer.set_sparsity(self.model, SPARSITY)
        self.model = peer.quantize(self.model, self.x).train()
        self.optimizer = torch.optim.SGD(groups(peer, self.model, LR, 1e-5, STEP_LR_SCALE), momentum=0.9)
        self.objective = peer.objective(self.model)
        self.about = used_weights(self.model, self.x)
        learned = sum(parameter.numel() for parameter in peer.learned(self.model))
        self.about |= {"learned": learned, "state_bytes": self.state_bytes()}

    def state_bytes(self) -> int:
        """Of parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.objective(self.x, self.y).backward()
        self.optimizer.step()


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 1024, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def masks(peer: Peer, name: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    if name == "1 M":
        model: nn.Module = OneLayer()
        x = torch.randn(2, 1024)
    else:
        model, (x, _) = network(), noise(2)
    model = peer.add_masks(model, x)
    return lambda: peer.set_sparsity(model, SPARSITY), {}


def peak_bytes(step: Step) -> int:
    """The most bytes that torch's allocator held at once during one step, above those held before it.

    Counted from the profiler's record of every allocation, so that it is the same in every run; gradients are freed
    beforehand. What libraries allocate behind torch's back is not in it.
    """
    for _ in range(2):  # momentum is made in the first
        step()
    step.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def file_of(peer: Peer) -> dict[str, Any]:
    """The export of the step's network after a few steps."""
    step = Step(peer)
    for _ in range(STEPS_BEFORE_FILE):
        step()
    return {"bytes": exported_bytes(peer, step.model, step.x[:1])}


def exported_bytes(peer: Peer, model: nn.Module, x: Tensor) -> int:
    with tempfile.TemporaryDirectory() as folder:
        peer.export(model, x, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
