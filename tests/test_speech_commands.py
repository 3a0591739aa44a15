"""Reading, splitting and downloading, on tiny data sets made here and, where given, on real clips."""

import hashlib
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from pqk_fast.data import speech_commands
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import (
    CLIP_SAMPLES,
    KEYWORDS,
    LABELS,
    Noise,
    SpeechSet,
    download_speech_commands,
    load_speech_commands,
    load_word_folders,
    read_wav,
    which_split,
)


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 16_000, channels: int = 1, width: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype({1: "u1", 2: "<i2", 4: "<i4"}[width]).tobytes())
    return path


def tone(seed: int, length: int = CLIP_SAMPLES) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = 8000 * np.sin(2 * np.pi * rng.uniform(200, 2000) * np.arange(length) / 16_000) + rng.normal(0, 300, length)
    return np.where(np.round(wave) == 0, 1, np.round(wave)).astype(np.int16)  # no zeros but those of the padding


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten keywords and two other words, per word 6 training, 2 validation and 2 testing clips; two noises."""
    root = tmp_path / "speech"
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for number, word in enumerate((*KEYWORDS, "bed", "marvin")):
        for clip in range(10):
            name = f"{word}/{clip:08x}_nohash_0.wav"
            write_wav(root / name, tone(100 * number + clip, {0: 12_000, 1: 17_000}.get(clip, CLIP_SAMPLES)))
            if clip >= 6:
                lists["validation_list.txt" if clip < 8 else "testing_list.txt"].append(name)
    for file, names in lists.items():
        (root / file).write_text("".join(f"{name}\n" for name in names))
    for number, length in enumerate((20_000, 30_000)):
        write_wav(root / "_background_noise_" / f"{number}.wav", np.full(length, 10_000 * (-1) ** number))
    (root / "README.md").write_text("not a word")
    return root


# ---- reading


def test_labels():
    assert " ".join(LABELS) == "silence unknown yes no up down left right on off stop go"


def test_short_clips_are_padded_at_the_end_and_long_ones_cut(root: Path):
    data = load_speech_commands(root)
    short, long = (data.train.names.index(f"yes/{i:08x}_nohash_0.wav") for i in (0, 1))
    assert data.train.clips[short, :12_000].numpy().tolist() == tone(0, 12_000).tolist()
    assert data.train.clips[short, 12_000:].eq(0).all()
    assert data.train.clips[long].numpy().tolist() == tone(1, 17_000)[:CLIP_SAMPLES].tolist()
    assert (data.train.clips.dtype, data.train.labels.dtype) == (torch.int16, torch.int64)


def test_noise_keeps_its_bounds(root: Path):
    noise = load_speech_commands(root).noise
    assert noise.bounds == [0, 20_000, 50_000]
    assert noise.samples[:20_000].eq(10_000).all()
    assert noise.samples[20_000:].eq(-10_000).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 8000}, "1 channel.*16 bits, 8000 Hz"),
        ({"channels": 2}, "2 channel"),
        ({"width": 1}, "8 bits"),
        ({"width": 4}, "32 bits"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, settings: dict[str, int], message: str):
    path = write_wav(tmp_path / "clip.wav", np.ones(1600), **settings)
    with pytest.raises(ValueError, match=f"clip.wav: expected mono 16-bit.*{message}.*convert it"):
        read_wav(path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "inside its header"),
        (20, "inside its header"),
        (44, "file has 0"),
        (1000, "promises 16000 samples.*has 478"),
    ],
)
def test_cut_files_are_refused(tmp_path: Path, keep: int, message: str):
    path = write_wav(tmp_path / "clip.wav", tone(0))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"clip.wav: .*{message}"):
        read_wav(path)


def test_foreign_and_empty_files_are_refused(tmp_path: Path):
    (tmp_path / "clip.wav").write_bytes(b"fLaC" + bytes(1000))
    with pytest.raises(ValueError, match=r"clip\.wav: expected a PCM WAV file.*RIFF"):
        read_wav(tmp_path / "clip.wav")
    with pytest.raises(ValueError, match="promises 0 samples"):
        read_wav(write_wav(tmp_path / "clip.wav", np.zeros(0)))


def test_one_bad_clip_is_named(root: Path):
    (root / "go" / "00000003_nohash_0.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"go.00000003_nohash_0\.wav"):
        load_speech_commands(root)


# ---- splits


def test_splits_follow_the_lists(root: Path):
    data = load_speech_commands(root)
    for part, clips in (data.train, range(6)), (data.validation, (6, 7)), (data.testing, (8, 9)):
        expected = {f"{word}/{clip:08x}_nohash_0.wav": word for word in KEYWORDS for clip in clips}
        names = {name: LABELS[label] for name, label in zip(part.names, part.labels.tolist(), strict=True) if label > 1}
        assert names == expected
        assert part.counts()["silence"] == part.counts()["unknown"] == len(expected) // 10
        assert part.clips[part.labels == 0].eq(0).all()


@pytest.mark.parametrize(("fraction", "train"), [(0.0, 0), (0.05, 3), (0.19, 11), (0.2, 12), (5.0, 12)])
def test_unknown_fraction(root: Path, fraction: float, train: int):
    data = load_speech_commands(root, unknown_fraction=fraction, silence_fraction=0)
    assert data.train.counts()["unknown"] == train
    assert data.train.counts()["silence"] == 0
    words = {n.split("/")[0] for n, label in zip(data.train.names, data.train.labels, strict=True) if label == 1}
    assert words <= {"bed", "marvin"}


def test_unknown_clips_depend_on_seed_and_names_alone(root: Path):
    def unknown(seed: int) -> set[str]:
        part = load_speech_commands(root, seed=seed).train
        return {name for name, label in zip(part.names, part.labels, strict=True) if label == 1}

    first = unknown(0)
    assert unknown(0) == first
    assert len({frozenset(unknown(seed)) for seed in range(4)}) > 1
    rest = {f"{w}/{c:08x}_nohash_0.wav" for w in ("bed", "marvin") for c in range(6)} - first
    (root / min(rest)).unlink()
    assert unknown(0) == first


@pytest.mark.parametrize(
    "speaker", ["0a7c2a8d", "022cd682", "f9643d42", "a6f2fd71", "3eb8764c", "00000001", "jackhammer"]
)
def test_sha1_rule(speaker: str):
    # SHA1's last 27 bits against tenths of 2^27 - 1, in integers.
    bits = int.from_bytes(hashlib.sha1(speaker.encode()).digest()[-4:], "big") % 2**27
    expected = "validation" if 10 * bits < 2**27 - 1 else "testing" if 5 * bits < 2**27 - 1 else "train"
    assert which_split(f"bed/{speaker}_nohash_0.wav") == which_split(f"{speaker}_nohash_13.wav") == expected


def test_sha1_rule_gives_tenths():
    speakers = [f"{i:08x}" for i in range(4000)]
    splits = [which_split(f"{speaker}_nohash_0.wav") for speaker in speakers]
    assert abs(splits.count("validation") - 400) < 80
    assert abs(splits.count("testing") - 400) < 80


def test_without_lists_the_sha1_rule_decides(root: Path):
    for file in ("validation_list.txt", "testing_list.txt"):
        (root / file).unlink()
    speakers = {split: [s for s in (f"{i:08x}" for i in range(100)) if which_split(s) == split] for split in
                ("train", "validation", "testing")}  # fmt: skip
    for word in KEYWORDS:
        for path in (root / word).iterdir():
            path.unlink()
        for split in speakers:
            write_wav(root / word / f"{speakers[split][0]}_nohash_0.wav", tone(0))
    data = load_speech_commands(root)
    for split, names in speakers.items():
        part = getattr(data, split)
        assert {n for n, label in zip(part.names, part.labels, strict=True) if label > 1} == {
            f"{word}/{names[0]}_nohash_0.wav" for word in KEYWORDS
        }


def test_word_folders_take_every_clip(root: Path):
    everything = load_word_folders(root)
    assert everything.counts() == dict(zip(LABELS, [0, 20] + [10] * 10, strict=True))
    features, labels = zip(*SpeechBatches(everything, None, train=False), strict=True)
    assert torch.cat(features).shape == (120, 101, 40)
    assert torch.equal(torch.cat(labels), everything.labels)


# ---- what can be missing


def test_missing_folder(tmp_path: Path):
    for load in load_speech_commands, load_word_folders:
        with pytest.raises(FileNotFoundError, match=r"no such folder.*download=True"):
            load(tmp_path / "nowhere")


def test_missing_keywords_are_named(root: Path):
    for word in "stop", "go":
        (root / word).rename(root / f"_{word}")
    for load in load_speech_commands, load_word_folders:
        with pytest.raises(FileNotFoundError, match="missing: stop, go"):
            load(root)


def test_missing_noise(root: Path):
    (root / "_background_noise_").rename(root / "_elsewhere")
    with pytest.raises(FileNotFoundError, match="_background_noise_"):
        load_speech_commands(root)


def test_short_noise_is_named(root: Path):
    write_wav(root / "_background_noise_" / "tap.wav", tone(0, 15_999))
    with pytest.raises(ValueError, match=r"tap\.wav: expected at least 1 s"):
        load_speech_commands(root)


def test_one_list_alone_or_an_empty_split(root: Path):
    (root / "testing_list.txt").write_text("")
    with pytest.raises(ValueError, match="no keyword clip falls into the testing split"):
        load_speech_commands(root)
    (root / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"validation_list\.txt alone"):
        load_speech_commands(root)


def test_negative_fraction(root: Path):
    with pytest.raises(ValueError, match="0 or more"):
        load_speech_commands(root, unknown_fraction=-0.1)


@pytest.mark.parametrize("bounds", [[0], [0, 10_000, 36_000], [0, 36_001], [1_000, 36_000]])
def test_wrong_noise_bounds(bounds: list[int]):
    with pytest.raises(ValueError, match="bounds"):
        Noise(torch.zeros(36_000, dtype=torch.int16), bounds)


def test_wrong_clips():
    with pytest.raises(ValueError, match=r"int16 clips \[2, 16000\]"):
        SpeechSet(torch.zeros(2, 8000, dtype=torch.int16), torch.zeros(2, dtype=torch.int64), ["", ""])


# ---- download


def test_download(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, ".")
    monkeypatch.setattr(speech_commands, "ARCHIVE_URL", archive.as_uri())
    monkeypatch.setattr(speech_commands, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    target = tmp_path / "new" / "speech"
    data = load_speech_commands(target, download=True)
    assert torch.equal(data.train.clips, load_speech_commands(root).train.clips)
    assert [path.name for path in target.parent.iterdir()] == ["speech"]
    archive.unlink()
    load_speech_commands(target, download=True)  # it is there: nothing is fetched
    with pytest.raises(FileExistsError, match="not an empty folder"):
        download_speech_commands(target)


def test_a_broken_download_leaves_nothing(tmp_path: Path):
    (tmp_path / "archive").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="expected SHA-256"):
        download_speech_commands(tmp_path / "speech", url=(tmp_path / "archive").as_uri())
    with pytest.raises(ConnectionError, match="fetch it by other means"):
        download_speech_commands(tmp_path / "speech", url=(tmp_path / "nothing").as_uri())
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


# ---- real clips


@pytest.mark.slow
def test_real_clips(real_speech: Path):
    data = load_speech_commands(real_speech, unknown_fraction=1.0)
    assert (len(data.validation), len(data.testing)) == (685, 1345)
    assert len(load_word_folders(real_speech)) == 5955
    splits = data.train, data.validation, data.testing
    speakers = [{n.split("/")[1].split("_nohash_")[0] for n in s.names if n != "silence"} for s in splits]
    assert not speakers[0] & speakers[1]
    assert not (speakers[0] | speakers[1]) & speakers[2]
    features, labels = next(iter(SpeechBatches(data.train, data.noise, train=True)))
    assert features.shape == (64, 101, 40)
    assert features.isfinite().all()
    assert labels.unique().numel() > 5
