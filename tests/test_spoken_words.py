"""Spoken words: what is made, that it can be made again, and that it survives a trip through the folder layout."""

import builtins
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import package

from pqk_fast.data import spoken_words
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import (
    KEYWORDS,
    LABELS,
    SpeechCommands,
    load_speech_commands,
    load_word_folders,
)
from pqk_fast.data.spoken_words import (
    ESPEAK_RATE,
    OTHER_WORDS,
    VARIANTS,
    Synthesizer,
    make_spoken_words,
    resample,
    write_spoken_words,
)


@pytest.fixture(scope="module")
def data() -> SpeechCommands:
    package("espeakng_loader")
    return make_spoken_words(speakers=(4, 2, 3), noise_seconds=6, seed=1)


def speakers(data: SpeechCommands, split: str) -> set[str]:
    return {n.split("/")[1].split("_nohash_")[0] for n in getattr(data, split).names if n != "silence"}


def test_counts(data: SpeechCommands):
    for split, count in zip(("train", "validation", "testing"), (4, 2, 3), strict=True):
        part = getattr(data, split)
        expected = [2 * count, 2 * count, *[2 * count] * 10]
        assert part.counts() == dict(zip(LABELS, expected, strict=True))
        assert len(part.names) == len(part) == len(part.clips)
        assert len(set(part.names)) == len(part) - 2 * count + 1
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            word = name.split("/")[0]
            assert word == LABELS[label] if label != 1 else word in OTHER_WORDS


def test_speakers_and_voices_are_disjoint(data: SpeechCommands):
    sets = [speakers(data, split) for split in VARIANTS]
    assert [len(s) for s in sets] == [4, 2, 3]
    assert len(set.union(*sets)) == 9
    voices = [voice for variants in VARIANTS.values() for voice in variants]
    assert len(voices) == len(set(voices))


def test_clips_can_be_heard(data: SpeechCommands):
    spoken = data.train.labels > 0
    clips = data.train.clips.float() / 32768
    peaks = clips[spoken].abs().amax(1)
    assert peaks.min() > 0.05
    assert peaks.max() < 0.99
    assert clips[~spoken].eq(0).all()
    # Speech comes and goes: where the clip is loud lasts between a twentieth and nine tenths of it.
    level = clips[spoken].unfold(1, 400, 400).square().mean(-1).sqrt()
    loud = (level > 0.2 * level.amax(1, keepdim=True)).float().mean(1)
    assert loud.min() > 0.05
    assert loud.max() < 0.9
    assert 0.15 < loud.mean() < 0.6


def test_background_noise(data: SpeechCommands):
    assert data.noise.bounds == [96_000 * i for i in range(6)]
    recordings = data.noise.samples.view(5, -1).float() / 32768
    torch.testing.assert_close(recordings.square().mean(1).sqrt(), torch.full((5,), 0.25), atol=0.02, rtol=0)
    power = torch.fft.rfft(recordings).abs().square()
    low, high = power[:, 600:6_000].mean(1), power[:, 24_000:].mean(1)  # 100 to 1 000 Hz, 4 000 to 8 000 Hz
    assert 0.8 < low[0] / high[0] < 1.2
    assert 5 < low[1] / high[1] < 50
    assert low[2] / high[2] > 50


def test_the_same_seed_makes_the_same_samples(data: SpeechCommands):
    Synthesizer().voice("en", "f1")  # another user of the library in between
    again = make_spoken_words(speakers=(4, 2, 3), noise_seconds=6, seed=1)
    for split in VARIANTS:
        one, two = getattr(data, split), getattr(again, split)
        assert one.names == two.names
        # The FFT may round differently where memory is aligned differently, which can move a sample by one.
        assert (one.clips.int() - two.clips.int()).abs().max() <= 1
    assert (data.noise.samples.int() - again.noise.samples.int()).abs().max() <= 1
    other = make_spoken_words(speakers=(4, 2, 3), noise_seconds=6, seed=2)
    assert not torch.equal(other.train.clips, data.train.clips)


