"""Spoken keywords made on the spot with espeak-ng: a stand-in for Speech Commands that needs no download.

A "speaker" is an espeak-ng voice variant with an accent, a pitch, a speaking rate, a vocal tract length, and a
microphone and room of its own. No voice variant is in two splits, so validation and testing speakers are unseen.
espeak-ng and its voices: github.com/espeak-ng/espeak-ng, by way of PyPI's espeakng-loader.
"""

import ctypes
import hashlib
import shutil
import tempfile
import wave
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from pqk_fast.data.speech_commands import (
    CLIP_SAMPLES,
    KEYWORDS,
    LABELS,
    LISTS,
    NOISE_FOLDER,
    SAMPLE_RATE,
    SILENCE,
    SPLITS,
    UNKNOWN,
    Noise,
    SpeechCommands,
    SpeechSet,
)

OTHER_WORDS = (
    *("bed", "bird", "cat", "dog", "happy", "house", "marvin", "sheila", "tree", "wow"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
# Left out: variants that whisper, croak or sound like robots, and Reed and caleb, whose breath is drawn from the
# C library's rand() and cannot be repeated.
VARIANTS = {
    "train": (
        *("Alex", "Alicia", "Andy", "Denis", "Diogo", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Nguyen"),
        *("anika", "aunty", "benjamin", "boris", "david", "edward", "f1", "f3", "grandma", "gustave"),
        *(
            "ian",
            "iven",
            "iven2",
            "iven3",
            "kaukovalta",
            "klatt",
            "klatt2",
            "klatt3",
            "m1",
            "m3",
            "m4",
            "m8",
            "marcelo",
        ),
        *("max", "michel", "pablo", "pedro", "quincy", "robert", "sandro", "steph", "steph2", "travis", "zac"),
    ),
    "validation": ("Annie", "Michael", "ed", "f5", "m6", "m7", "miguel", "norbert", "shelby"),
    "testing": (
        *("Andrea", "Gene", "Mike", "adam", "antonio", "belinda", "f2", "f4", "grandpa", "linda", "m2", "m5"),
        *("paul", "rob", "victor"),
    ),
}
ACCENTS = ("en", "en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp")
SENTENCES = (
    "shall we meet at the station later this evening",
    "the weather has been rather mild for this time of the year",
    "could you pass me another cup of coffee please",
    "my sister bought some apples and a loaf of bread",
    "they were talking about the holidays again",
)

ESPEAK_RATE = 22_050
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("spoken words are made with espeak-ng: pip install espeakng-loader") from error
    return espeakng_loader


def _loud(samples: np.ndarray) -> np.ndarray:
    """Where 16-bit samples stand out from silence."""
    return np.flatnonzero(np.abs(samples.astype(np.int32)) > 150)


class Synthesizer:
    """espeak-ng behind `say`. Raises ImportError without espeakng-loader, RuntimeError if the library fails.

    espeak-ng keeps its state (oscillator phases, random numbers) in global variables that survive even its own
    termination, so what a word sounds like depends on what was said before. Each Synthesizer therefore loads a private
    copy of the library: the same calls give the same samples, and other users of espeak-ng in the process are safe.
    """

    def __init__(self) -> None:
        loader = _loader()
        data = Path(loader.get_data_path())
        self.variants = {path.name for path in (data / "voices" / "!v").iterdir()}
        source = Path(loader.get_library_path())
        # The copy can go once it is loaded, except on Windows, where it stays behind in the temporary folder.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self._library = ctypes.CDLL(shutil.copy(source, folder))
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DONT_EXIT)
        if rate != ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng should start at {ESPEAK_RATE} Hz, got {rate} from {source}, data in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the clock seeds it otherwise
        self._blocks: list[bytes] = []
        self._callback = _Callback(self._receive)  # kept, or it would be collected while the library still calls it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            self._blocks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def voice(self, accent: str, variant: str) -> None:
        """Speak with this accent and variant from now on."""
        # An unknown variant would be ignored without a word.
        if variant not in self.variants or self._library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {accent}+{variant}: pip install -U espeakng-loader")

    def say(self, text: str, *, rate: float, pitch: float, pitch_range: float = 50) -> np.ndarray:
        """`text` as int16 at 22 050 Hz without the silence around it; `rate` in words a minute, pitches 0 to 100."""
        for parameter, value in (_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        for _ in range(20):  # some voices have an echo: let that of the word before die away
            if len(_loud(self._speak(" "))) == 0:
                break
        samples = self._speak(text)
        loud = _loud(samples)
        if len(loud) == 0:
            raise RuntimeError(f"espeak-ng said nothing for {text!r}")
        return samples[loud[0] : loud[-1] + 1]

    def _speak(self, text: str) -> np.ndarray:
        self._blocks.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _UTF8, None, None)
        return np.frombuffer(b"".join(self._blocks), dtype=np.int16)

    def close(self) -> None:
        """Frees what the library allocated. The Synthesizer cannot speak afterwards."""
        self._library.espeak_Terminate()


def resample(waveforms: Tensor, samples_out: int, gain: Tensor | None = None) -> Tensor:
    """Band-limited resampling `[..., n]` -> `[..., samples_out]` by cutting (or extending) the Fourier spectrum.

    The waveforms should be zero at their ends, which the transform joins. `gain` [bins] is multiplied into the
    spectrum: a filter for free.
    """
    spectrum = torch.fft.rfft(waveforms)[..., : samples_out // 2 + 1]
    if gain is not None:
        spectrum = spectrum * gain
    return torch.fft.irfft(spectrum, n=samples_out) * (samples_out / waveforms.shape[-1])


def _coloured(rng: np.random.Generator, shape: tuple[int, ...], exponent: float | np.ndarray) -> Tensor:
    """Gaussian noise of unit power whose power falls with frequency to the `exponent` (0 white, 1 pink, 2 brown)."""
    white = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    bins = torch.arange(shape[-1] // 2 + 1).clamp(min=shape[-1] // 400)  # flat below 40 Hz
    noise = torch.fft.irfft(torch.fft.rfft(white) * bins ** (-torch.as_tensor(exponent, dtype=torch.float32) / 2))
    return noise / noise.square().mean(-1, keepdim=True).sqrt()


def _to_int16(waveforms: Tensor) -> Tensor:
    return (waveforms * 32767).round_().clamp_(-32767, 32767).to(torch.int16)


def _speaker_clips(synthesizer: Synthesizer, rng: np.random.Generator, variant: str, words: Sequence[str]) -> Tensor:
    """`words` said by one new speaker: `[len(words), 16000]` int16."""
    synthesizer.voice(str(rng.choice(ACCENTS)), variant)
    rate, pitch, pitch_range = rng.uniform(130, 190), rng.uniform(20, 80), rng.uniform(20, 80)
    room_in = ESPEAK_RATE * 6 // 5
    dry = torch.zeros(len(words), room_in)
    lengths = []
    for row, word in zip(dry, words, strict=True):
        samples = synthesizer.say(
            word, rate=rate * rng.uniform(0.85, 1.15), pitch=pitch + rng.uniform(-10, 10), pitch_range=pitch_range
        )[: room_in - 2000]
        row[: len(samples)] = torch.from_numpy(samples.astype(np.float32))
        lengths.append(len(samples))

    # Played a little faster or slower, a voice gets a shorter or longer vocal tract. Lengths that are multiples of 160
    # keep the transform fast.
    room_out = round(room_in * SAMPLE_RATE / ESPEAK_RATE * rng.uniform(0.96, 1.04) / 160) * 160
    frequency = torch.linspace(0, 1, room_out // 2 + 1)
    decibels = sum(rng.normal(0, 2) * torch.cos(torch.pi * k * frequency) for k in range(1, 5))
    echo = _coloured(rng, (room_out,), 0.5) * torch.exp(-torch.arange(room_out) / rng.uniform(300, 1200))
    echo *= rng.uniform(0, 0.2) / echo.square().sum().sqrt()
    echo[0] += 1
    wet = resample(dry, room_out, torch.fft.rfft(echo) * 10 ** (decibels / 20))

    clips = torch.zeros(len(words), CLIP_SAMPLES)
    for clip, word_samples, length in zip(clips, wet, lengths, strict=True):
        length = min(round(length * room_out / room_in) + 1000, CLIP_SAMPLES)  # some of the echo's tail
        start = int(rng.integers(CLIP_SAMPLES - length + 1))
        clip[start : start + length] = word_samples[:length]
        clip *= np.exp(rng.uniform(np.log(0.15), np.log(0.8))) / clip.abs().max()
    signal_to_noise = torch.from_numpy(10 ** (rng.uniform(25, 40, (len(words), 1)) / 20)).float()
    level = clips.square().mean(1, keepdim=True).sqrt() / signal_to_noise
    return _to_int16(clips + level * _coloured(rng, tuple(clips.shape), rng.uniform(0, 1.5)))


def _spoken_set(
    synthesizer: Synthesizer,
    rng: np.random.Generator,
    split: str,
    speakers: int,
    repeats: int,
    fractions: tuple[float, float],
    tick: Callable[[], None],
) -> SpeechSet:
    unknown, silence = (round(fraction * len(KEYWORDS) * repeats * speakers) for fraction in fractions)
    others = np.resize(rng.permutation(OTHER_WORDS), unknown).tolist()
    clips: list[Tensor] = []
    names: list[str] = []
    for speaker in range(speakers):
        words = [*KEYWORDS * repeats, *others[speaker::speakers]]
        variant = VARIANTS[split][speaker % len(VARIANTS[split])]
        clips.append(_speaker_clips(synthesizer, rng, variant, words))
        identity = hashlib.sha1(f"{split}/{speaker}".encode()).hexdigest()[:8]
        names += [f"{word}/{identity}_nohash_{words[:i].count(word)}.wav" for i, word in enumerate(words)]
        tick()
    clips.append(torch.zeros(silence, CLIP_SAMPLES, dtype=torch.int16))
    labels = [LABELS.index(word) if (word := name.split("/")[0]) in KEYWORDS else UNKNOWN for name in names]
    return SpeechSet(torch.cat(clips), torch.tensor(labels + [SILENCE] * silence), [*names, *["silence"] * silence])


def _background_noise(synthesizer: Synthesizer, rng: np.random.Generator, seconds: int) -> Noise:
    """White, pink and brown noise, mains hum with harmonics, and babble."""
    length = seconds * SAMPLE_RATE
    recordings = [_coloured(rng, (length,), exponent) for exponent in (0, 1, 2)]
    time = torch.arange(length, dtype=torch.float64) / SAMPLE_RATE
    hum = sum(torch.sin(torch.pi * (100 * k * time + rng.uniform(0, 2))) / k for k in range(1, 12))
    recordings.append(torch.as_tensor(hum).float() + 0.1 * recordings[1])
    babble = torch.zeros(length)
    for _ in range(2 * seconds):
        synthesizer.voice(str(rng.choice(ACCENTS)), str(rng.choice(VARIANTS["train"])))
        said = synthesizer.say(str(rng.choice(SENTENCES)), rate=rng.uniform(130, 200), pitch=rng.uniform(20, 80))
        voice = resample(torch.from_numpy(said.astype(np.float32)), len(said) * SAMPLE_RATE // ESPEAK_RATE // 2 * 2)
        voice = voice[: length // 2] * (rng.uniform(0.3, 1) / voice.abs().max())
        start = int(rng.integers(length - len(voice)))
        babble[start : start + len(voice)] += voice
    recordings.append(babble)
    quarter = [0.25 * recording / recording.square().mean().sqrt() for recording in recordings]
    return Noise(_to_int16(torch.cat(quarter)), [length * i for i in range(len(quarter) + 1)])


def make_spoken_words(
    *,
    speakers: tuple[int, int, int] = (210, 30, 45),
    repeats: int = 2,
    unknown_fraction: float = 0.1,
    silence_fraction: float = 0.1,
    noise_seconds: int = 30,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SpeechCommands:
    """Makes the data set: `speakers` (train, validation, testing) each say the ten keywords `repeats` times.

    Unknown words (`OTHER_WORDS`, dealt out evenly) and silence are the given fractions of a split's keyword clips.
    Five background recordings last `noise_seconds` each. The same arguments give the same samples. `progress` is called
    with (speakers done, speakers in all). The defaults make about 5 000 / 700 / 1 100 clips in some ten seconds.

    Raises ImportError without espeakng-loader, ValueError for numbers out of range.
    """
    if min(*speakers, repeats) < 1 or len(speakers) != 3 or noise_seconds < 6:
        raise ValueError(
            "make_spoken_words needs three speaker counts and repeats of at least 1 and noise_seconds of at least 6, "
            f"got {speakers}, {repeats} and {noise_seconds}"
        )
    if unknown_fraction < 0 or silence_fraction < 0:
        raise ValueError(f"fractions must be 0 or more, got {unknown_fraction} and {silence_fraction}")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, sum(speakers))

    rng = np.random.default_rng(seed)
    synthesizer = Synthesizer()
    try:
        fractions = unknown_fraction, silence_fraction
        sets = {
            split: _spoken_set(synthesizer, rng, split, count, repeats, fractions, tick)
            for split, count in zip(SPLITS, speakers, strict=True)
        }
        return SpeechCommands(**sets, noise=_background_noise(synthesizer, rng, noise_seconds))
    finally:
        synthesizer.close()


def _write_wav(path: Path, samples: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.numpy().astype("<i2").tobytes())


def write_spoken_words(data: SpeechCommands, root: str | Path) -> None:
    """Writes the folder layout that `load_speech_commands` reads: WAV files, both list files, background noise.

    Silence examples have no file; loading makes them anew. Raises FileExistsError if `root` holds anything already.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root}: exists and is not an empty folder; remove it or write elsewhere")
    for split in SPLITS:
        part: SpeechSet = getattr(data, split)
        written = [i for i, label in enumerate(part.labels.tolist()) if label != SILENCE]
        for i in written:
            _write_wav(root / part.names[i], part.clips[i])
        if split in LISTS:
            (root / LISTS[split]).write_text("".join(f"{part.names[i]}\n" for i in written))
    for number, (start, end) in enumerate(pairwise(data.noise.bounds)):
        _write_wav(root / NOISE_FOLDER / f"noise_{number}.wav", data.noise.samples[start:end])
