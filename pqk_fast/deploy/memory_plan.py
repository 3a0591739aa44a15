"""Which operations run together plane by plane, and where their results lie in one block of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pqk_fast.deploy.operations import INPUT, Network, Op

Stage = list[Op]


@dataclass
class Buffer:
    """``floats`` values from ``offset`` on, for results that take each other's place.

    ``whole``: all planes; otherwise one plane at a time, which no later stage reads. It is in use from stage ``first``
    to stage ``last``, both included.
    """

    values: list[str]
    floats: int
    whole: bool
    first: int
    last: int
    offset: int = 0

    def meets(self, other: Buffer) -> bool:
        """True if both are in use in some stage."""
        return self.first <= other.last and other.first <= self.last


@dataclass
class Plan:
    """``stages`` run one after the other, each through all planes; ``floats`` is the size of the memory block.

    ``of`` gives each result's buffer. ``result`` is that of the network's output, which is not part of the block.
    """

    stages: list[Stage]
    buffers: list[Buffer]
    of: dict[str, Buffer]
    result: Buffer
    floats: int


def plain_floats(op: Op, whole: bool) -> int:
    return op.size * (op.planes if whole else 1)


def make_plan(network: Network, floats_of: Callable[[Op, bool], int] = plain_floats) -> Plan:
    """Joins operations into stages, lets results be computed in place, and reuses memory by lifetime.

    ``floats_of`` says how much memory a result takes, all planes of it or one.
    """
    stages = make_stages(network.ops)
    of = _buffers(network, stages, floats_of)
    result = of[network.output]
    buffers = list({id(buffer): buffer for buffer in of.values() if buffer is not result}.values())
    return Plan(stages, buffers, of, result, place(buffers))


def make_stages(ops: Sequence[Op]) -> list[Stage]:
    """An operation joins the stage before it if it needs, of what that stage computes, the same plane only."""
    stages: list[Stage] = []
    for op in ops:
        made = {before.output: before for before in stages[-1]} if stages else {}
        read = [made[name] for name in op.inputs if name in made]
        same = all((before.planes, before.size) == (op.planes, op.source) for before in read)
        if read and same and op.by_plane:
            stages[-1].append(op)
        else:
            stages.append([op])
    return stages


def _buffers(network: Network, stages: list[Stage], floats_of: Callable[[Op, bool], int]) -> dict[str, Buffer]:
    stage_of = {op.output: i for i, stage in enumerate(stages) for op in stage}
    readers: dict[str, list[Op]] = {name: [] for name in [INPUT, *stage_of]}
    for op in network.ops:
        for name in op.inputs:
            readers[name].append(op)
    of: dict[str, Buffer] = {}
    for op in network.ops:
        stage = stage_of[op.output]
        read_in = [stage_of[reader.output] for reader in readers[op.output]]
        last = max([stage, *read_in])
        whole = op.output == network.output or last > stage
        # of two, the older: the younger then needs memory for a plane only
        donors = sorted((name for name in op.inputs if name != INPUT), key=stage_of.__getitem__)
        donor = next((name for name in donors if _may_replace(op, name, network, readers, stage_of)), None)
        if donor is None:
            buffer = of[op.output] = Buffer([op.output], 0, whole, stage, last)
        else:
            buffer = of[op.output] = of[donor]
            buffer.values.append(op.output)
            buffer.whole |= whole
            buffer.last = max(buffer.last, last)
        buffer.floats = floats_of(op, buffer.whole)
    return of


def _may_replace(op: Op, name: str, network: Network, readers: dict[str, list[Op]], stage_of: dict[str, int]) -> bool:
    """True if nothing needs ``name`` once ``op`` has read its value at the same place.

    What an earlier stage made must have no other reader in this stage: a convolution reads all planes, each time.
    """
    stage = stage_of[op.output]
    others = [reader for reader in readers[name] if reader is not op]
    return (
        op.in_place
        and name != network.output
        and readers[name][-1] is op
        and (stage_of[name] == stage or all(stage_of[reader.output] < stage for reader in others))
    )


def place(buffers: list[Buffer]) -> int:
    """Sets offsets, the largest buffer first, each as low as it fits; gives the end of the last."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: -buffer.floats):
        buffer.offset = 0
        for other in sorted((other for other in placed if other.meets(buffer)), key=lambda other: other.offset):
            if buffer.offset + buffer.floats > other.offset:
                buffer.offset = max(buffer.offset, other.offset + other.floats)
        placed.append(buffer)
    return max((buffer.offset + buffer.floats for buffer in placed), default=0)
