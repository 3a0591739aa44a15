"""Batches of features from speech clips: shift, noise and MFCC as tensor operations on the device that holds the clips.

The augmentation is honk's (github.com/castorini/honk).
"""

from typing import ClassVar

import torch
from torch import Tensor

from pqk_fast.data.batches import Batch, DeviceBatches
from pqk_fast.data.features import CPU_CHUNK, MFCC
from pqk_fast.data.speech_commands import CLIP_SAMPLES, SAMPLE_RATE, SILENCE, Noise, SpeechSet

__all__ = ["SpeechBatches"]

FRAMES = 101  # of a clip's features


class SpeechBatches(DeviceBatches):
    """Batches `(features [B, 101, 40] float32, labels [B] int64)` on `device`. Order, resume and ranks: see
    `DeviceBatches`. The clips stay on `device` as int16.

    Training: clips shifted by up to `shift_ms` either way (zeros move in), background noise with probability
    `noise_probability` at an amplitude uniform in [0, `noise_amplitude`], the sum clamped to [-1, 1]; of the features
    up to `time_mask` frames in a row replaced by the clip's mean (SpecAugment; Park et al., Interspeech 2019); a last
    partial batch is dropped unless it is the only one.

    Evaluation: words as they are, silence as noise drawn once from `seed`. The features are computed at the first pass
    and kept (16 kB a clip); do not change them in place.

    Args:
        split: where the clips come from.
        noise: may be None for evaluation without silence, and for training with `noise_probability=0` and without it.
        batch_size, train, seed, device, rank, world: see `DeviceBatches`, also for the errors raised.
        noise_probability, noise_amplitude, shift_ms, time_mask: of the augmentation; evaluation has none.

    Raises ValueError for an empty split, settings out of range, or missing noise where it is needed.
    """

    keeps_evaluation: ClassVar[bool] = True

    def __init__(
        self,
        split: SpeechSet,
        noise: Noise | None,
        *,
        batch_size: int = 64,
        train: bool,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        noise_probability: float = 0.8,
        noise_amplitude: float = 0.1,
        shift_ms: float = 100,
        time_mask: int = 0,
    ) -> None:
        if len(split) == 0:
            raise ValueError("SpeechBatches needs at least one clip, got an empty split")
        if not 0 <= noise_probability <= 1 or noise_amplitude < 0 or not 0 <= shift_ms <= 1000:
            raise ValueError(
                "SpeechBatches needs noise_probability in [0, 1], noise_amplitude >= 0, shift_ms in [0, 1000], got "
                f"{noise_probability}, {noise_amplitude}, {shift_ms}"
            )
        if not 0 <= time_mask <= FRAMES:
            raise ValueError(f"SpeechBatches needs a time_mask in 0..{FRAMES} frames, got {time_mask}")
        self.time_mask = time_mask if train else 0
        batch_size = min(batch_size, len(split)) if train else batch_size
        super().__init__(
            len(split), batch_size=batch_size, train=train, seed=seed, device=device, rank=rank, world=world
        )
        self._silence = split.labels.cpu() == SILENCE
        if noise is None and (bool(self._silence.any()) or (train and noise_probability > 0)):
            raise ValueError("silence and training with noise_probability > 0 need background noise, got noise=None")
        self.noise_probability, self.noise_amplitude = noise_probability if train else 0.0, noise_amplitude
        self.mfcc = MFCC().to(self.device)
        self.labels = split.labels.to(self.device)
        # One line of samples, `margin` zeros before, between and after the clips: a window that starts up to `margin`
        # early or late meets only zeros besides its own clip.
        self._margin = round(shift_ms * SAMPLE_RATE / 1000) if train else 0
        self._stride = CLIP_SAMPLES + self._margin
        if self._margin:
            samples = len(split) * self._stride + self._margin
            line = torch.zeros(samples, dtype=torch.int16, device=self.device)
            line[self._margin :].view(-1, self._stride)[:, :CLIP_SAMPLES] = split.clips
        else:
            line = split.clips.to(self.device).flatten()  # a view where nothing has to move
        self._windows = line.unfold(0, CLIP_SAMPLES, 1)
        noise = noise or Noise(torch.zeros(CLIP_SAMPLES, dtype=torch.int16), [0, CLIP_SAMPLES])
        self._noise_windows = noise.samples.to(self.device).unfold(0, CLIP_SAMPLES, 1)
        bounds = torch.tensor(noise.bounds)
        self._noise_first, self._noise_starts = bounds[:-1], bounds.diff() - CLIP_SAMPLES + 1

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Which clip, and its augmentation."""
        index = torch.randperm(self.examples, generator=generator) if self.train else torch.arange(self.examples)
        return index, *self._augmentation(index, generator), *self._hidden_frames(index, generator)

    def make(self, index: Tensor, *augmentation: Tensor) -> Batch:
        """Waveforms gathered, mixed and transformed; on the CPU a few clips at a time, because a batch of waveforms
        costs more in page faults than in arithmetic."""
        clips = CPU_CHUNK if self.device.type == "cpu" else len(index)
        with torch.no_grad():
            parts = zip(*(values.split(clips) for values in augmentation[:3]), strict=True)
            features = torch.cat([self.mfcc(self._mix(*part)) for part in parts])
            if self.time_mask:
                features = self._hide(features, *augmentation[3:])
        return features, self.labels[index]

    def waveforms(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The clips `index` [B] (int64, CPU) as they enter the features: `[B, 16000]` float32, shifted and noisy."""
        return self._mix(*(values.to(self.device) for values in self._augmentation(index, generator)))

    def _augmentation(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each clip: where its window starts, where its noise starts, the amplitude of the noise."""
        starts = index * self._stride + self._margin
        if self._margin:
            starts += torch.randint(-self._margin, self._margin + 1, index.shape, generator=generator)
        recording = torch.randint(len(self._noise_first), index.shape, generator=generator)
        place = torch.rand(index.shape, generator=generator, dtype=torch.float64) * self._noise_starts[recording]
        noisy = (torch.rand(index.shape, generator=generator) < self.noise_probability) | self._silence[index]
        amplitude = torch.rand(index.shape, generator=generator) * self.noise_amplitude * noisy
        return starts, self._noise_first[recording] + place.long(), amplitude[:, None]

    def _hidden_frames(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """For each clip: the first frame that is hidden, and the one after the last."""
        if not self.time_mask:
            return ()  # and nothing is drawn
        width = torch.randint(self.time_mask + 1, index.shape, generator=generator)
        first = (torch.rand(index.shape, generator=generator) * (FRAMES + 1 - width)).long()
        return first, first + width

    @staticmethod
    def _hide(features: Tensor, first: Tensor, end: Tensor) -> Tensor:
        frame = torch.arange(features.shape[1], device=features.device)
        hidden = (frame >= first[:, None]) & (frame < end[:, None])
        return torch.where(hidden[:, :, None], features.mean(1, keepdim=True), features)

    def _mix(self, starts: Tensor, noise_starts: Tensor, amplitude: Tensor) -> Tensor:
        mixed = self._windows[starts].float()
        mixed.addcmul_(self._noise_windows[noise_starts].float(), amplitude)
        return mixed.mul_(1 / 32768).clamp_(-1, 1)
