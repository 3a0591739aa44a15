"""Mel-frequency cepstral coefficients with the settings of honk's keyword-spotting models, in plain PyTorch."""

import math

import torch
from torch import Tensor

# Clips transformed together on the CPU. The temporaries of eight one-second clips (1.5 MB each) stay in the cache and
# in memory that malloc recycles; those of a whole batch are mapped, and faulted in page by page, anew each time.
CPU_CHUNK = 8


def hz_to_mel(hz: float) -> float:
    """Slaney's mel scale (Auditory Toolbox, 1998): linear up to 1 000 Hz (15 mel), logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of `hz_to_mel` on a tensor of any shape."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float) -> Tensor:
    """Triangular filters equally spaced on Slaney's mel scale, each of unit area over frequency in Hz.

    Returns `[n_fft // 2 + 1, n_mels]` float64; `power_spectrum @ filterbank` is the mel spectrum.
    """
    edges = mel_to_hz(torch.linspace(hz_to_mel(f_min), hz_to_mel(f_max), n_mels + 2, dtype=torch.float64))
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * (sample_rate / n_fft)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return triangles * (2 / (high - low))


def dct_matrix(n_in: int, n_out: int) -> Tensor:
    """The orthonormal DCT-II: `[n_in, n_out]` float64, to be multiplied from the right."""
    position = torch.arange(n_in, dtype=torch.float64)[:, None] + 0.5
    matrix = torch.cos(math.pi / n_in * position * torch.arange(n_out)) * math.sqrt(2 / n_in)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


class MFCC(torch.nn.Module):
    """Waveforms `[B, samples]` in [-1, 1] -> cepstra `[B, 1 + samples // hop_length, n_mfcc]`, both float32.

    The defaults are honk's (github.com/castorini/honk): 30 ms periodic Hann windows every 10 ms, centred, with
    reflected edges; 40 Slaney mel bands of the power spectrum from 20 to 4 000 Hz; natural logarithm, where an exact
    zero (digital silence) stays 0; orthonormal DCT-II; no normalisation. One second at 16 kHz gives 101 x 40.

    The module has no parameters and adds nothing to a state dict.
    """

    window: Tensor
    filterbank: Tensor
    dct: Tensor

    def __init__(
        self,
        *,
        sample_rate: int = 16_000,
        n_fft: int = 480,
        hop_length: int = 160,
        n_mels: int = 40,
        n_mfcc: int = 40,
        f_min: float = 20.0,
        f_max: float = 4000.0,
    ) -> None:
        """Lengths are in samples, frequencies in Hz. Raises ValueError unless every band covers a frequency bin."""
        super().__init__()
        if hop_length < 1 or n_fft < 2 or n_fft % 2 or not 0 < n_mfcc <= n_mels:
            raise ValueError(
                f"MFCC needs hop_length > 0, an even n_fft and 0 < n_mfcc <= n_mels, got hop_length={hop_length}, "
                f"n_fft={n_fft}, n_mfcc={n_mfcc}, n_mels={n_mels}"
            )
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                f"MFCC needs 0 <= f_min < f_max <= {sample_rate / 2:g} Hz, half the sample rate, "
                f"got {f_min:g} to {f_max:g} Hz"
            )
        filterbank = mel_filterbank(sample_rate, n_fft, n_mels, f_min, f_max)
        empty = (filterbank.sum(0) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"mel bands {empty} lie between two frequency bins: use fewer n_mels or a larger n_fft")
        self.n_fft, self.hop_length = n_fft, hop_length
        # No band reaches past f_max: the power and the product over the upper half of the spectrum are never computed.
        used = int(filterbank.sum(1).nonzero().max()) + 1
        window = torch.hann_window(n_fft, periodic=True, dtype=torch.float64)
        for name, value in ("window", window), ("filterbank", filterbank[:used]), ("dct", dct_matrix(n_mels, n_mfcc)):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Raises ValueError for an empty batch, another shape or dtype, and clips not longer than half a window."""
        half = self.n_fft // 2
        shaped = waveforms.dim() == 2 and waveforms.shape[0] > 0 and waveforms.shape[1] > half
        if not shaped or waveforms.dtype != self.window.dtype:
            raise ValueError(
                f"MFCC expects waveforms [batch > 0, samples > {half}] of {self.window.dtype}, "
                f"got {list(waveforms.shape)} of {waveforms.dtype}"
            )
        # torch.cat does in a seventh of the time what pad(mode="reflect") does.
        left, right = waveforms[:, 1 : half + 1].flip(1), waveforms[:, -half - 1 : -1].flip(1)
        padded = torch.cat([left, waveforms, right], dim=1)
        # Half precision would lose quiet bands: autocast around this module does not reach into it.
        with torch.autocast(waveforms.device.type, enabled=False):
            chunks = padded.split(CPU_CHUNK) if waveforms.device.type == "cpu" else [padded]
            return torch.cat([self._cepstra(chunk) for chunk in chunks])

    def _cepstra(self, padded: Tensor) -> Tensor:
        frames = padded.unfold(1, self.n_fft, self.hop_length) * self.window
        spectrum = torch.fft.rfft(frames)[..., : len(self.filterbank)]
        power = spectrum.real.square().addcmul(spectrum.imag, spectrum.imag)
        log_mel = (power @ self.filterbank).log()
        return log_mel.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0) @ self.dct
