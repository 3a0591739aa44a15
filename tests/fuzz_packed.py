"""Throws damaged packed files, and programs of networks with wrong numbers, at what reads them, until time is up.

    make fuzz [SECONDS=600]

Run by that with a C++ library that AddressSanitizer and UndefinedBehaviorSanitizer watch. Most files are damaged within
what their checksums cover, which are then made right. What may happen: PackedError, or a student that is loaded and
run. Anything else is a finding, as is what takes longer than 20 seconds of work: it is kept, and the run ends with 1.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from test_c_source import EveryOperation
from test_executor import CONVS, Block, trained
from test_packed import rebuilt, student
from torch import nn

from pqk_fast.deploy.executor import compile_network, run_network
from pqk_fast.deploy.packed import fill, save_packed
from pqk_fast.deploy.reader import PackedError, parse_packed
from pqk_fast.deploy.runtime import to_runtime

SLOW = 20.0
REFUSALS = ("cannot be run", "values a sample")  # of programs
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    2**15,
    2**28,
    2**31 - 1,
    2**31,
    2**40,
    2**63,
    2**64,
    1e300,
    True,
    None,
    "",
    [],
    {},
)


def networks() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Conv1d(2, 5, 3, bias=False), nn.Flatten(), nn.Linear(10, 3)),
    ]


INPUTS = ((2, 6), (2, 2, 4, 4), (2, 2, 4))


def seeds(folder: Path) -> list[tuple[bytes, int]]:
    """Whole files and the network that each is of."""
    found = []
    for i in range(len(INPUTS)):
        for bits in (2, 4, 8):
            for sparsity in (0.1, 0.5, 0.95):
                model = student(networks()[i], bits=bits, sparsity=sparsity, per_channel=bits == 4)
                save_packed(model, folder / "seed.pqk", {"note": "é" * bits})
                found.append(((folder / "seed.pqk").read_bytes(), i))
    return found


def parts(whole: bytes) -> tuple[list, bytes]:
    """The index and what follows it."""
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    length = struct.unpack("<I", data[:4])[0]
    return json.loads(zlib.decompress(data[8 : 8 + length])), data[8 + length :]


def damaged_bytes(content: bytes, draw: np.random.Generator) -> bytes:
    made = bytearray(content)
    for _ in range(int(draw.integers(1, 6))):
        kind, place = draw.integers(5), int(draw.integers(len(made) + 1))
        if kind == 0 and made:
            made[place % len(made)] ^= 1 << int(draw.integers(8))
        elif kind == 1 and made:
            made[place % len(made)] = int(draw.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            del made[place : place + int(draw.integers(1, 9))]
        elif kind == 3:
            made[place:place] = draw.bytes(int(draw.integers(1, 9)))
        else:
            made = made[:place]
    return bytes(made)


def damaged_index(index: list, draw: np.random.Generator) -> list:
    """One or two places of it take another value, change places, or go."""
    for _ in range(int(draw.integers(1, 3))):
        holder: list | dict = index
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = keys[int(draw.integers(len(keys)))]
            inner = holder[key]
            if isinstance(inner, list | dict) and inner and draw.random() < 0.85:
                holder = inner
                continue
            kind = draw.integers(4)
            if kind == 0 and isinstance(holder, list):
                del holder[key]
            elif kind == 1 and isinstance(holder, list):
                holder.insert(key, holder[int(draw.integers(len(holder)))])
            elif kind == 2 and type(inner) is int:
                holder[key] = inner + int(draw.integers(-3, 4))
            else:
                holder[key] = NUMBERS[int(draw.integers(len(NUMBERS)))]
            break
    return index


def damaged_file(whole: bytes, draw: np.random.Generator) -> bytes:
    kind = draw.integers(4)
    if kind == 0:
        return damaged_bytes(whole, draw)
    index, body = parts(whole)
    if kind == 1:
        return rebuilt(index, damaged_bytes(body, draw))
    if kind == 2:
        return rebuilt(damaged_index(index, draw), body)
    return rebuilt(damaged_index(index, draw), damaged_bytes(body, draw))


def use(content: bytes, network: int) -> str:
    try:
        packed = parse_packed(content, most_weights=1 << 20)
    except PackedError:
        return "refused by the reader"
    model, x = networks()[network], torch.randn(INPUTS[network])
    try:
        plain = fill(packed, model)
    except RuntimeError as error:  # torch's, about names and shapes
        if "Error(s) in loading state_dict" not in str(error):
            raise
        return "refused by the network"
    with torch.inference_mode():
        runtime = to_runtime(packed, networks()[network])
        for layer in runtime:
            layer.sparse = True
        made, expected = runtime(x), plain(x)
        tame = all(bool((tensor.abs() < 1e3).all()) for tensor in plain.state_dict().values())  # else: cancellation
        if tame and expected.isfinite().all():
            torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-5)
    return "run"


def use_program(draw: np.random.Generator, network: object, x: torch.Tensor) -> str:
    named = {"steps": network.steps, "places": network.places, "sizes": torch.tensor(network.sizes)}
    for _ in range(int(draw.integers(1, 4))):
        key = list(named)[int(draw.integers(3))]
        values = named[key].clone()
        flat = values.view(-1)
        place = int(draw.integers(flat.numel()))
        choice = (int(draw.integers(-8, 9)) + int(flat[place]), 2 ** int(draw.integers(31)), -int(draw.integers(9)))
        flat[place] = choice[int(draw.integers(3))]
        named[key] = values
    if int(named["sizes"].abs().max()) > 1 << 26:  # memory that a program asks for and gets
        return "program: left out"
    try:
        run_network(x, named["steps"], named["places"], network.numbers, named["sizes"].tolist())
    except RuntimeError as error:
        if not any(text in str(error) for text in REFUSALS):
            raise
        return "program: refused"
    return "program: run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("build/findings"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(options.seed)
    options.findings.mkdir(parents=True, exist_ok=True)
    whole = seeds(options.findings)
    (options.findings / "seed.pqk").unlink()
    programs = [
        (compile_network(trained(model), sample), sample)
        for model, sample in (
            (Block([CONVS[0], CONVS[10]]), torch.randn(1, 2, 9, 7)),
            (EveryOperation(), torch.randn(1, 3, 11, 17)),
        )
    ]
    outcomes: Counter[str] = Counter()
    begin = said = time.monotonic()
    while (now := time.monotonic()) - begin < options.seconds:
        worked = time.process_time()
        outcomes[use_program(draw, *programs[int(draw.integers(2))])] += 1
        seed, network = whole[int(draw.integers(len(whole)))]
        content = damaged_file(seed, draw)
        (options.findings / "last.pqk").write_bytes(content)  # what a crash leaves behind
        try:
            outcomes[use(content, network)] += 1
            if (taken := time.process_time() - worked) > SLOW:
                raise AssertionError(f"this, or the program before it, took {taken:.1f} s")
        except Exception as error:
            path = options.findings / f"finding-{sum(outcomes.values())}.pqk"
            path.write_bytes(content)
            print(f"{path}: {type(error).__name__}: {error}", flush=True)
            return 1
        if now - said > 30:
            said = now
            print(f"{now - begin:.0f} s: {dict(outcomes)}", flush=True)
    (options.findings / "last.pqk").unlink()
    print(f"{options.seconds:.0f} s without a finding, seed {options.seed}: {dict(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
