"""Keyword spotting: what is detected when, streams in pieces of any size, and files that are refused."""

import io
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packed import res8_narrow, student
from torch import Tensor, nn

from pqk_fast import cli
from pqk_fast.data.speech_commands import LABELS
from pqk_fast.deploy.packed import save_packed
from pqk_fast.deploy.spot import Detector, Found, Spotter, read_pcm_chunks, read_wav_chunks, spot

RATE = 16_000


def write_wav(path: Path, samples: np.ndarray, channels: int = 1, width: int = 2, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def heard(detector: Detector, scores: list[list[float]]) -> list[Found]:
    found = [detector.hear(i * detector.hop, np.array(score)) for i, score in enumerate(scores)]
    return [word for word in (*found, detector.end()) if word is not None]


YES, NO, NONE = [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.9, 0.1, 0.0, 0.0]
NAMES = ("silence", "unknown", "yes", "no")


def test_a_word_is_reported_once_at_its_peak() -> None:
    detector = Detector(NAMES, smoothing=0.1)
    (found,) = heard(detector, [NONE, [0.2, 0, 0.8, 0], YES, [0.1, 0, 0.9, 0], NONE])
    assert (found.word, found.time, found.score) == ("yes", pytest.approx(0.2), 1.0)


def test_a_word_at_the_end_is_reported_by_the_end() -> None:
    detector = Detector(NAMES, smoothing=0.1)
    assert [word.word for word in heard(detector, [NONE, YES])] == ["yes"]
    assert detector.end() is None


def test_two_words_follow_each_other() -> None:
    detector = Detector(NAMES, smoothing=0.1)
    assert [word.word for word in heard(detector, [YES, YES, NO, NO, NONE])] == ["yes", "no"]


def test_the_same_word_is_not_reported_within_the_rest() -> None:
    scores = [YES, NONE, YES, NONE, NONE, NONE, NONE, NONE, NONE, YES]
    found = heard(Detector(NAMES, smoothing=0.1, rest=0.5), scores)
    assert [round(word.time, 1) for word in found] == [0.0, 0.9]
    assert len(heard(Detector(NAMES, smoothing=0.1, rest=0.0), scores)) == 3


def test_smoothing_asks_for_more_than_a_moment() -> None:
    moment = [NONE] * 5 + [YES] + [NONE] * 5
    assert heard(Detector(NAMES, smoothing=0.3), moment) == []
    longer = [NONE] * 5 + [YES] * 4 + [NONE] * 5
    (found,) = heard(Detector(NAMES, smoothing=0.3), longer)
    assert (found.word, found.time) == ("yes", pytest.approx(0.6))  # the middle of windows 5 to 7


def test_fillers_are_never_reported() -> None:
    assert heard(Detector(NAMES, smoothing=0.1), [[1.0, 0, 0, 0], [0, 1.0, 0, 0]] * 4) == []


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": 1.1}, {"hop": 0.0}, {"hop": 1.1}, {"rest": -1.0}]
)
def test_settings_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a threshold in"):
        Detector(NAMES, **options)


def test_labels_without_a_keyword_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one keyword among the labels, got silence, unknown"):
        Detector(NAMES[:2])


class Loud(nn.Module):
    """Says "yes" to a second that is loud in its middle, else "silence"; digital silence (cepstra of 0) is not loud."""

    def forward(self, features: Tensor) -> Tensor:
        middle = features[:, 45:56, 0]
        loud = ((middle.mean(1) > -40) & (middle.amax(1) < -1)).float()
        return 20 * torch.stack([1 - loud, 0 * loud, loud, 0 * loud], 1)


def recording(*times: float, seconds: float = 6.0) -> np.ndarray:
    """Faint noise with a loud moment at each time."""
    generator = np.random.default_rng(0)
    samples = generator.normal(size=int(seconds * RATE)) * 20
    for time in times:
        at = int(time * RATE)
        samples[at - 1200 : at + 1200] += generator.normal(size=len(samples[at - 1200 : at + 1200])) * 4000
    return samples.astype(np.int16)


