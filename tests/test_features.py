"""The MFCC against a float64 transform written out here, and against torchaudio with honk's settings."""

import math

import numpy as np
import pytest
import torch
from cases import package

from pqk_fast.data.features import MFCC, dct_matrix, mel_filterbank


def speech_like(clips: int, level: float = 0.3) -> torch.Tensor:
    """Harmonics under a slow envelope, with a little noise, the second half silent to the last bit."""
    generator = torch.Generator().manual_seed(clips)
    time = torch.arange(16_000) / 16_000
    pitch = 90 + 160 * torch.rand(clips, 1, generator=generator)
    voice = sum(torch.sin(2 * math.pi * k * pitch * time) / k for k in range(1, 25))
    wave = voice * torch.sin(math.pi * 3 * time) ** 2 + 0.01 * torch.randn(clips, 16_000, generator=generator)
    wave[:, 8_000:] = 0
    return level * wave / wave.abs().amax(1, keepdim=True)


def reference_log_mel(waveforms: torch.Tensor) -> np.ndarray:
    """[B, frames, 40] float64: reflected edges, a DFT as a sum, triangles by interpolation, log."""
    signal = np.pad(waveforms.double().numpy(), ((0, 0), (240, 240)), mode="reflect")
    frames = np.stack([signal[:, i : i + 480] for i in range(0, signal.shape[1] - 479, 160)], axis=1)
    n = np.arange(480)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * n / 480))
    power = np.abs(frames @ np.exp(-2j * np.pi * np.outer(n, np.arange(241)) / 480)) ** 2
    power[(frames == 0).all(-1)] = 0

    def to_hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    edges = [to_hz(mel) for mel in np.linspace(20 * 3 / 200, 15 + 27 * math.log(4) / math.log(6.4), 42)]
    bins = np.arange(241) * 16_000 / 480
    bank = [np.interp(bins, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0]) for i in range(40)]
    mel = power @ np.array(bank).T
    return np.log(mel, out=np.zeros_like(mel), where=mel > 0)


def reference_dct(log_mel: np.ndarray) -> np.ndarray:
    n = np.arange(40)
    matrix = np.cos(np.pi / 40 * np.outer(n + 0.5, n)) * math.sqrt(2 / 40)
    matrix[:, 0] = 1 / math.sqrt(40)
    return log_mel @ matrix


@pytest.mark.parametrize(
    "waveforms",
    [
        pytest.param(2 * torch.rand(3, 16_000, generator=torch.Generator().manual_seed(0)) - 1, id="noise"),
        pytest.param(speech_like(9), id="speech-like"),
        pytest.param(speech_like(2, level=1e-3), id="quiet"),
        pytest.param(torch.ones(1, 16_000) * 0.5, id="constant"),
    ],
)
def test_matches_a_float64_transform(waveforms):
    expected = reference_log_mel(waveforms)
    # The cepstra are an orthonormal rotation of the log mel spectrum, so the inverse rotation shows that, band by band.
    cepstra = MFCC()(waveforms)
    log_mel = cepstra.double().numpy() @ dct_matrix(40, 40).numpy().T
    # float32 leaves about 1e-7 of the loudest bin everywhere: judge the bands within 80 dB of their frame's loudest.
    heard = expected > expected.max(-1, keepdims=True) - math.log(1e8)
    assert np.abs(log_mel - expected)[heard].max() < 2e-3
    assert np.abs(log_mel - expected)[heard].mean() < 2e-5
    if heard.all():
        np.testing.assert_allclose(cepstra, reference_dct(expected), atol=2e-4)


def test_silence_stays_zero():
    assert MFCC()(torch.zeros(2, 16_000)).eq(0).all()
    half = MFCC()(speech_like(1))
    assert half[0, 53:].eq(0).all()
    assert half[0, :48].ne(0).all()


def test_not_a_number_stays_visible():
    waveforms = torch.zeros(2, 16_000)
    waveforms[1, 5_000] = math.nan
    features = MFCC()(waveforms)
    assert features[0].eq(0).all()
    assert features[1].isnan().any()


def test_shape_and_independence_of_the_batch():
    mfcc, waveforms = MFCC(), speech_like(19)
    features = mfcc(waveforms)
    assert features.shape == (19, 101, 40)
    assert features.dtype == torch.float32
    assert mfcc(waveforms[:, :4000]).shape == (19, 26, 40)
    assert torch.equal(features, mfcc(waveforms))
    torch.testing.assert_close(mfcc(waveforms[17:18]), features[17:18], atol=1e-4, rtol=0)


def test_autocast_does_not_reach_in():
    mfcc, waveforms = MFCC(), speech_like(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mfcc(waveforms), mfcc(waveforms))
        inside = mfcc(waveforms)
    assert torch.equal(inside, mfcc(waveforms))


def test_no_state():
    assert list(MFCC().state_dict()) == list(MFCC().parameters()) == []


@pytest.mark.parametrize(
    "waveforms",
    [torch.zeros(16_000), torch.zeros(2, 16_000, dtype=torch.int16), torch.zeros(2, 240), torch.zeros(0, 16_000)],
)
def test_wrong_input(waveforms):
    with pytest.raises(ValueError, match=r"expects waveforms \[batch > 0, samples > 240\]"):
        MFCC()(waveforms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_mfcc": 41}, "n_mfcc <= n_mels"),
        ({"n_fft": 481}, "even n_fft"),
        ({"hop_length": 0}, "hop_length"),
        ({"f_max": 9000.0}, "half the sample rate"),
        ({"n_mels": 200}, "fewer n_mels"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MFCC(**settings)


def test_dct_is_orthonormal():
    matrix = dct_matrix(40, 40)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(40, dtype=torch.float64))


def test_matrices_match_torchaudio():
    functional = package("torchaudio.functional")
    ours = mel_filterbank(16_000, 480, 40, 20.0, 4000.0)
    theirs = functional.melscale_fbanks(241, 20.0, 4000.0, 40, 16_000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(ours, theirs.double(), atol=1e-7, rtol=0)  # the largest weight is .015
    torch.testing.assert_close(dct_matrix(40, 40), functional.create_dct(40, 40, "ortho").double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["noise", "speech-like"])
def test_matches_torchaudio(kind):
    functional = package("torchaudio.functional")
    from torchaudio.transforms import MelScale, Spectrogram

    waveforms = speech_like(4)
    waveforms = waveforms + 1e-3 * torch.randn(waveforms.shape, generator=torch.Generator().manual_seed(1))
    if kind == "noise":
        waveforms = 2 * torch.rand(4, 16_000, generator=torch.Generator().manual_seed(2)) - 1
    power = Spectrogram(n_fft=480, hop_length=160, power=2.0, center=True, pad_mode="reflect")(waveforms)
    scale = MelScale(40, 16_000, f_min=20.0, f_max=4000.0, n_stft=241, norm="slaney", mel_scale="slaney")
    mel = scale(power).transpose(1, 2)
    theirs = torch.where(mel > 0, mel.log(), mel) @ functional.create_dct(40, 40, "ortho")
    ours = MFCC()(waveforms)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)
    # Both are float32; ours is not the one further from the truth (up to a rounding of the last result).
    truth = torch.from_numpy(reference_dct(reference_log_mel(waveforms)))
    assert (ours - truth).abs().mean() <= 1.2 * (theirs - truth).abs().mean()
