"""Calibration: results do not depend on batches or processes; convergence stops it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
import torch.nn.functional as F
from joblib.externals.loky import get_reusable_executor
from tests.flow_support import convert, lower_documented, qparams, seeded
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.calibration import CalibrationOptions, calibrate
from openneutron.calibration.bare_graph import SINGLE, Batches, bare_graph, batching_failure, choose_batches
from openneutron.calibration.run import _observers_by_name
from openneutron.core.evaluation import GraphRun
from openneutron.core.parallel import WorkerWarning, map_in_order, split
from openneutron.errors import CalibrationError, OptionError
from openneutron.quantizer import DistributionObserver

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


def images(count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """Convolutions, a view with a constant batch size, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.conv(x)).reshape(x.shape[0], 8, 64)
        weights = torch.softmax(rows @ rows.transpose(1, 2), dim=-1)
        result: Tensor = self.linear(weights @ rows).mean(1)
        return result


def prepared(model: nn.Module | None = None, inputs: tuple[Tensor, ...] = EXAMPLE, **options: Any) -> GraphModule:
    module = torch.export.export((model or seeded(Network)).eval(), inputs).module()
    result: GraphModule = prepare_pt2e(module, NeutronQuantizer(**options))
    return result


def states(module: GraphModule) -> list[Tensor]:
    """Returns the state of all observers of activations."""
    merging = [observer for observer in _observers_by_name(bare_graph(module)).values() if hasattr(observer, "state")]
    return [value for observer in merging for value in observer.state().values()]


def equal(one: GraphModule, other: GraphModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states(one), states(other), strict=True))


def calibrated(samples: list[tuple[Tensor, ...]], **options: Any) -> GraphModule:
    module = prepared()
    assert calibrate(module, samples, CalibrationOptions(**options)) == len(samples)
    return module


def singles(count: int) -> list[tuple[Tensor, ...]]:
    return [(image[None],) for image in images(count)]


# ------------------------------------------------------------------------------------------------------------ batches


class OverTheBatch(nn.Module):
    """Its outputs have the right shape for a batch, but are not the outputs of the single samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True).expand(x.shape[0], -1, -1, -1) * x.shape[0]


class BatchLast(nn.Module):
    """Samples are the last dimension of its output."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(1, 0, 2, 3).reshape(3, 64).t()