def spotter() -> Spotter:
    return Spotter(Loud(), Detector(NAMES, smoothing=0.1))


def test_words_are_found_where_they_are() -> None:
    found = list(spot(spotter(), [recording(1.5, 4.2)]))
    assert [word.time for word in found] == [pytest.approx(1.5, abs=0.11), pytest.approx(4.2, abs=0.11)]


def test_words_at_the_very_edges_are_heard_in_their_middle() -> None:
    found = list(spot(spotter(), [recording(0.1, 5.9)]))
    assert [word.time for word in found] == [pytest.approx(0.1, abs=0.11), pytest.approx(5.9, abs=0.11)]


@pytest.mark.parametrize("size", [1, 77, 1600, 8000, 50_000])
def test_pieces_of_any_size_give_the_same(size: int) -> None:
    samples = recording(1.5, 2.9, seconds=4.0) if size > 1 else recording(0.7, seconds=1.5)[: RATE + 4000]
    whole = list(spot(spotter(), [samples]))
    assert whole
    assert list(spot(spotter(), (samples[i : i + size] for i in range(0, len(samples), size)))) == whole


def test_a_long_stream_is_never_held() -> None:
    listener = spotter()
    most = 0
    for _ in range(200):
        list(listener.feed(np.zeros(8000, np.int16)))
        most = max(most, len(listener._held))
    assert most <= RATE
    assert listener.samples == 200 * 8000


def test_a_stream_shorter_than_a_window_is_heard() -> None:
    assert len(list(spot(spotter(), [recording(0.2, seconds=0.4)]))) == 1
    assert list(spot(spotter(), [])) == []


def test_pcm_arrives_in_odd_pieces() -> None:
    samples = np.arange(-500, 500).astype("<i2")

    class Dribble(io.BytesIO):
        def read1(self, size: int = -1) -> bytes:
            return super().read(min(size, 7))

    pieces = list(read_pcm_chunks(Dribble(samples.tobytes() + b"\x01")))
    assert np.array_equal(np.concatenate(pieces), samples)


def test_wav_files_are_read_in_pieces(tmp_path: Path) -> None:
    samples = recording(1.0)
    pieces = list(read_wav_chunks(write_wav(tmp_path / "a.wav", samples), 1000))
    assert max(map(len, pieces)) == 1000
    assert np.array_equal(np.concatenate(pieces), samples)


@pytest.mark.parametrize(("channels", "width", "rate"), [(2, 2, RATE), (1, 1, RATE), (1, 2, 44_100)])
def test_other_wav_files_are_refused_with_the_remedy(channels: int, width: int, rate: int, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.zeros(64), channels, width, rate)
    with pytest.raises(ValueError, match=r"expected mono 16-bit samples at 16000 Hz.*sox"):
        list(read_wav_chunks(path))


def test_what_is_no_wav_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"RIFF", b"no sound here at all"):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(ValueError, match="expected a PCM WAV file, but"):
            list(read_wav_chunks(tmp_path / "a.wav"))


def test_the_command_listens_to_files_and_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wav = tmp_path / "s.pqk", write_wav(tmp_path / "a.wav", recording(1.0, seconds=2.0))
    save_packed(student(res8_narrow()), model, {"model": "res8_narrow", "classes": 12, "labels": list(LABELS)})
    assert cli.main(["spot", str(wav), "--model", str(model), "--json", "--threshold", "0.01"]) == 0
    *words, about = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["seconds"] == 2.0
    assert about["words"] == len(words) > 0
    assert all(word["word"] in LABELS[2:] for word in words)
    piped = subprocess.run(
        [sys.executable, "-m", "pqk_fast", "spot", "-", "--model", str(model), "--json", "--threshold", "0.01"],
        input=recording(1.0, seconds=2.0).tobytes(),
        capture_output=True,
        check=True,
    )
    assert [json.loads(line) for line in piped.stdout.splitlines()][:-1] == words
    save_packed(student(res8_narrow()), model, {"model": "res8_narrow", "classes": 12})
    assert cli.main(["spot", str(wav), "--model", str(model)]) == 1
    assert "does not name its classes" in capsys.readouterr().err
