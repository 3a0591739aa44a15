"""Shift, noise and features of the batches made from speech clips."""

import numpy as np
import pytest
import torch

from pqk_fast.data.batches import pass_generator
from pqk_fast.data.features import MFCC
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import CLIP_SAMPLES, Noise, SpeechSet


def tone(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    wave = 8000 * np.sin(rng.uniform(0.1, 0.8) * np.arange(CLIP_SAMPLES)) + rng.normal(0, 300, CLIP_SAMPLES)
    return torch.from_numpy(np.where(np.round(wave) == 0, 1, np.round(wave)).astype(np.int16))  # no zeros


def some_set(labels: list[int], clips: torch.Tensor | None = None) -> SpeechSet:
    if clips is None:
        clips = torch.stack([tone(i) for i in range(len(labels))])
    return SpeechSet(clips, torch.tensor(labels), [str(i) for i in range(len(labels))])


def two_noises() -> Noise:
    return Noise(
        torch.cat([torch.full((20_000,), 10_000), torch.full((16_000,), -20_000)]).short(), [0, 20_000, 36_000]
    )


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


def test_batches_are_the_features_of_the_waveforms():
    batches = SpeechBatches(some_set([*range(12)] * 2), two_noises(), batch_size=20, train=True, seed=5)
    generator = pass_generator(5, 0)
    order = torch.randperm(24, generator=generator)
    expected = MFCC()(batches.waveforms(order, generator)[:20])
    features, labels = next(iter(batches))
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
    assert torch.equal(labels, order[:20] % 12)


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
    torch.testing.assert_close(again, features, atol=1e-4, rtol=0)
    other = torch.cat([x for x, _ in SpeechBatches(data, noise, batch_size=2, train=False, seed=1)])
    assert not torch.equal(other[~words], features[~words])


@pytest.mark.parametrize(
    "settings",
    [{"noise_probability": 1.5}, {"noise_amplitude": -0.1}, {"shift_ms": -1}, {"shift_ms": 1001}],
)
def test_settings_out_of_range(settings: dict):
    with pytest.raises(ValueError, match="SpeechBatches needs"):
        SpeechBatches(some_set([2]), two_noises(), train=True, **settings)


def test_empty_split_and_missing_noise():
    empty = SpeechSet(torch.zeros(0, CLIP_SAMPLES, dtype=torch.int16), torch.zeros(0, dtype=torch.int64), [])
    with pytest.raises(ValueError, match="empty split"):
        SpeechBatches(empty, two_noises(), train=True)
    for train, labels in (True, [2]), (False, [0]):
        with pytest.raises(ValueError, match="noise=None"):
            SpeechBatches(some_set(labels), None, train=train)


def test_frames_are_hidden_in_training_only():
    data = some_set([*range(12)] * 4)
    settings = {"batch_size": 48, "seed": 5}
    (plain, order), *_ = SpeechBatches(data, two_noises(), train=True, **settings)
    (masked, same), *_ = SpeechBatches(data, two_noises(), train=True, time_mask=20, **settings)
    assert torch.equal(order, same), "what is drawn besides stays"
    hidden = (masked != plain).any(2)
    widths = hidden.sum(1)
    assert widths.max() <= 20
    assert widths.float().mean() == pytest.approx(10, abs=3)
    assert (hidden.long().diff(dim=1).abs().sum(1) <= 2).all(), "in a row"
    means = plain.mean(1, keepdim=True).expand_as(plain)
    torch.testing.assert_close(masked[hidden], means[hidden])
    assert hidden.any(0).float().mean() > 0.9, "everywhere"
    evaluation = [SpeechBatches(data, two_noises(), train=False, time_mask=n, **settings) for n in (0, 20)]
    for (x, _), (other, _) in zip(*evaluation, strict=True):
        assert torch.equal(x, other)
    with pytest.raises(ValueError, match=r"time_mask in 0..101 frames, got 102"):
        SpeechBatches(data, two_noises(), train=True, time_mask=102)