class Applied(nn.Module):
    """A function of the input, and a convolution."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.conv)


def read_twice(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    return F.relu(y) + y


def product_with_integers(x: Tensor, conv: nn.Module) -> Tensor:
    y: Tensor = conv(x)
    return y * torch.clamp((x > 0).int() + 1, 0.5, 1.5)


class TestBareGraph:
    @pytest.mark.parametrize(
        ("function", "operator"),
        [
            (lambda x, conv: F.relu(conv(x)), "relu_.default"),
            (lambda x, conv: F.relu6(conv(x)), "relu6_.default"),
            (lambda x, conv: F.relu(x + conv(x)), "relu_.default"),
            (read_twice, "relu.default"),
            (lambda x, conv: conv(F.relu(x)), "relu.default"),
            (lambda x, conv: F.relu(F.max_pool2d(conv(x), 1)), "relu.default"),
            (product_with_integers, "clamp.default"),
        ],
        ids=["convolution", "relu6", "sum", "read twice", "an input", "observed", "integers"],
    )
    def test_activations_overwrite_operands_without_other_readers(self, function: Any, operator: str) -> None:
        module = prepared(seeded(lambda: Applied(function)))
        single, inputs = bare_graph(module), images()
        kept = inputs.clone()
        assert operator in [str(node.target).removeprefix("aten.") for node in single.graph.nodes]
        with torch.no_grad():
            assert torch.equal(single(inputs)[0], module(kept.clone()))
        assert torch.equal(inputs, kept)


class TestBatches:
    def test_the_bare_graph_computes_the_values_of_the_prepared_graph(self) -> None:
        one, other = prepared(), prepared()
        samples = singles(5)
        calibrate(one, samples, CalibrationOptions(batch_size=1))
        with torch.no_grad():
            for inputs in samples:
                other(*inputs)
        assert equal(one, other)
        scales = [
            [node.args[1] for node in convert_pt2e(module).graph.nodes if "quantize_per_tensor" in str(node.target)]
            for module in (one, other)
        ]
        assert scales[0] == scales[1]
        assert len(scales[0]) > 10

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize(("count", "options"), [(1, {}), (5, {"batch_size": 1})], ids=["one sample", "one by one"])
    def test_single_samples_give_the_ranges_of_the_documented_flow(
        self, count: int, options: dict[str, Any], strict: bool
    ) -> None:
        short = quantize(seeded(Network), EXAMPLE, singles(count), recover=None, strict=strict, **options)
        documented = convert(seeded(Network), EXAMPLE, calibration=singles(count), strict=not strict)
        assert qparams(short.module) == qparams(documented)
        assert lower(short).buffer == lower_documented(documented, EXAMPLE, with_names=True).pte

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_the_memory_address_of_samples_does_not_change_results(self, jobs: int) -> None:
        """Matrix products differ in the last bit with the memory address of samples; the result must not."""
        rows = torch.split(torch.randn(24, 27, generator=torch.Generator().manual_seed(0)), 3)
        assert {row.data_ptr() % 16 for row in rows} == {0, 4, 8, 12}
        one, other = (prepared(seeded(lambda: nn.Linear(27, 10)), (rows[0],)) for _ in range(2))
        calibrate(one, [(row,) for row in rows], CalibrationOptions(batch_size=1, jobs=jobs))
        calibrate(other, [(row.clone(),) for row in rows], CalibrationOptions(batch_size=1))
        assert equal(one, other)

    def test_a_batch_is_as_good_as_its_samples(self) -> None:
        one, other = calibrated(singles(20), batch_size=1), calibrated(singles(20), batch_size=8)
        for a, b in zip(
            _observers_by_name(bare_graph(one)).values(), _observers_by_name(bare_graph(other)).values(), strict=True
        ):
            if isinstance(a, DistributionObserver):
                for name, seen in a.state().items():  # values of one observer come in another order
                    torch.testing.assert_close(seen.sort(0).values, b.state()[name].sort(0).values)

    def test_a_batch_size_is_chosen_if_batches_are_proven_exact(self) -> None:
        single = bare_graph(prepared(nn.Linear(8, 4)))
        assert choose_batches(single, singles(20), None) == Batches(16)
        assert choose_batches(single, singles(7), None) == Batches(7)
        assert choose_batches(single, singles(1), None) == SINGLE

    @pytest.mark.parametrize(
        ("model", "shape", "expected"),
        [
            (nn.Conv2d(3, 8, 1), (3, 8, 8), Batches(16, channels_last=True)),
            (nn.Conv2d(3, 8, 1), (3, 256, 256), Batches(12, channels_last=True)),
            (nn.Conv2d(3, 8, 1), (3, 1024, 1024), Batches(1, channels_last=True)),
            (nn.Linear(4, 4), (2**14, 4), Batches(4)),
            (nn.Linear(4, 4), (2**18, 4), SINGLE),
            (nn.Conv1d(3, 8, 1), (3, 2**16), SINGLE),
            (Applied(lambda x, conv: conv(x).view(x.shape[0], -1)), (3, 8, 8), Batches(16, channels_last=True)),
        ],
        ids=["an image", "a large one", "the largest", "no image", "large, no image", "a row", "a view"],
    )
    def test_images_are_run_in_channels_last(self, model: nn.Module, shape: tuple[int, ...], expected: Batches) -> None:
        samples: list[tuple[Tensor, ...]] = [(torch.randn(1, *shape),)] * 16
        single = bare_graph(prepared(model, samples[0]))
        assert choose_batches(single, samples, None) == expected
        if expected != SINGLE:
            assert batching_failure(single, samples, expected) is None

    def test_channels_last_sees_the_same_extremes_and_gives_equal_ranges_to_all_workers(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        samples: list[tuple[Tensor, ...]] = [
            (torch.randn(1, 3, 260, 260, generator=torch.Generator().manual_seed(seed)),) for seed in range(19)
        ]
        one, all_at_once, shared = (prepared(seeded(lambda: model), samples[0]) for _ in range(3))
        assert choose_batches(bare_graph(one), samples, None) == Batches(16, channels_last=True)
        calibrate(one, samples, CalibrationOptions(batch_size=1))
        calibrate(all_at_once, samples)
        calibrate(shared, samples, CalibrationOptions(jobs=2))
        assert equal(all_at_once, shared)
        for a, b in zip(
            _observers_by_name(bare_graph(one)).values(),
            _observers_by_name(bare_graph(all_at_once)).values(),
            strict=True,
        ):
            if isinstance(a, DistributionObserver):
                torch.testing.assert_close((a.min_val, a.max_val), (b.min_val, b.max_val))

    @pytest.mark.parametrize(
        ("model", "reason"),
        [(OverTheBatch(), "has shape|Output 0 of a batch differs"), (BatchLast(), "has shape ")],
        ids=["outputs differ", "batch last"],
    )
    def test_models_whose_batches_are_not_proven_are_refused(self, model: nn.Module, reason: str) -> None:
        module = prepared(seeded(lambda: Returns(model)))
        assert choose_batches(bare_graph(module), singles(8), None) == SINGLE
        with pytest.raises(OptionError, match=f"does not run in batches of 8: .*({reason}).* Leave batch_size out"):
            calibrate(module, singles(8), CalibrationOptions(batch_size=8))

    @pytest.mark.parametrize("network", [nn.LSTM, nn.GRU, nn.RNN])
    def test_a_recurrent_network_in_float_runs_one_sample_at_a_time(self, network: Callable[..., nn.Module]) -> None:
        model = seeded(lambda: LastStep(network(4, 8, batch_first=True))).eval()
        samples = torch.split(torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(0)), 1)
        quantized = quantize(model, samples[:1], samples, recover=None, layers={"network": "float"}, progress=False)
        for sample in samples:
            torch.testing.assert_close(quantized(sample), model(sample), atol=0.05, rtol=0)

    def test_the_choice_of_batches_runs_two_samples_and_one_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs: list[GraphRun] = []
        run = GraphRun.run

        def counted(graph: GraphRun) -> Any:
            runs.append(graph)
            return run(graph)

        monkeypatch.setattr(GraphRun, "run", counted)
        assert choose_batches(bare_graph(prepared()), singles(8), None) != SINGLE
        assert len(runs) == 3

    def test_batches_of_the_prepared_model_are_proven_exact(self) -> None:
        assert batching_failure(bare_graph(prepared()), singles(3), Batches(3)) is None


class LastStep(nn.Module):
    """The last output of a recurrent network, and a linear."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(8, 3)

    def forward(self, steps: Tensor) -> Tensor:
        scores: Tensor = self.head(self.network(steps)[0][:, -1])
        return scores


