"""Writes a small data set in the layout of Speech Commands: each "word" is three tones, said by many "speakers".

    python bench/made_up_words.py FOLDER [--clips 80]

For a run of the whole training where there is no speech: what is learnt from it says nothing about speech.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np

from pqk_fast.data.speech_commands import CLIP_SAMPLES, KEYWORDS, LISTS, NOISE_FOLDER, SAMPLE_RATE

OTHERS = ("bed", "cat", "tree")


def write_wav(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.clip(samples, -32768, 32767).astype("<i2").tobytes())


def spoken(tones: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The word's tones one after the other, in a voice and at a moment of their own, in noise."""
    length = int(rng.uniform(2000, 3500))
    voice = tones * rng.uniform(0.85, 1.15)
    time = np.arange(length) / SAMPLE_RATE
    parts = [np.sin(2 * np.pi * tone * time) * np.hanning(length) for tone in voice]
    out = rng.normal(0, 600, CLIP_SAMPLES)
    start = rng.integers(0, CLIP_SAMPLES - 3 * length)
    out[start : start + 3 * length] += rng.uniform(2000, 9000) * np.concatenate(parts)
    return out


def write_words(folder: Path, clips: int) -> None:
    """A tenth of the clips validates, a tenth tests."""
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {split: [] for split in LISTS}
    for word in (*KEYWORDS, *OTHERS):
        tones = rng.uniform(200, 3000, 3)
        for clip in range(clips):
            name = f"{word}/{clip:08x}_nohash_0.wav"
            write_wav(folder / name, spoken(tones, rng))
            split = {0: "validation", 1: "testing"}.get(clip % 10)
            if split:
                lists[split].append(name)
    for split, names in lists.items():
        (folder / LISTS[split]).write_text("".join(f"{name}\n" for name in names))
    for number in range(2):
        write_wav(folder / NOISE_FOLDER / f"{number}.wav", rng.normal(0, 3000, 4 * SAMPLE_RATE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=80, help="of each word")
    args = parser.parse_args()
    write_words(args.folder, args.clips)


if __name__ == "__main__":
    main()
