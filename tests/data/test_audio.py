"""Reading recordings from files, and their transform."""

from __future__ import annotations

import pickle
import random
import struct
import sys
import types
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.structured_mutants import mutated_bytes

from openneutron.data import AudioTransform, Waveform, read_value
from openneutron.errors import InputError, OptionError

WAVE = np.sin(np.arange(400) / 7) * 0.9


def write(
    path: Path, values: np.ndarray[Any, Any] = WAVE, bits: int = 16, channels: int = 1, rate: int = 16000
) -> Path:
    codes = np.round(values * 2 ** (bits - 1)).astype(np.int64)
    data = (codes + 128).astype(np.uint8).tobytes() if bits == 8 else b""
    if bits > 8:
        data = b"".join(int(code).to_bytes(bits // 8, "little", signed=True) for code in codes)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_integers_of_all_widths(bits: int, tmp_path: Path) -> None:
    found = read_value(write(tmp_path / "a.wav", bits=bits))
    assert (found.samples.shape, found.samples.dtype, found.rate) == ((1, 400), torch.float32, 16000)
    assert np.abs(found.samples[0].numpy() - WAVE).max() <= 0.51 / 2 ** (bits - 1) + 1e-7


def test_channels_are_averaged_padded_and_cut(tmp_path: Path) -> None:
    values = np.stack([WAVE, -WAVE / 2], 1).reshape(-1)
    found = read_value(write(tmp_path / "a.wav", values, channels=2))
    assert found.samples.shape == (2, 400)
    mono = AudioTransform()(found)
    assert mono.shape == (400,)
    assert torch.allclose(mono, torch.from_numpy(WAVE / 4).float(), atol=1e-4)
    assert AudioTransform(channels=2)(found).shape == (2, 400)
    longer, shorter = AudioTransform(length=500)(found), AudioTransform(channels=1, length=300)(found)
    assert torch.equal(longer[:400], mono)
    assert longer[400:].tolist() == [0] * 100
    assert torch.equal(shorter, mono[None, :300])


@pytest.mark.parametrize(
    ("sizes", "made"),
    [((1, 300), (None, 300)), ((1, 1, 300), (1, 300)), ((None, 2, 300), (2, 300)), ((1, None), (None, None)),
     ((300,), (None, 300))],
)  # fmt: skip
def test_accepted_inputs_of_a_model(sizes: Any, made: Any) -> None:
    assert AudioTransform(16000).fitted(sizes) == AudioTransform(16000, *made)


@pytest.mark.parametrize(
    ("transform", "sizes", "error", "message"),
    [
        (AudioTransform(), (1, 1, 49, 10), InputError, r"\(1, 1, 49, 10\) is not a waveform .* of a Waveform"),
        (AudioTransform(), (1, 49, 10), InputError, "is not a waveform"),
        (AudioTransform(length=200), (1, 300), OptionError, "length=200, but the model takes 300"),
        (AudioTransform(channels=2), (1, 1, 300), OptionError, "channels=2, but the model takes 1"),
    ],
)
def test_refused_inputs_of_a_model(transform: Any, sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transform.fitted(sizes)


def test_recordings_that_do_not_fit() -> None:
    recording = Waveform(torch.zeros(3, 10), 44100)
    with pytest.raises(InputError, match=r"has 44100 frames per second; the model takes 16000.*ffmpeg .* -ar 16000"):
        AudioTransform(rate=16000)(recording)
    with pytest.raises(InputError, match="has 3 channels, but the model takes 2"):
        AudioTransform(channels=2)(recording)
    with pytest.raises(InputError, match="takes a Waveform, not a Tensor"):
        AudioTransform()(torch.zeros(3))
    for options in ({"rate": 0}, {"length": 1.5}, {"channels": True}):
        with pytest.raises(OptionError, match="must be a positive integer or None"):
            AudioTransform(**options)
    assert pickle.loads(pickle.dumps(AudioTransform(16000))) == AudioTransform(16000)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = write(tmp_path / "a.wav")
    whole = path.read_bytes()

    def refuses(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"a\.wav {message}"):
            read_value(path)

    refuses(b"", "cannot be read as WAV")
    refuses(b"RIFFtext", "cannot be read as WAV")
    refuses(whole[:20], "cannot be read as WAV")
    refuses(whole[:244], "is cut off: its header says 400 frames, but it has 100")
    refuses(whole[:20] + struct.pack("<H", 3) + whole[22:], "is a recording in another encoding.*pip install soundfile")
    write(path, WAVE[:0])
    refuses(path.read_bytes(), "has no frames")
    other = tmp_path / "a.flac"
    other.write_bytes(b"fLaC")
    with pytest.raises(InputError, match=r"a\.flac is a recording of this type; .*pip install soundfile"):
        read_value(other)


def test_other_encodings_are_read_by_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = types.ModuleType("soundfile")
    double.read = lambda *_, dtype, **__: (np.ones((7, 2), dtype), 8000)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soundfile", double)
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC")
    found = read_value(path)
    assert (found.samples.tolist(), found.rate) == ([[1.0] * 7] * 2, 8000)


def test_damaged_recordings_give_typed_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav")
    whole, rng, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(600):
        path.write_bytes(mutated_bytes(whole, rng))
        try:
            read_value(path)
        except InputError:
            refused += 1
    assert refused > 100


def test_an_empty_recording_is_named_with_a_reason_and_a_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.touch()
    with pytest.raises(InputError, match=r"a\.wav cannot be read as WAV: it ends within its header\. Copy it again, "):
        read_value(path)