def test_progress_and_fractions():
    package("espeakng_loader")
    seen: list[tuple[int, int]] = []
    data = make_spoken_words(
        speakers=(2, 1, 1),
        repeats=1,
        unknown_fraction=0.5,
        silence_fraction=0,
        noise_seconds=6,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert data.train.counts()["unknown"] == 10
    assert data.train.counts()["silence"] == 0


def test_folders_hold_the_same_clips(data: SpeechCommands, tmp_path: Path):
    root = tmp_path / "words"
    write_spoken_words(data, root)
    loaded = load_speech_commands(root)
    for split in VARIANTS:
        made, read = getattr(data, split), getattr(loaded, split)
        assert read.counts() == made.counts()
        clips = dict(zip(made.names, made.clips, strict=True))
        assert all(torch.equal(clip, clips[name]) for name, clip in zip(read.names, read.clips, strict=True))
    assert torch.equal(loaded.noise.samples, data.noise.samples)
    assert loaded.noise.bounds == data.noise.bounds
    assert len(load_word_folders(root)) == 9 * 22
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_spoken_words(data, root)


def test_batches(data: SpeechCommands):
    features, labels = next(iter(SpeechBatches(data.train, data.noise, batch_size=16, train=True)))
    assert features.shape == (16, 101, 40)
    assert features.isfinite().all()
    assert labels.max() < len(LABELS)


def test_synthesizer():
    package("espeakng_loader")
    first, second = Synthesizer(), Synthesizer()
    for synthesizer in first, second:
        synthesizer.voice("en-us", "f3")
    slow, fast = (first.say("marvin", rate=rate, pitch=50) for rate in (120, 240))
    assert 0.3 * ESPEAK_RATE < len(slow) < 1.2 * ESPEAK_RATE
    assert len(fast) < 0.8 * len(slow)
    assert np.array_equal(second.say("marvin", rate=120, pitch=50), slow)  # whatever the first has said meanwhile
    with pytest.raises(RuntimeError, match=r"no voice en\+nobody"):
        first.voice("en", "nobody")
    with pytest.raises(RuntimeError, match="said nothing"):
        first.say(" ", rate=120, pitch=50)
    first.close()


def test_every_voice_exists():
    package("espeakng_loader")
    synthesizer = Synthesizer()
    for variants in VARIANTS.values():
        for variant in variants:
            for accent in spoken_words.ACCENTS:
                synthesizer.voice(accent, variant)


def test_resampling_keeps_a_tone():
    time = torch.arange(22_050, dtype=torch.float64) / 22_050
    envelope = torch.sin(math.pi * time) ** 4
    tone = envelope * torch.sin(2 * math.pi * 1_000 * time)
    expected_time = torch.arange(16_000, dtype=torch.float64) / 16_000
    expected = torch.sin(math.pi * expected_time) ** 4 * torch.sin(2 * math.pi * 1_000 * expected_time)
    torch.testing.assert_close(resample(tone, 16_000), expected, atol=1e-4, rtol=0)
    above = envelope * torch.sin(2 * math.pi * 9_000 * time)
    assert resample(above, 16_000).abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"speakers": (0, 1, 1)},
        {"speakers": (1, 1)},
        {"repeats": 0},
        {"noise_seconds": 5},
        {"unknown_fraction": -1},
        {"silence_fraction": -1},
    ],
)
def test_settings_out_of_range(settings: dict):
    with pytest.raises(ValueError, match=r"needs three speaker counts|fractions must be 0 or more"):
        make_spoken_words(**settings)


def test_without_espeak_the_command_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str, *args, **kwargs):
        if name == "espeakng_loader":
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        make_spoken_words(speakers=(1, 1, 1))


def test_keywords_are_spoken_by_everyone(data: SpeechCommands):
    for split in VARIANTS:
        said = {tuple(n.split("/")) for n in getattr(data, split).names if n != "silence"}
        for speaker in speakers(data, split):
            assert {(word, f"{speaker}_nohash_{i}.wav") for word in KEYWORDS for i in (0, 1)} <= said