class Returns(nn.Module):
    """A convolution and the first output of a module after it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.conv, self.module = nn.Conv2d(3, 3, 1), module

    def forward(self, x: Tensor) -> Tensor:
        result = self.module(self.conv(x))
        return F.relu(result[0] if isinstance(result, tuple) else result)


# ------------------------------------------------------------------------------------------------------------ processes


class Fragile(DistributionObserver):
    """Ends its worker process: always if FRAGILE_FOLDER is "always", else once, and writes the file `died` there."""

    def forward(self, values: Tensor) -> Tensor:
        folder = os.environ.get("FRAGILE_FOLDER")
        if folder is not None and os.getpid() != int(os.environ["FRAGILE_MAIN"]):
            died = Path(folder) / "died"
            if folder == "always" or not died.exists():
                if folder != "always":
                    died.touch()
                os._exit(9)
        return super().forward(values)


@contextmanager
def fresh_workers() -> Iterator[None]:
    """Starts workers with the current environment, and ends them after the test."""
    get_reusable_executor().shutdown(wait=True)
    try:
        yield
    finally:
        get_reusable_executor().shutdown(wait=True)


@contextmanager
def dask_cluster() -> Iterator[None]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
        Client(cluster),
    ):
        yield


@contextmanager
def ray_cluster() -> Iterator[None]:
    import ray
    from ray.util.joblib import register_ray

    # Ray sets environment variables when a worker starts. Workers need paths to find the tests.
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    register_ray()
    try:
        yield
    finally:
        ray.shutdown()


CLUSTERS: dict[str, Callable[[], AbstractContextManager[None]]] = {"dask": dask_cluster, "ray": ray_cluster}


def square(value: Any) -> int:
    return sum(int(x) ** 2 for x in value)


def fail(value: Any) -> int:
    raise CalibrationError(f"no {list(value)}")


class TestProcesses:
    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Sets torch to one thread, because OpenNeutron warns about workers with more threads than cores."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{"batch_size": 1}, {}, {"batch_size": 4}], ids=str)
    def test_the_result_is_the_same_to_the_bit(self, options: dict[str, Any]) -> None:
        one = calibrated(singles(21), **options)
        for jobs in (2, 3):
            assert equal(one, calibrated(singles(21), jobs=jobs, **options))

    @pytest.mark.slow
    def test_the_converted_model_is_the_same(self) -> None:
        models = [quantize(seeded(Network), EXAMPLE, images(40), jobs=jobs) for jobs in (1, 2)]
        assert torch.equal(models[0].module(images()), models[1].module(images()))

    @pytest.mark.slow
    @pytest.mark.parametrize("folder", ["once", "always"])
    def test_a_worker_that_dies(self, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = prepared(observer=Fragile)
        calibrate(expected, singles(40))
        monkeypatch.setenv("FRAGILE_MAIN", str(os.getpid()))
        monkeypatch.setenv("FRAGILE_FOLDER", "always" if folder == "always" else str(tmp_path))
        module = prepared(observer=Fragile)
        with fresh_workers(), pytest.warns(WorkerWarning, match="A worker failed: TerminatedWorkerError"):
            calibrate(module, singles(40), CalibrationOptions(jobs=2))
        assert equal(expected, module)

    def test_observers_that_do_not_merge(self) -> None:
        module = prepared(observer=HistogramObserver)
        for options in ({"jobs": 2}, {"stop_when_converged": True}):
            with pytest.raises(OptionError, match="the model has HistogramObserver"):
                calibrate(module, singles(2), CalibrationOptions(**options))
        assert calibrate(module, singles(2)) == 2

    def test_errors_of_ours_are_raised_at_once(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", WorkerWarning)
            with pytest.raises(CalibrationError, match=r"no \["):
                list(map_in_order(fail, split(range(4), 4), 2))

    @pytest.mark.slow
    def test_too_many_threads_cause_a_warning(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(512)
        try:
            with pytest.warns(WorkerWarning, match="torch.set_num_threads"):
                next(iter(map_in_order(square, split(range(1, 4), 3), 2)))
        finally:
            torch.set_num_threads(threads)

    def test_parts(self) -> None:
        assert [list(part) for part in split(range(10), 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert [len(part) for part in split(range(10), 4, 4)] == [4, 4, 2]
        assert split([], 3) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["dask", "ray"])
    def test_on_a_cluster(self, backend: str) -> None:
        expected = calibrated(singles(40))
        module = prepared()
        with CLUSTERS[backend](), joblib.parallel_config(backend=backend), warnings.catch_warnings():
            warnings.simplefilter("error", WorkerWarning)
            calibrate(module, singles(40), CalibrationOptions(jobs=2))
        assert equal(expected, module)

    @pytest.mark.parametrize(
        "options",
        [
            {"jobs": 0}, {"jobs": "two"}, {"batch_size": 0}, {"batch_size": True}, {"progress": 1},
            {"stop_when_converged": 3},
        ],
    )  # fmt: skip
    def test_invalid_options_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=next(iter(options))):
            quantize(seeded(Network), EXAMPLE, images(2), **options)


# ---------------------------------------------------------------------------------------------------------- convergence


class TestConvergence:
    def steady(self, count: int) -> list[tuple[Tensor, ...]]:
        return singles(4) * (count // 4)

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_calibration_stops_when_ranges_converge(self, jobs: int, caplog: pytest.LogCaptureFixture) -> None:
        module = prepared()
        with caplog.at_level(logging.INFO, "openneutron"):
            used = calibrate(module, self.steady(160), CalibrationOptions(stop_when_converged=True, jobs=jobs))
        assert used in (64, 96)  # with more values, the extremes have less weight, which changes the range again
        assert f"used {used} of 160 samples" in caplog.text
        reference = prepared()
        calibrate(reference, self.steady(used))
        assert equal(module, reference)

    def test_calibration_continues_while_ranges_move(self) -> None:
        growing = [(x * (1 + index),) for index, (x,) in enumerate(self.steady(160))]
        assert calibrate(prepared(), growing, CalibrationOptions(stop_when_converged=True)) == 160


class TestProgress:
    @pytest.mark.parametrize("shown", [True, False, None])
    def test_the_progress_bar_is_shown_on_request(self, shown: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
        calibrate(prepared(), singles(3), CalibrationOptions(progress=shown))
        captured = capsys.readouterr()
        assert ("3/3" in captured.err) is bool(shown)
        assert not captured.out
