"""Reading, splitting, augmenting and resuming, on tiny data sets made here and, where given, on real clips."""

import hashlib
import os
import subprocess
import sys
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from pqk_fast.data import speech_commands
from pqk_fast.data.features import MFCC
from pqk_fast.data.speech_commands import (
    CLIP_SAMPLES,
    KEYWORDS,
    LABELS,
    Noise,
    SpeechBatches,
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


def some_set(labels: list[int], clips: torch.Tensor | None = None) -> SpeechSet:
    if clips is None:
        clips = torch.stack([torch.from_numpy(tone(i)) for i in range(len(labels))])
    return SpeechSet(clips, torch.tensor(labels), [str(i) for i in range(len(labels))])


def two_noises() -> Noise:
    return Noise(
        torch.cat([torch.full((20_000,), 10_000), torch.full((16_000,), -20_000)]).short(), [0, 20_000, 36_000]
    )


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


# ---- batches


def test_training_batches():
    batches = SpeechBatches(some_set([0, 1, 2, 3, 4, 5, 6]), two_noises(), batch_size=3, train=True)
    assert len(batches) == 2
    first, second = list(batches), list(batches)
    assert [(x.shape, x.dtype, y.dtype) for x, y in first] == [((3, 101, 40), torch.float32, torch.int64)] * 2
    seen = torch.cat([y for _, y in first]).tolist()
    assert len(set(seen)) == 6
    assert seen != torch.cat([y for _, y in second]).tolist()
    assert not first[0][0].requires_grad


def test_a_small_split_is_one_batch():
    batches = SpeechBatches(some_set([2, 3]), two_noises(), train=True)
    assert [len(y) for _, y in batches] == [2]
    assert len(batches) == 1


def test_the_seed_decides_everything():
    def run(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        torch.rand(seed + 1)  # the global generator has no say
        return list(SpeechBatches(some_set([*range(12)]), two_noises(), batch_size=4, train=True, seed=seed))

    for (x, y), (x2, y2) in zip(run(3), run(3), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(run(3)[0][0], run(4)[0][0])


def test_batches_are_the_features_of_the_waveforms():
    batches = SpeechBatches(some_set([*range(12)] * 2), two_noises(), batch_size=20, train=True, seed=5)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(24, generator=generator)[:20]
    expected = MFCC()(batches.waveforms(order, generator))
    features, labels = next(iter(batches))
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
    assert torch.equal(labels, order % 12)


def test_shift_moves_zeros_in():
    # Neighbours in memory are full of sound: a window that reached into them would not be zero.
    data = some_set([2, 3, 4])
    batches = SpeechBatches(data, None, train=True, noise_probability=0)
    index = torch.arange(3).repeat(300)
    waves = (batches.waveforms(index, torch.Generator().manual_seed(0)) * 32768).short()
    shifts = []
    for clip, moved in zip(data.clips[index], waves, strict=True):
        kept = moved.nonzero().flatten()
        start, end = int(kept[0]), int(kept[-1]) + 1
        shift = start if start else end - CLIP_SAMPLES
        assert torch.equal(moved[start:end], clip[max(0, -shift) : CLIP_SAMPLES - max(0, shift)])
        shifts.append(shift)
    assert -1600 <= min(shifts) < -1550
    assert 1550 < max(shifts) <= 1600
    assert abs(np.mean(shifts)) < 150


def test_noise_probability_amplitude_and_recordings():
    noise = Noise(torch.cat([torch.full((20_000,), 1), torch.full((16_000,), 3)]).short() * 8192, [0, 20_000, 36_000])
    silent = torch.zeros(2, CLIP_SAMPLES, dtype=torch.int16)
    batches = SpeechBatches(some_set([0, 5], silent), noise, train=True)
    index = torch.arange(2).repeat(1000)
    waves = batches.waveforms(index, torch.Generator().manual_seed(0))
    assert (waves == waves[:, :1]).all()  # each excerpt lies in one recording
    silence, word = waves[0::2, 0], waves[1::2, 0]
    assert (silence > 0).float().mean() > 0.995
    assert abs((word > 0).float().mean() - 0.8) < 0.05
    assert 0.07 < waves.max() <= 0.075  # a tenth of 3 * 8192 / 32768
    # Half of the excerpts come from the louder recording, although the quieter one is longer.
    assert abs(silence.mean() - 0.05 * (0.25 + 0.75) / 2) < 0.003


def test_the_sum_is_clamped():
    loud = torch.tensor([[32767], [-32768]], dtype=torch.int16).repeat(1, CLIP_SAMPLES)
    noise = Noise(torch.full((CLIP_SAMPLES,), 32767, dtype=torch.int16), [0, CLIP_SAMPLES])
    batches = SpeechBatches(some_set([2, 3], loud), noise, train=True, shift_ms=0, noise_probability=1)
    waves = batches.waveforms(torch.arange(2), torch.Generator().manual_seed(0))
    assert waves[0].eq(1).all()
    assert waves[1].gt(-1).all()


def test_evaluation_batches():
    data, noise = some_set([2, 0, 3, 0, 4], None), two_noises()
    data.clips[data.labels == 0] = 0
    batches = SpeechBatches(data, noise, batch_size=2, train=False)
    assert len(batches) == 3
    first, second = list(batches), list(batches)
    assert [len(y) for _, y in first] == [2, 2, 1]
    assert torch.equal(torch.cat([y for _, y in first]), data.labels)
    features = torch.cat([x for x, _ in first])
    assert torch.equal(features, torch.cat([x for x, _ in second]))
    words = data.labels > 0
    torch.testing.assert_close(features[words], MFCC()(data.clips[words].float() / 32768), atol=1e-4, rtol=0)
    assert features[~words].ne(0).any(dim=(1, 2)).all()
    again = torch.cat([x for x, _ in SpeechBatches(data, noise, batch_size=5, train=False)])
    assert torch.equal(again[words], features[words])
    other = torch.cat([x for x, _ in SpeechBatches(data, noise, batch_size=2, train=False, seed=1)])
    assert not torch.equal(other[~words], features[~words])


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 5, 7])
def test_exact_resume(taken: int, tmp_path: Path):
    def make() -> SpeechBatches:
        return SpeechBatches(some_set([*range(12)] * 2), two_noises(), batch_size=5, train=True)

    def endless(batches: SpeechBatches):
        while True:
            yield from batches

    batches = make()
    stream = endless(batches)
    for _ in range(taken):
        next(stream)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = [next(stream) for _ in range(9)]
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for (x, y), (x2, y2) in zip(expected, endless(resumed), strict=False):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_a_new_iteration_is_a_new_pass():
    batches = SpeechBatches(some_set([*range(12)]), two_noises(), batch_size=4, train=True)
    next(iter(batches))
    assert len(list(batches)) == 3


def test_wrong_state():
    batches = SpeechBatches(some_set([*range(12)]), two_noises(), batch_size=4, train=True)
    state = batches.state_dict()
    with pytest.raises(ValueError, match="batch 4, a pass here has 3"):
        batches.load_state_dict(state | {"position": 4})
    with pytest.raises(ValueError, match=r"lacks \['generator'\]"):
        batches.load_state_dict({k: v for k, v in state.items() if k != "generator"})


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"noise_probability": 1.5}, {"noise_amplitude": -0.1}, {"shift_ms": -1}, {"shift_ms": 1001}],
)
def test_settings_out_of_range(settings: dict[str, float]):
    with pytest.raises(ValueError, match="SpeechBatches needs"):
        SpeechBatches(some_set([2]), two_noises(), train=True, **settings)


def test_empty_split_and_missing_noise():
    empty = SpeechSet(torch.zeros(0, CLIP_SAMPLES, dtype=torch.int16), torch.zeros(0, dtype=torch.int64), [])
    with pytest.raises(ValueError, match="empty split"):
        SpeechBatches(empty, two_noises(), train=True)
    for train, labels in (True, [2]), (False, [0]):
        with pytest.raises(ValueError, match="noise=None"):
            SpeechBatches(some_set(labels), None, train=train)


# ---- real clips


@pytest.fixture(scope="session")
def real_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("PQK_FAST_DATA")
    if not folder:
        pytest.skip("set PQK_FAST_DATA to the folder of speech-*.tar and unpack.py to test on real clips")
    target = tmp_path_factory.mktemp("speech")
    subprocess.run([sys.executable, str(Path(folder) / "unpack.py"), "speech", str(target)], check=True)
    return target


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
