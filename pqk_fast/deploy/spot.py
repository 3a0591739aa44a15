"""Keyword spotting in a recording or a live stream: a student looks at seconds of it, a tenth of a second apart."""

from __future__ import annotations

import wave
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from pqk_fast.data.features import CPU_CHUNK, MFCC
from pqk_fast.data.speech_commands import CLIP_SAMPLES, SAMPLE_RATE

CHUNK = SAMPLE_RATE // 2  # samples read at a time
FILLERS = ("silence", "unknown")


@dataclass(frozen=True)
class Found:
    """A keyword, the middle of the second in which it was surest (seconds from the start), and its smoothed score."""

    time: float
    word: str
    score: float


class Detector:
    """Turns posteriors of windows into keywords: smoothed, above a threshold, one report for each time it is said.

    Args:
        labels: names of the classes; "silence" and "unknown" are no keywords.
        hop: seconds from one window to the next.
        smoothing: seconds over which posteriors are averaged (Chen, Parada, Heigold: "Small-footprint keyword spotting
            using deep neural networks", ICASSP 2014).
        threshold: what the average must reach.
        rest: seconds after a report in which the same word is not reported again.

    Raises ValueError for a threshold outside (0, 1], durations that are not positive, or labels without a keyword.
    """

    def __init__(
        self,
        labels: Sequence[str],
        hop: float = 0.1,
        smoothing: float = 0.5,
        threshold: float = 0.75,
        rest: float = 0.5,
    ) -> None:
        if not 0 < threshold <= 1 or not 0 < hop <= 1 or smoothing <= 0 or rest < 0:
            raise ValueError(
                "expected a threshold in (0, 1], hop in (0, 1], smoothing > 0, rest >= 0 seconds, got "
                f"{threshold}, {hop}, {smoothing}, {rest}"
            )
        self.keywords = [i for i, label in enumerate(labels) if label not in FILLERS]
        if not self.keywords:
            raise ValueError(f"expected at least one keyword among the labels, got {', '.join(labels)}")
        self.labels, self.hop, self.threshold, self.rest = tuple(labels), hop, threshold, rest
        self._recent: deque[np.ndarray] = deque(maxlen=max(1, round(smoothing / hop)))
        self._peak: Found | None = None
        self._last: dict[str, float] = {}

    def hear(self, time: float, posteriors: np.ndarray) -> Found | None:
        """The next window: its middle in seconds and its posteriors [classes]; a keyword whose peak is over, if any."""
        self._recent.append(np.asarray(posteriors, np.float64))
        # The average belongs to the middle of what it is over.
        middle = time - self.hop * (len(self._recent) - 1) / 2
        smooth = np.mean(self._recent, axis=0)
        best = max(self.keywords, key=lambda i: smooth[i])
        word, score = self.labels[best], float(smooth[best])
        over = None
        if self._peak is not None and (score < self.threshold or word != self._peak.word):
            over = self._report()
        if score >= self.threshold and (self._peak is None or score > self._peak.score):
            self._peak = Found(max(middle, 0.0), word, score)
        return over

    def end(self) -> Found | None:
        """After the last window: a keyword that was still being said."""
        return None if self._peak is None else self._report()

    def _report(self) -> Found | None:
        peak, self._peak = self._peak, None
        assert peak is not None
        if peak.time - self._last.get(peak.word, -np.inf) < self.rest:
            return None
        self._last[peak.word] = peak.time
        return peak


class Spotter:
    """A student that listens: feed it samples, it gives what it heard. Keeps no more than a second of them.

    Args:
        model: ``[B, 101, 40]`` features -> logits ``[B, classes]``, in evaluation mode.
        detector: of those classes.
    """

    def __init__(self, model: nn.Module, detector: Detector) -> None:
        self.model, self.detector = model, detector
        self.step = max(1, round(detector.hop * SAMPLE_RATE))
        self.samples = 0  # heard so far
        self._mfcc = MFCC()
        self._windows = 0
        # Half a window before the beginning and after the end: words there are heard in their middle too.
        self._held = np.zeros(CLIP_SAMPLES // 2, np.int16)

    def feed(self, samples: np.ndarray) -> Iterator[Found]:
        """The next samples, int16 [n] at 16 kHz."""
        self.samples += len(samples)
        yield from self._listen(samples)

    def end(self) -> Iterator[Found]:
        """After the last samples."""
        yield from self._listen(np.zeros(CLIP_SAMPLES // 2, np.int16))
        last = self.detector.end()
        if last is not None:
            yield last

    @torch.inference_mode()
    def _listen(self, samples: np.ndarray) -> Iterator[Found]:
        self._held = np.concatenate([self._held, samples])
        count = (len(self._held) - CLIP_SAMPLES) // self.step + 1
        if count < 1:
            return
        windows = torch.from_numpy(self._held).unfold(0, CLIP_SAMPLES, self.step)[:count]
        self._held = self._held[count * self.step :]
        for part in windows.split(CPU_CHUNK):
            for posteriors in self._posteriors(part):
                found = self.detector.hear(self._windows * self.step / SAMPLE_RATE, posteriors)
                self._windows += 1
                if found is not None:
                    yield found

    def _posteriors(self, windows: Tensor) -> np.ndarray:
        features = self._mfcc(windows.float() / 32768)
        made: np.ndarray = torch.softmax(self.model(features).float(), dim=-1).numpy()
        return made


def spot(spotter: Spotter, chunks: Iterable[np.ndarray]) -> Iterator[Found]:
    """All keywords in a stream of samples, each as soon as its peak is over."""
    for chunk in chunks:
        yield from spotter.feed(chunk)
    yield from spotter.end()


def read_wav_chunks(path: str | Path, chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """A mono 16-bit WAV file at 16 kHz, a piece at a time. ValueError, at the first piece, for any other file."""
    remedy = "convert it, for example with `sox IN -r 16000 -c 1 -b 16 OUT.wav`"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getparams()[:3]
            if (channels, width, rate) != (1, 2, SAMPLE_RATE):
                raise ValueError(
                    f"{path}: expected mono 16-bit samples at {SAMPLE_RATE} Hz, got {channels} channel(s), {8 * width} "
                    f"bits, {rate} Hz; {remedy}"
                )
            while data := file.readframes(chunk):
                yield np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.int16)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "the file ends inside its header"
        raise ValueError(f"{path}: expected a PCM WAV file, but {reason}; {remedy}") from error


def read_pcm_chunks(stream: IO[bytes], chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """16 kHz 16-bit little-endian PCM as it comes, from a pipe or a file."""
    rest = b""
    read = getattr(stream, "read1", stream.read)  # what there is now, rather than wait for all
    while data := read(2 * chunk):
        data = rest + data
        rest = data[len(data) // 2 * 2 :]
        yield np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.int16)
