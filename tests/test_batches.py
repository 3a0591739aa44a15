"""What batches of every data set share: one pass after another, exact resume, ranks, and nothing read on the host."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
import torch

from pqk_fast.data import load
from pqk_fast.data.batches import Batch, DeviceBatches, pass_generator
from pqk_fast.data.cifar import Cifar, CifarSplit
from pqk_fast.data.cifar_batches import CifarBatches
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import CLIP_SAMPLES, Noise, SpeechCommands, SpeechSet
from pqk_fast.recipe_files import load_recipe

KINDS = pytest.mark.parametrize("kind", [SpeechBatches, CifarBatches])
MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])


def clips(count: int) -> SpeechSet:
    """Noise of a loudness of its own each; clip 0 is silence."""
    generator = torch.Generator().manual_seed(count)
    samples = torch.randint(-999, 1000, (count, CLIP_SAMPLES), dtype=torch.int16, generator=generator)
    return SpeechSet(samples * torch.arange(count)[:, None].short().clamp(max=30), torch.arange(count), [""] * count)


def recordings() -> Noise:
    samples = torch.randint(-(2**15), 2**15, (40_000,), generator=torch.Generator().manual_seed(0)).short()
    return Noise(samples, [0, 16_000, 40_000])


def pictures(count: int) -> CifarSplit:
    generator = torch.Generator().manual_seed(count)
    return CifarSplit(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(count)
    )


def make(kind: type[DeviceBatches], count: int = 14, batch_size: int = 4, **settings) -> DeviceBatches:
    """Batches of examples whose label is their number; by default three (four in evaluation) a pass."""
    if kind is SpeechBatches:
        return SpeechBatches(clips(count), recordings(), batch_size=batch_size, **settings)
    return CifarBatches(pictures(count), batch_size=batch_size, **settings)


def endless(batches: DeviceBatches) -> Iterator[Batch]:
    while True:
        yield from batches


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for (x, y), (x_expected, y_expected) in zip(got, expected, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def differ(one: list[Batch], other: list[Batch]) -> bool:
    return all(not torch.equal(x, x2) for (x, _), (x2, _) in zip(one, other, strict=True))


# --- passes


@KINDS
def test_passes_of_training_differ_and_those_of_evaluation_do_not(kind: type[DeviceBatches]) -> None:
    batches = make(kind, train=True)
    passes = [list(batches) for _ in range(3)]
    for one, other in pairwise(passes):
        assert differ(one, other)
    for one in passes:
        assert len(one) == len(batches) == 3
        assert torch.cat([y for _, y in one]).unique().numel() == 12
    batches = make(kind, train=False)
    assert [len(y) for _, y in batches] == [4, 4, 4, 2]
    assert_equal(list(batches), list(make(kind, train=False)))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(14))


@KINDS
@MODES
def test_only_the_seed_decides(kind: type[DeviceBatches], train: bool) -> None:
    torch.manual_seed(1)
    one = list(islice(endless(make(kind, train=train, seed=3)), 6))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    stream = endless(make(kind, train=train, seed=3))
    other = [next(stream)]
    assert torch.equal(torch.get_rng_state(), before)  # nothing is taken from the global generator
    for _ in range(5):
        torch.rand(7)
        other.append(next(stream))
    assert_equal(one, other)
    if train:
        # seed 3's second pass is neither seed 4's first nor seed 2's third
        for seed in 2, 4:
            passes = list(islice(endless(make(kind, train=True, seed=seed)), 9))
            assert all(differ(one[3:], passes[i : i + 3]) for i in (0, 3, 6))


def test_generators_of_passes_are_unrelated() -> None:
    seeds = {pass_generator(seed, number).initial_seed() for seed in range(-20, 80) for number in range(100)}
    assert len(seeds) == len({seed % 2**32 for seed in seeds}) == 10_000  # of which torch uses the low 32 bits
    assert max(seeds) < 2**63
    assert pass_generator(7, 3).initial_seed() == 0x653E83E7D95BB7BE >> 1  # what sha256sum gives
    draws = torch.stack([torch.rand(2000, generator=pass_generator(0, number)) for number in range(8)])
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.1


@KINDS
def test_an_iteration_begins_with_its_first_batch(kind: type[DeviceBatches]) -> None:
    batches, same = make(kind, train=True), make(kind, train=True)
    first = iter(batches)
    assert batches.state_dict() == same.state_dict()
    next(first)
    state = batches.state_dict()
    second = iter(batches)
    assert batches.state_dict() == state
    assert batches.state_dict()["position"] == 1
    expected = list(islice(endless(same), 6))
    assert_equal([next(first)], expected[1:2])  # the pass under way is not disturbed
    assert_equal(list(second), expected[3:])  # and abandoned now: the next one starts


@KINDS
@MODES
def test_a_pass_draws_once(kind: type[DeviceBatches], train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, drawn = make(kind, train=train), []
    draw = batches.draw
    monkeypatch.setattr(batches, "draw", lambda generator: drawn.append(1) or draw(generator))
    for number in 1, 2:
        for _ in batches:
            kept = kind is SpeechBatches and not train  # evaluation's features are made once
            assert len(drawn) == (1 if kept else number)


def test_features_of_evaluation_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make(SpeechBatches, train=False)
    next(iter(batches))  # a pass that is broken off
    first = list(batches)
    monkeypatch.setattr(batches, "make", None)
    assert_equal(list(batches), first)
    assert_equal(first, list(make(SpeechBatches, train=False)))


# --- resume


@KINDS
@MODES
def test_resume_is_exact_everywhere(kind: type[DeviceBatches], train: bool, tmp_path: Path) -> None:
    batches = make(kind, train=train)
    stream, n = endless(batches), len(batches)
    states = [batches.state_dict()]
    expected = []
    for _ in range(4 * n):
        expected.append(next(stream))
        torch.save(batches.state_dict(), tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(type(value) is int for state in states for value in state.values())
    for taken in range(2 * n + 1):
        resumed = make(kind, train=train)
        resumed.load_state_dict(states[taken])
        assert resumed.state_dict() == states[taken] == {**states[0], "pass": taken // n, "position": taken % n}
        assert_equal(list(resumed), expected[taken : taken - taken % n + n])  # what is left of the pass
        assert_equal(list(resumed), expected[taken - taken % n + n :][:n])
        resumed.load_state_dict(states[1])  # also back, in an object that has been used
        assert_equal(list(islice(endless(resumed), n)), expected[1 : n + 1])


@KINDS
def test_a_finished_iteration_stands_at_the_next_pass(kind: type[DeviceBatches]) -> None:
    batches = make(kind, train=True)
    last = list(batches)[-1]
    state = batches.state_dict()
    assert (state["pass"], state["position"]) == (1, 0)
    resumed = make(kind, train=True)
    resumed.load_state_dict(state)
    assert_equal(list(resumed), list(batches))
    resumed.load_state_dict({**state, "pass": 0, "position": 2})
    assert_equal(list(resumed), [last])


@KINDS
def test_a_loaded_state_counts_once(kind: type[DeviceBatches]) -> None:
    expected = list(islice(endless(make(kind, train=True)), 6))
    batches = make(kind, train=True)
    batches.load_state_dict({**batches.state_dict(), "position": 1})
    iter(batches)  # asked for nothing
    assert_equal([next(iter(batches))], expected[1:2])
    assert_equal(list(batches), expected[3:])


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 15}, "saved state has examples 15, this .*Batches has 14: resume with the data"),
        ({"batch_size": 2}, "saved state has batch_size 2, this .*Batches has 4: .*batch size and seed it was saved"),
        ({"seed": 1}, "saved state has seed 1, this .*Batches has 0: .*seed it was saved with"),
        ({"position": 3}, r"position must be a whole number in 0\.\.2, got 3: load what state_dict"),
        ({"position": -1}, "position must be .* got -1"),
        ({"position": 1.0}, r"position must be .* got 1\.0"),
        ({"pass": -1}, "pass must be .* got -1"),
        ({"pass": None}, "pass must be .* got None"),
    ],
)
def test_refuses_other_states(kind: type[DeviceBatches], change: dict, message: str) -> None:
    batches = make(kind, train=True)
    next(iter(batches))
    before = batches.state_dict()
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**make(kind, train=True).state_dict(), **change})
    for key in before:
        with pytest.raises(ValueError, match=rf"the state lacks {key}: load what state_dict\(\) of a {kind.__name__}"):
            batches.load_state_dict({name: value for name, value in before.items() if name != key})
    assert batches.state_dict() == before


# --- ranks


@KINDS
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [48, 12])
def test_ranks_share_the_batches_of_training(kind: type[DeviceBatches], world: int, batch_size: int) -> None:
    settings = {"count": 110, "batch_size": batch_size, "train": True, "seed": 5}
    alone, ranks = make(kind, **settings), [make(kind, **settings, rank=r, world=world) for r in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)} == {110 // batch_size}
    for whole, *parts in zip(chain(alone, alone), *(chain(rank, rank) for rank in ranks), strict=True):
        assert {len(y) for _, y in parts} == {batch_size // world}
        assert {str(rank.state_dict()) for rank in ranks} == {str(alone.state_dict())}
        assert torch.equal(torch.cat([y for _, y in parts]), whole[1])
        features = torch.cat([x for x, _ in parts])
        # Features are computed eight clips at a time: other eights may round differently.
        tolerance = 1e-4 if kind is SpeechBatches and batch_size // world % 8 else 0
        torch.testing.assert_close(features, whole[0], atol=tolerance, rtol=0)


@KINDS
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_evaluation_without_a_remainder(kind: type[DeviceBatches], world: int) -> None:
    whole = list(make(kind, train=False, seed=2))
    ranks = [make(kind, train=False, seed=2, rank=r, world=world) for r in range(world)]
    for r, rank in enumerate(ranks):
        assert len(rank) == len(whole[r::world])
        for _ in range(2):
            assert_equal(list(rank), whole[r::world])
    assert sum(len(y) for rank in ranks for _, y in rank) == 14
    if world == 5:
        empty = make(kind, train=False, seed=2, rank=4, world=5)
        empty.load_state_dict(ranks[4].state_dict())
        assert len(empty) == 0
        assert list(empty) == []


@KINDS
def test_another_number_of_ranks_goes_on(kind: type[DeviceBatches]) -> None:
    settings = {"count": 40, "batch_size": 12, "train": True}
    two = make(kind, **settings, rank=1, world=2)
    next(iter(two))
    three = [make(kind, **settings, rank=r, world=3) for r in range(3)]
    for rank in three:
        rank.load_state_dict(two.state_dict())
    got = torch.cat([next(iter(rank))[1] for rank in three])
    assert torch.equal(got, list(make(kind, **settings))[1][1])


@KINDS
def test_refuses_what_ranks_cannot_share(kind: type[DeviceBatches]) -> None:
    with pytest.raises(ValueError, match=r"3 ranks cannot share batches of 4 evenly: .* such as 6, or another number"):
        make(kind, train=True, rank=0, world=3)
    make(kind, train=False, rank=0, world=3)
    for rank, world in (2, 2), (-1, 2), (0, 0):
        with pytest.raises(ValueError, match=rf"a rank in 0\.\.world - 1, got rank {rank} of world {world}"):
            make(kind, train=True, rank=rank, world=world)
    with pytest.raises(ValueError, match=rf"{kind.__name__} needs a batch_size of at least 1, got 0"):
        make(kind, train=True, batch_size=0)


def test_refuses_less_than_one_batch() -> None:
    with pytest.raises(ValueError, match="8 examples make no batch of 9: use a smaller batch_size"):
        make(CifarBatches, count=8, batch_size=9, train=True)


@KINDS
def test_splits_of_a_rank(kind: type[DeviceBatches], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {SpeechBatches: "kws-res8-narrow-w4-p90", CifarBatches: "cifar100-resnet32-w4-p90"}[kind]
    recipe = load_recipe(recipe, ["data.batch_size=4"])
    words = SpeechCommands(clips(14), clips(9), clips(6), recordings())
    images = Cifar(pictures(14), pictures(9), pictures(6), ("a",))
    monkeypatch.setattr(load, "load_speech_commands", lambda root, **_: words)
    monkeypatch.setattr(load, "load_cifar100", lambda root, **_: images)
    alone, *ranks = (load.load_splits(recipe, ".", rank=r, world=w) for r, w in ((0, 1), (0, 2), (1, 2)))
    for whole, *parts in zip(alone.train(3), *(rank.train(3) for rank in ranks), strict=True):
        assert torch.equal(torch.cat([y for _, y in parts]), whole[1])
    for split in "validation", "testing":
        for r, rank in enumerate(ranks):
            assert_equal(list(getattr(rank, split)), list(getattr(alone, split))[r::2])
    assert ranks[1].sizes == {"train": 14, "validation": 9, "testing": 6}


@KINDS
def test_a_fingerprint_is_that_of_the_data_and_of_nothing_else(
    kind: type[DeviceBatches], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {SpeechBatches: "kws-res8-narrow-w4-p90", CifarBatches: "cifar100-resnet32-w4-p90"}[kind]
    monkeypatch.setattr(load, "load_speech_commands", lambda root, **_: data)
    monkeypatch.setattr(load, "load_cifar100", lambda root, **_: data)

    def made() -> SpeechCommands | Cifar:
        if kind is SpeechBatches:
            return SpeechCommands(clips(14), clips(9), clips(6), recordings())
        return Cifar(pictures(14), pictures(9), pictures(6), ("a",))

    def fingerprint(*settings: str, **ranks: int) -> str:
        return load.load_splits(load_recipe(name, ["data.batch_size=4", *settings]), ".", **ranks).fingerprint

    data = made()
    values = "clips" if kind is SpeechBatches else "images"
    expected = fingerprint()
    assert len(expected) == 16
    data = made()
    assert fingerprint("data.batch_size=6", "seed=5", "pqk.bits=2") == fingerprint(rank=1, world=2) == expected
    others = {expected}
    for split in ("train", "validation", "testing"):
        data = made()
        getattr(data, split).labels[2] = 0
        others.add(fingerprint())
        data = made()
        getattr(getattr(data, split), values)[3].flatten()[7] ^= 1
        others.add(fingerprint())
        data = made()
        getattr(data, split).labels[[1, 2]] = getattr(data, split).labels[[2, 1]]
        getattr(getattr(data, split), values)[[1, 2]] = getattr(getattr(data, split), values)[[2, 1]]
        others.add(fingerprint())
    assert len(others) == 10
    data = made()
    if isinstance(data, Cifar):
        data = replace(data, validation=pictures(0))
    else:
        data.noise.samples[5] += 1
    assert fingerprint() not in others


# --- devices


@KINDS
@MODES
def test_no_value_is_read_on_the_device(
    kind: type[DeviceBatches], train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values, and raise where one is asked for; the draws are those of the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    meta, cpu = make(kind, train=train, device="meta"), make(kind, train=train)
    for one, other in zip(*(batches.draw(pass_generator(0, 1)) for batches in (meta, cpu)), strict=True):
        assert torch.equal(one, other)
    for (x, y), (x_cpu, y_cpu) in zip(meta, cpu, strict=True):
        assert (x.device.type, y.device.type) == ("meta", "meta")
        assert (x.shape, x.dtype, y.shape, y.dtype) == (x_cpu.shape, x_cpu.dtype, y_cpu.shape, y_cpu.dtype)


@pytest.mark.gpu
@KINDS
@MODES
def test_the_same_batches_on_the_gpu_without_waiting(kind: type[DeviceBatches], train: bool) -> None:
    gpu = make(kind, count=40, batch_size=12, train=train, device="cuda")
    list(gpu)  # FFT plans are made
    got = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += gpu
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = list(islice(endless(make(kind, count=40, batch_size=12, train=train)), len(gpu), 2 * len(gpu)))
    for (x, y), (x_expected, y_expected) in zip(got, expected, strict=True):
        torch.testing.assert_close(x.cpu(), x_expected, atol=1e-3, rtol=0)
        assert torch.equal(y.cpu(), y_expected)
