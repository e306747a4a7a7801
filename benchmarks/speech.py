"""Makes speech with espeak-ng, and the features that the speaker encoder of `resemblyzer` reads.

Needs the command `espeak-ng` (the Debian package of that name). The sentences are combined from lists of words, so no
recording is stored in the repository.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import wave
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["VOICES", "Recording", "recordings"]

VOICES = ("en-us+m1", "en-gb+m3", "en-us+f2", "en-gb+f4", "en-us+m7")
"""Five voices of espeak-ng: a dialect and a variant."""
SAMPLES_PER_SECOND = 16000
# The formula of the package's features: librosa's mel spectrogram of power with 25 ms windows every 10 ms.
WINDOW, STEP, BANDS = 400, 160, 40
TARGET_DBFS = -30.0

_SUBJECTS = (
    "the old captain", "my neighbour", "a young engineer", "every farmer", "the quiet child", "our teacher", "his aunt",
    "some visitors", "that doctor", "nobody else", "one tall singer", "their guide",
)  # fmt: skip
_VERBS = (
    "carried", "painted", "forgot", "measured", "found", "repaired", "described", "followed", "sold", "washed",
    "imagined", "borrowed",
)  # fmt: skip
_OBJECTS = (
    "a wooden boat", "the broken window", "seven blue stones", "her favourite song", "an empty valley", "red chairs",
    "the first letter", "some warm bread", "his new bicycle", "this large map", "every small key", "an orange lamp",
)  # fmt: skip
_ENDINGS = ("slept", "laughed", "went home", "called a friend", "waited outside", "drank some tea")


@dataclass(frozen=True)
class Recording:
    """The samples [N] at 16 kHz and the features [frames, 40] of one spoken sentence, and the number of its voice."""

    samples: Tensor
    features: Tensor
    voice: int


def recordings(count: int = 200) -> list[Recording]:
    """Returns `count` sentences, each spoken by one of `VOICES` in turn. Raises `RuntimeError` without espeak-ng.

    The words of each sentence are drawn with equal chances, independent of the voice.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is missing: install the Debian package espeak-ng.")
    draw, made = random.Random(0), []
    for number in range(count):
        voice = number % len(VOICES)
        words = [draw.choice(each) for each in (_SUBJECTS, _VERBS, _OBJECTS, _SUBJECTS, _ENDINGS)]
        spoken = _spoken("{} {} {}, and then {} {}.".format(*words), VOICES[voice])
        made.append(Recording(spoken, _features(spoken), voice))
    return made


def _spoken(text: str, voice: str) -> Tensor:
    """Returns mono samples [N] in -1 to 1 at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "--stdout", text]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(raw)) as reader:
        rate = reader.getframerate()
        samples = torch.frombuffer(bytearray(reader.readframes(reader.getnframes())), dtype=torch.int16).float() / 32768
    size = len(samples) * SAMPLES_PER_SECOND // rate
    return torch.nn.functional.interpolate(samples[None, None], size=size, mode="linear", align_corners=False)[0, 0]


def _features(samples: Tensor) -> Tensor:
    """Returns the mel spectrogram [frames, 40] of samples at 16 kHz, normalized to -30 dBFS."""
    level = 10 * torch.log10(samples.square().mean().clamp(min=1e-12))
    samples = samples * 10 ** ((TARGET_DBFS - float(level)) / 20)
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, STEP, window=window, pad_mode="constant", return_complex=True)
    return (_mel_filters() @ spectrum.abs().square()).T.contiguous()


def _mel_filters() -> Tensor:
    """Returns triangular filters [40, 201] on Slaney's mel scale, each with an area of 1 (librosa's default)."""
    frequencies = torch.linspace(0, SAMPLES_PER_SECOND / 2, WINDOW // 2 + 1)
    corners = _hertz(torch.linspace(0, float(_mel(torch.tensor(SAMPLES_PER_SECOND / 2.0))), BANDS + 2))
    widths = corners.diff()
    ramps = corners[:, None] - frequencies
    lower, upper = -ramps[:-2] / widths[:-1, None], ramps[2:] / widths[1:, None]
    return torch.minimum(lower, upper).clamp(min=0) * (2 / (corners[2:] - corners[:-2]))[:, None]


def _mel(hertz: Tensor) -> Tensor:
    """Slaney's scale: linear up to 1000 Hz, then logarithmic with 27 steps for a factor of 6.4."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * torch.log(hertz.clamp(min=1000) / 1000) / _LOG_6_4)


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * _LOG_6_4 / 27))


_LOG_6_4 = float(torch.log(torch.tensor(6.4)))
