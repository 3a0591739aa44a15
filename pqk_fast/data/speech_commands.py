"""Speech Commands in Google's folder layout: keywords, unknown words and silence, read into memory as int16.

The data set and its split rule: Warden, "Speech Commands" (2018). The 12 classes and their proportions: honk
(github.com/castorini/honk).
"""

import hashlib
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 16_000
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
LABELS = ("silence", "unknown", *KEYWORDS)
SILENCE, UNKNOWN = 0, 1
NOISE_FOLDER = "_background_noise_"
SPLITS = ("train", "validation", "testing")
LISTS = {"validation": "validation_list.txt", "testing": "testing_list.txt"}

ARCHIVE_URL = "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz"
ARCHIVE_SHA256 = "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d"


@dataclass
class SpeechSet:
    """One split in memory. A silence example is a clip of zeros with label 0: its noise is mixed in when it is used.

    clips `[N, 16000]` int16, labels `[N]` int64 (an index into `LABELS`), names `<word>/<file>.wav` one a clip.
    """

    clips: Tensor
    labels: Tensor
    names: list[str] = field(repr=False)

    def __post_init__(self) -> None:
        if self.clips.dtype != torch.int16 or self.clips.shape != (len(self.labels), CLIP_SAMPLES):
            expected = f"int16 clips [{len(self.labels)}, {CLIP_SAMPLES}], one a label"
            raise ValueError(f"SpeechSet expects {expected}, got {self.clips.dtype} {list(self.clips.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> dict[str, int]:
        """How many clips each of the twelve labels has."""
        return dict(zip(LABELS, torch.bincount(self.labels, minlength=len(LABELS)).tolist(), strict=True))


@dataclass
class Noise:
    """Background recordings end to end: samples `[L]` int16; recording r is `samples[bounds[r] : bounds[r + 1]]`."""

    samples: Tensor
    bounds: list[int]

    def __post_init__(self) -> None:
        lengths = [end - start for start, end in pairwise(self.bounds)]
        if min(lengths, default=0) < CLIP_SAMPLES or (self.bounds[0], self.bounds[-1]) != (0, len(self.samples)):
            raise ValueError(
                f"background noise needs recordings of at least {CLIP_SAMPLES} samples whose bounds run from 0 to "
                f"{len(self.samples)}, got bounds {self.bounds}"
            )


@dataclass
class SpeechCommands:
    """The three splits and the background noise that training and silence examples draw from."""

    train: SpeechSet
    validation: SpeechSet
    testing: SpeechSet
    noise: Noise


def read_wav(path: Path) -> np.ndarray:
    """The samples of a 16-bit mono WAV file at 16 kHz as a 1-d int16 array.

    Raises ValueError naming the file where it is anything else, is cut short, or holds no sample.
    """
    remedy = "convert it (for example with `sox IN -r 16000 -c 1 -b 16 OUT`), fetch it again or remove it"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            if (channels, width, rate) != (1, 2, SAMPLE_RATE):
                raise ValueError(
                    f"{path}: expected mono 16-bit samples at {SAMPLE_RATE} Hz, "
                    f"got {channels} channel(s), {8 * width} bits, {rate} Hz; {remedy}"
                )
            data = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        # EOFError is what a file shorter than its own header gives, and it says nothing.
        reason = str(error) or "the file ends inside its header"
        raise ValueError(f"{path}: expected a PCM WAV file, but {reason}; {remedy}") from error
    if len(data) != 2 * frames or frames == 0:
        raise ValueError(f"{path}: the header promises {frames} samples, the file has {len(data) // 2}; {remedy}")
    return np.frombuffer(data, dtype="<i2").astype(np.int16, copy=False)


def which_split(file_name: str) -> str:
    """The split that Speech Commands' SHA1 rule gives a file: 80 % train, 10 % validation, 10 % testing.

    What stands before `_nohash_` names the speaker and alone decides, so no speaker is in two splits.
    """
    speaker = Path(file_name).name.split("_nohash_")[0]
    largest = 2**27 - 1  # no class may ever hold more clips than this, says the rule
    percent = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (largest + 1) * (100 / largest)
    return "validation" if percent < 10 else "testing" if percent < 20 else "train"


def _clip_names(root: Path) -> list[str]:
    """`<word>/<file>.wav` for every clip of every word, sorted."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; give one that holds a folder of WAV files a word, or download=True (1.5 GB)"
        )
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith(("_", ".")))
    missing = [word for word in KEYWORDS if not any(f.name == word for f in folders)]
    if missing:
        raise FileNotFoundError(
            f"{root}: expected a folder for each keyword, missing: {', '.join(missing)}; unpack the data set again"
        )
    return [f"{folder.name}/{path.name}" for folder in folders for path in sorted(folder.glob("*.wav"))]


def _label(name: str) -> int:
    word = name.split("/")[0]
    return LABELS.index(word) if word in KEYWORDS else UNKNOWN


def _read_set(root: Path, names: Sequence[str], silence: int = 0) -> SpeechSet:
    clips = torch.zeros(len(names) + silence, CLIP_SAMPLES, dtype=torch.int16)
    for row, name in zip(clips.numpy(), names, strict=False):
        samples = read_wav(root / name)[:CLIP_SAMPLES]
        row[: len(samples)] = samples
    labels = torch.tensor([*map(_label, names), *[SILENCE] * silence], dtype=torch.int64)
    return SpeechSet(clips, labels, [*names, *["silence"] * silence])


def _read_noise(root: Path) -> Noise:
    folder = root / NOISE_FOLDER
    paths = sorted(folder.glob("*.wav"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected a folder of WAV files; the official archive holds one")
    recordings = [read_wav(path) for path in paths]
    for path, recording in zip(paths, recordings, strict=True):
        if len(recording) < CLIP_SAMPLES:
            raise ValueError(f"{path}: expected at least 1 s of background noise, got {len(recording)} samples")
    return Noise(torch.from_numpy(np.concatenate(recordings)), np.cumsum([0, *map(len, recordings)]).tolist())


def _split_names(root: Path, names: Sequence[str]) -> dict[str, list[str]]:
    present = [file for file in LISTS.values() if (root / file).is_file()]
    if len(present) == 1:
        raise FileNotFoundError(
            f"{root}: has {present[0]} alone; expected both {' and '.join(LISTS.values())}, "
            "or neither (then the SHA1 of the speaker's name decides)"
        )
    listed: dict[str, str] = {}
    if present:
        for split, file in LISTS.items():
            listed |= dict.fromkeys((root / file).read_text().split(), split)
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        parts[listed.get(name, "train") if present else which_split(name)].append(name)
    return parts


def load_speech_commands(
    root: str | Path,
    *,
    unknown_fraction: float = 0.1,
    silence_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
) -> SpeechCommands:
    """Reads the official folder layout: `<word>/<clip>.wav`, two list files and `_background_noise_/`.

    Splits by the list files, or by `which_split` where neither exists. Each split gets, on top of its keyword clips,
    `unknown_fraction` times as many clips of all other words (or all there are) and `silence_fraction` times as many
    silence examples, rounded down. Which unknown clips depends on `seed` and the clips' names alone. Clips shorter
    than one second are padded with zeros at the end, longer ones cut. Memory: 32 kB a clip.

    `download=True` fetches v0.01 (1.5 GB) if `root` does not exist or is empty. Raises FileNotFoundError for missing
    folders or list files, ValueError for unreadable files, negative fractions and a split without keywords.
    """
    if min(unknown_fraction, silence_fraction) < 0:
        raise ValueError(f"the fractions must be 0 or more, got unknown {unknown_fraction}, silence {silence_fraction}")
    root = Path(root)
    if download and not (root.is_dir() and any(root.iterdir())):
        download_speech_commands(root, ARCHIVE_URL, ARCHIVE_SHA256)
    sets = {}
    for split, part in _split_names(root, _clip_names(root)).items():
        keywords = [name for name in part if _label(name) != UNKNOWN]
        if not keywords:
            raise ValueError(f"{root}: no keyword clip falls into the {split} split; check the list files against it")
        # Ordering by hash picks a seeded sample that stays put when other clips come or go.
        unknown = sorted(
            (name for name in part if _label(name) == UNKNOWN),
            key=lambda name: hashlib.sha1(f"{seed}/{name}".encode()).digest(),
        )
        # The epsilon keeps .29 of 100 at 29: the product alone is 28.999999999999996.
        chosen, silence = (int(f * len(keywords) + 1e-9) for f in (unknown_fraction, silence_fraction))
        sets[split] = _read_set(root, [*keywords, *sorted(unknown[:chosen])], silence)
    return SpeechCommands(**sets, noise=_read_noise(root))


def load_word_folders(root: str | Path) -> SpeechSet:
    """Every clip under the word folders, whatever its split: keywords by name, other words "unknown", no silence."""
    return _read_set(Path(root), _clip_names(Path(root)))


def download_speech_commands(root: str | Path, url: str = ARCHIVE_URL, sha256: str = ARCHIVE_SHA256) -> None:
    """Fetches the official archive into `root`, which appears complete or not at all.

    Raises FileExistsError if `root` holds anything already, ConnectionError, ValueError for an unexpected archive.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root}: exists and is not an empty folder; remove it or download elsewhere")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        archive, unpacked = Path(scratch, "archive.tar.gz"), Path(scratch, "unpacked")
        try:
            with urllib.request.urlopen(url) as source, archive.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except urllib.error.URLError as error:
            raise ConnectionError(f"{url}: {error.reason}; fetch it by other means and unpack it to {root}") from error
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(f"{url}: expected SHA-256 {sha256}, got {digest}; the download broke off: try again")
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        unpacked.replace(root)
