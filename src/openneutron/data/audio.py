"""Reads recordings from files, and converts them to inputs of a model."""

from __future__ import annotations

import errno
import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.files import access_refused
from openneutron.core.messages import first_line
from openneutron.data.files import AUDIO
from openneutron.errors import InputError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["AudioTransform", "Waveform", "read_waveform"]

# More channels than this are not those of a recording, but features or time.
MOST_CHANNELS = 8


@dataclass(frozen=True)
class Waveform:
    """A recording: float32 `samples` [channels, frames] from -1 to 1, and the `rate` in frames per second."""

    samples: Tensor
    rate: int


def read_waveform(path: Path) -> Waveform:
    """Reads a WAV file of integers of 8, 16, 24 or 32 bits, and, if soundfile is installed, files of other formats.

    Integers are divided by 2^(bits - 1). Raises `InputError`, which names the file, if it is damaged, empty, cut off,
    or needs soundfile.
    """
    reason = "of this type"
    if path.suffix.lower() in AUDIO:
        try:
            with wave.open(str(path), "rb") as file:
                return _of_wave(path, file)
        except InputError:
            raise
        except PermissionError as error:
            raise access_refused(path, error) from error
        except (OSError, EOFError, RuntimeError, ValueError, ZeroDivisionError) as error:  # of a damaged header
            raise InputError(_unreadable(path, "WAV", error)) from error
        except wave.Error as error:
            if "format" not in str(error):
                raise InputError(_unreadable(path, "WAV", error)) from error
            reason = f"in another encoding than integers ({error})"
    return _of_soundfile(path, reason)


def _unreadable(path: Path, kind: str, error: Exception) -> str:
    reason = "it ends within its header" if isinstance(error, EOFError) else first_line(error).rstrip(".")
    return f"{path} cannot be read as {kind}: {reason}. Copy it again, or remove it from the data."


def _of_wave(path: Path, file: wave.Wave_read) -> Waveform:
    import numpy as np

    channels, width, frames = file.getnchannels(), file.getsampwidth(), file.getnframes()
    data = file.readframes(frames)
    found = len(data) // (channels * width)
    if found < frames:
        raise InputError(
            f"{path} is cut off: its header says {frames} frames, but it has {found}. Copy it again, or remove it."
        )
    if not frames:
        raise InputError(f"{path} has no frames.")
    if width == 1:  # unsigned
        values = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        codes = np.zeros((len(data) // 3, 4), np.uint8)
        codes[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)  # into the upper bytes of 32 bits
        values = codes.view("<i4")[:, 0] / np.float32(2**31)
    elif width in (2, 4):
        values = np.frombuffer(data, f"<i{width}") / np.float32(2 ** (8 * width - 1))
    else:
        raise InputError(
            f"{path} has {8 * width} bits per value. Convert it to WAV with integers of 8, 16, 24 or 32 bits."
        )
    return _waveform(values.reshape(-1, channels), file.getframerate())


def _of_soundfile(path: Path, reason: str) -> Waveform:
    try:
        import soundfile
    except ImportError as error:
        raise InputError(
            f"{path} is a recording {reason}; reading it needs soundfile. Install it: pip install soundfile."
        ) from error
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, ValueError) as error:
        if not os.access(path, os.R_OK):
            raise access_refused(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES))) from error
        raise InputError(_unreadable(path, "a recording", error)) from error
    if not len(values):
        raise InputError(f"{path} has no frames.")
    return _waveform(values, rate)


def _waveform(values: np.ndarray[Any, Any], rate: int) -> Waveform:
    """Returns a waveform of `values` [frames, channels]."""
    import numpy as np
    import torch

    return Waveform(torch.from_numpy(np.ascontiguousarray(values.T, np.float32)), rate)


@dataclass(frozen=True)
class AudioTransform:
    """Converts a `Waveform` to a float tensor: [T], or [C, T] for a model whose inputs have channels.

    - `rate`: the rate that the model was trained with, in frames per second. A recording of another rate raises
      `InputError`, because recordings are not resampled. None accepts any rate.
    - `channels`: None returns [T], a number returns [C, T]. For None and 1, the channels of a recording are averaged;
      any other number must equal the number of channels of the recording.
    - `length`: the number of frames T. A longer recording loses its end, a shorter one is padded with zeros at its end.
      None keeps the length.

    `fitted` takes channels and length from the model. The object can be pickled and compared.
    """

    rate: int | None = None
    channels: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "channels", "length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} must be a positive integer or None, not {value!r}.")

    def fitted(self, sizes: Sequence[int | None]) -> AudioTransform:
        """Returns the transform with channels and length of a model's input: [N, T], [N, C, T], or [T].

        Raises `InputError` for an input of another form, and `OptionError` if the transform has other numbers.
        """
        channels = sizes[1] if len(sizes) == 3 else None
        if len(sizes) not in (1, 2, 3) or (len(sizes) == 3 and (channels is None or channels > MOST_CHANNELS)):
            shape = ", ".join("any" if size is None else str(size) for size in sizes)
            raise InputError(
                f"The model's input ({shape}) is not a waveform [N, T] or [N, C, T]. Give a transform that computes "
                "the model's features of a Waveform."
            )
        for name, own, wanted in (("channels", self.channels, channels), ("length", self.length, sizes[-1])):
            if None not in (own, wanted) and own != wanted:
                raise OptionError(
                    f"{name}={own}, but the model takes {wanted}. Give {name}={wanted}, or leave {name} out."
                )
        return replace(self, channels=channels, length=sizes[-1] or self.length)

    def __call__(self, waveform: Any) -> Tensor:
        """Returns a float32 tensor [T] or [C, T]."""
        if not isinstance(waveform, Waveform):
            raise InputError(
                f"AudioTransform takes a Waveform, not a {type(waveform).__name__}. Give data that are WAV files."
            )
        if self.rate not in (None, waveform.rate):
            raise InputError(
                f"The recording has {waveform.rate} frames per second; the model takes {self.rate}. Resample it first: "
                f"ffmpeg -i in.wav -ar {self.rate} out.wav."
            )
        samples = waveform.samples
        if self.channels in (None, 1):
            samples = samples.mean(0, keepdim=True)
        if self.channels not in (None, len(samples)):
            raise InputError(
                f"The recording has {len(samples)} channels, but the model takes {self.channels}. Convert it: ffmpeg "
                f"-i in.wav -ac {self.channels} out.wav."
            )
        if self.length is not None:
            missing = self.length - samples.shape[1]
            samples = _padded(samples, missing) if missing > 0 else samples[:, : self.length]
        return samples[0].contiguous() if self.channels is None else samples.contiguous()


def _padded(samples: Tensor, count: int) -> Tensor:
    import torch

    return torch.nn.functional.pad(samples, (0, count))
