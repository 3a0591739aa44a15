"""What batches of every data set share: the order and random numbers of a pass, exact resume, and ranks."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Batch", "DeviceBatches", "pass_generator"]

Batch = tuple[Tensor, Tensor]


def pass_generator(seed: int, number: int) -> torch.Generator:
    """A CPU generator for pass `number` alone, seeded with 63 bits of the SHA-256 of "seed/number".

    Any two passes, of one seed or of two, thus have unrelated random numbers. (torch's CPU generator looks at the low
    32 bits of a seed.)
    """
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class DeviceBatches(ABC):
    """Iterates over a data set that lives on `device`: one pass an iteration, `len()` batches each.

    A subclass says what is drawn for a pass (`draw`) and how a batch is made from rows of that (`make`). All draws of a
    pass are made on the host at its beginning, by a generator seeded from `seed` and the number of the pass, and moved
    to the device at once; from then on nothing waits for the host. So they depend on neither the device nor other
    random numbers, and two numbers, the pass and the position in it, say where an iteration stands.

    Training: every pass has a new order, and a last partial batch is dropped. Evaluation: one order, the same draws in
    every pass, no example left out.

    Resume: load `state_dict()`, taken after batch i, into an object made with the same arguments; its next iteration
    starts with batch i + 1, or with the next pass if i was the last one. Iterating anew without that abandons the pass
    under way and starts the next one. Nothing changes before the first batch is asked for.

    Ranks: in training `batch_size` is that of all `world` ranks together; rank r makes rows `[r b, (r + 1) b)` of each
    batch, `b = batch_size / world`, and the state is the same on every rank and for any number of them. In evaluation
    rank r makes batches r, r + world, r + 2 world..., each just as one process would make it, and maybe none at all;
    its state counts these.

    Args:
        examples: how many there are.
        batch_size: examples a batch, over all ranks.
        train: training or evaluation.
        seed: of all that is drawn.
        device: where the batches are made.
        rank, world: which of how many processes this is.

    Raises ValueError for a `batch_size` or `rank` out of range, and in training for too few examples for one batch and
    a `batch_size` that is not a multiple of `world`.
    """

    keeps_evaluation: ClassVar[bool] = False
    """Whether batches of evaluation are made in the first pass only, and kept."""

    def __init__(
        self,
        examples: int,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        name = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{name} needs a batch_size of at least 1, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"{name} needs a rank in 0..world - 1, got rank {rank} of world {world}")
        if train and examples < batch_size:
            raise ValueError(
                f"training drops the last partial batch, so {examples} examples make no batch of {batch_size}: use a "
                "smaller batch_size or more examples"
            )
        if train and batch_size % world:
            raise ValueError(
                f"{world} ranks cannot share batches of {batch_size} evenly: use a batch_size that is a multiple of "
                f"{world}, such as {batch_size + -batch_size % world}, or another number of ranks"
            )
        self.examples, self.batch_size, self.train, self.seed = examples, batch_size, train, seed
        self.device = torch.device(device)
        # A pass is cut into runs of `_size` rows, which are dealt to the ranks in turn.
        self._size = batch_size // world if train else batch_size
        rows = torch.arange(examples - examples % batch_size if train else examples)
        self._rows = torch.cat([rows[:0], *rows.split(self._size)[rank::world]])
        self._pass = 0  # the one under way or, between passes, the next one
        self._position = 0  # batches of it handed out
        self._loaded = False  # since the last iteration began
        self._kept: dict[int, Batch] = {}

    @abstractmethod
    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What a pass needs to know: which example and how it is augmented, in the order of the pass. Tensors on the
        CPU, one row an example."""

    @abstractmethod
    def make(self, index: Tensor, *augmentation: Tensor) -> Batch:
        """The batch of some rows of `draw`'s tensors, which are on the device now."""

    def __len__(self) -> int:
        """Batches a pass, of this rank."""
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        if self._position and not self._loaded:
            self._pass, self._position = self._pass + 1, 0
        self._loaded = False
        number, draws = self._pass, None
        for i in range(self._position, len(self)):
            batch = self._kept.get(i)
            if batch is None:
                draws = draws or self._draws_on_device(number)
                batch = self.make(*(draw[i * self._size : (i + 1) * self._size] for draw in draws))
                if self.keeps_evaluation and not self.train:
                    self._kept[i] = batch
            self._pass, self._position = (number, i + 1) if i + 1 < len(self) else (number + 1, 0)
            yield batch

    def _draws_on_device(self, number: int) -> tuple[Tensor, ...]:
        """This rank's rows of what is drawn for pass `number`."""
        draws = self.draw(pass_generator(self.seed, number if self.train else 0))
        mine = [draw[self._rows] for draw in draws]
        if self.device.type == "cuda":
            mine = [draw.pin_memory() for draw in mine]
        return tuple(draw.to(self.device, non_blocking=True) for draw in mine)

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands after the last batch handed out: `pass` (counted from 0) and `position` (batches
        of it handed out; 0 of the next pass after the last one); and `examples`, `batch_size` and `seed`, against which
        a load is checked."""
        return {
            "pass": self._pass,
            "position": self._position,
            "examples": self.examples,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`: the next iteration begins with the batch after the last one handed out then.

        Raises ValueError if `state` lacks an entry, was saved with other data, batch size or seed, or stands at no
        batch of a pass.
        """
        mine, name = self.state_dict(), type(self).__name__
        if missing := [key for key in mine if key not in state]:
            raise ValueError(f"the state lacks {', '.join(missing)}: load what state_dict() of a {name} returned")
        for key in ("examples", "batch_size", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the saved state has {key} {state[key]}, this {name} has {mine[key]}: resume with the data, "
                    "batch size and seed it was saved with"
                )
        for key, most in ("pass", math.inf), ("position", max(len(self) - 1, 0)):
            value = state[key]
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(
                    f"{key} must be a whole number in 0..{most}, got {value!r}: load what state_dict() of a {name} "
                    "with the same data returned"
                )
        self._pass, self._position, self._loaded = state["pass"], state["position"], True
