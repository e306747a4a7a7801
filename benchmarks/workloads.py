"""The workloads of `benchmarks.compare`, which run in separate processes.

Usage: `python -m benchmarks.workloads NAME OUT [ARG ...]`.

A workload is a function of the command line's arguments. Its result is written to the file OUT as JSON.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Figures = dict[str, Any]

CALIBRATION_IMAGES = 10
SHAPE = (1, 3, 224, 224)
SMALL_CONSTANT = 64  # bytes; shorter constants, and zeros, may occur twice in a file by chance
CHAIN_CHANNELS, CHAIN_SIZE = 8, 8


def bench_folder() -> Path | None:
    """Return the folder of upstream_flow.py: OPENNEUTRON_BENCH, else ../shared/bench. None if there is no such file."""
    folder = Path(os.environ.get("OPENNEUTRON_BENCH") or Path(__file__).parents[2] / "shared" / "bench")
    return folder if (folder / "upstream_flow.py").is_file() else None


def upstream() -> Any:
    """Return the module upstream_flow, which runs ExecuTorch's own backend."""
    sys.path.insert(0, str(bench_folder()))
    return importlib.import_module("upstream_flow")


# --------------------------------------------------------------------------------------------------------------- models


def mobilenet_v2() -> tuple[Any, str]:
    """Return MobileNetV2 without weights, and its source: torchvision if it is installed, else this repository."""
    try:
        if folder := bench_folder():
            sys.path.insert(0, str(folder))
            importlib.import_module("torchvision_cpu_shim")
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):
        from .models import MobileNetV2

        return MobileNetV2(), "benchmarks.models"
    return models.mobilenet_v2(), "torchvision"


def images(count: int, seed: int) -> list[Any]:
    """Return `count` smooth images [1, 3, 224, 224] of different means and contrasts, so that logits differ.

    A network that averages over an image cannot distinguish images of white noise.
    """
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 7, 7, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)
    return list(torch.split(interpolate(coarse, SHAPE[2:], mode="bilinear"), 1))


def prepare_model(weights: str) -> Figures:
    """Create the model and save its weights: random with seed 0, batch norms fitted to `images`.

    With the initial statistics of batch norms, activations shrink from layer to layer, and the logits are constant.
    """
    import torch

    torch.manual_seed(0)
    model, source = mobilenet_v2()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
    with torch.no_grad():
        model.train()
        model(torch.cat(images(32, seed=2)))
        model.eval()
        logits = torch.cat([model(image) for image in images(CALIBRATION_IMAGES, seed=1)])
    torch.save(model.state_dict(), weights)
    return {
        "source": source,
        "logits_deviation": logits.std().item(),
        "logits_deviation_over_images": logits.std(0).mean().item(),
        "classes": len(set(logits.argmax(1).tolist())),
    }


def load_model(weights: str) -> Any:
    """Return the model of `prepare_model`."""
    import torch

    model = mobilenet_v2()[0]
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


# -------------------------------------------------------------------------------------------------- from export to .pte


class Stopwatch:
    """Processor seconds by stage, which other processes on the machine hardly change."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as the stage `name`."""
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


def documented(weights: str, memory_format: str, pte: str) -> Figures:
    """Convert the model in the documented flow, and save the program to `pte`."""
    import torch
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec

    model, inputs = load_model(weights), _in_format(images(CALIBRATION_IMAGES, seed=1), memory_format)
    example = (inputs[0],)
    watch = Stopwatch()
    with watch.stage("export"):
        exported = torch.export.export(model, example).module()
    with watch.stage("prepare"):
        prepared = prepare_pt2e(exported, NeutronQuantizer())
    with watch.stage("calibrate"), torch.no_grad():
        for image in inputs:
            prepared(image)
    with watch.stage("convert"):
        quantized = convert_pt2e(prepared)
    with watch.stage("export_quantized"):
        again = torch.export.export(quantized, example)
    with watch.stage("lower"):
        partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
        edge = to_edge_transform_and_lower(again, partitioner=[partitioner])
    with watch.stage("to_executorch"):
        program = edge.to_executorch()
    return _of_program(watch, bytes(program.buffer), pte)


def short(weights: str, memory_format: str, pte: str) -> Figures:
    """Convert the model with quantize() and lower(), and save the program to `pte`, next to the exported module."""
    import torch

    for imported in ("executorch.exir", "torchao.quantization.pt2e.quantize_pt2e", "openneutron.partition"):
        importlib.import_module(imported)  # imports are not timed
    from openneutron import lower, quantize

    model, inputs = load_model(weights), _in_format(images(CALIBRATION_IMAGES, seed=1), memory_format)
    watch = Stopwatch()
    with watch.stage("quantize"):
        quantized = quantize(model, (inputs[0],), inputs, recover=None)  # the other backend has no such step
    with watch.stage("lower"):
        program = lower(quantized)
    torch.export.save(torch.export.export(quantized.module, (inputs[0],)), f"{pte}.pt2")
    return _of_program(watch, program.buffer, pte)


def _in_format(values: list[Any], memory_format: str) -> list[Any]:
    import torch

    return [value.contiguous(memory_format=getattr(torch, memory_format)) for value in values]


def _of_program(watch: Stopwatch, buffer: bytes, pte: str) -> Figures:
    Path(pte).write_bytes(buffer)
    models = tflite_models(buffer)
    Path(f"{pte}.tflite").write_bytes(max(models, key=len))
    return {
        "seconds": watch.seconds,
        "total_seconds": sum(watch.seconds.values()),
        "sha256": hashlib.sha256(buffer).hexdigest(),
        "delegates": len(models),
        "cpu_operators": cpu_operators(buffer),
        "tflite": [describe_tflite(model) for model in models],
        "pte_bytes": len(buffer),
    }


def tflite_models(buffer: bytes) -> list[bytes]:
    """Return the TFLite model of each delegate of a `.pte` with portable payloads."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    from openneutron.formats.payload import parse

    program = deserialize_pte_binary(buffer).program
    return [
        parse(program.backend_delegate_data[delegate.processed.index].data).tflite
        for plan in program.execution_plan
        for delegate in plan.delegates
    ]


def cpu_operators(buffer: bytes) -> dict[str, int]:
    """Count the kernels that a `.pte` calls on the CPU, without quantize and dequantize."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plan = deserialize_pte_binary(buffer).program.execution_plan[0]
    calls = [getattr(each.instr_args, "op_index", None) for each in plan.chains[0].instructions]
    names = [plan.operators[index].name for index in calls if index is not None]
    return dict(Counter(name for name in names if not name.startswith("quantized_decomposed::")))


def _interpreter(model: bytes, *, xnnpack: bool) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=model, num_threads=1, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    return interpreter


def describe_tflite(model: bytes) -> Figures:
    """Count a model's operators by kind, its bytes, and the constants that it stores more than once."""
    interpreter = _interpreter(model, xnnpack=False)
    operators = interpreter._get_ops_details()
    written = {index for operator in operators for index in operator["outputs"]}
    written |= {details["index"] for details in interpreter.get_input_details()}
    read = {index for operator in operators for index in operator["inputs"] if index >= 0}
    constants = {interpreter.get_tensor(index).tobytes() for index in read - written}
    return {
        "operators": dict(Counter(operator["op_name"] for operator in operators)),
        "count": len(operators),
        "bytes": len(model),
        "repeated_constants": sum(
            model.count(value) > 1 for value in constants if len(value) >= SMALL_CONSTANT and any(value)
        ),
    }


def upstream_backend(weights: str, flow: str, tflite: str) -> Figures:
    """Convert the model with ExecuTorch's own backend and a stub of its SDK, and save its largest TFLite model."""
    flows = upstream()
    model, inputs = load_model(weights), images(CALIBRATION_IMAGES, seed=1)
    flows.load()  # imports are not timed
    flows.time = SimpleNamespace(perf_counter=time.process_time)  # its stages are processor seconds, too
    result = flows.run(model, (inputs[0],), [(image,) for image in inputs], flow=flow, strict=True)
    Path(tflite).write_bytes(max(result["tflite"], key=len))
    return {
        "seconds": result["seconds"],
        "total_seconds": result["total_seconds"],
        "delegates": result["partitions"],
        "cpu_operators": {name: n for name, n in result["cpu_operators"].items() if "aten.permute_copy" not in name},
        "tflite": [describe_tflite(each) for each in result["tflite"]],
        "pte_bytes": result["pte_bytes"],
    }


# ---------------------------------------------------------------------------------------------------------------- chain


def chain_of(blocks: int) -> Any:
    """Return a chain of `blocks` residual blocks of two convolutions with batch norm, each followed by ReLU."""
    from torch import Tensor, nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(CHAIN_CHANNELS, CHAIN_CHANNELS, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(CHAIN_CHANNELS)
            self.conv2 = nn.Conv2d(CHAIN_CHANNELS, CHAIN_CHANNELS, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(CHAIN_CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.relu(self.bn1(self.conv1(x)))
            return functional.relu(self.bn2(self.conv2(y)) + x)

    return nn.Sequential(*(Block() for _ in range(blocks))).eval()


class Meter:
    """Sums the seconds in wrapped methods. Does not add the seconds of a call inside another wrapped method again."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = False

    def wrap(self, owner: type, *names: str) -> None:
        """Wrap the methods in `names` that the class `owner` defines."""
        for name in names:
            method = owner.__dict__.get(name)
            if method is not None:
                static = isinstance(method, staticmethod)
                counted = self._counted(method.__func__ if static else method)
                setattr(owner, name, staticmethod(counted) if static else counted)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self._running:
                return call(*arguments, **options)
            self._running, start = True, time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self._running = False
                self.seconds += time.perf_counter() - start

        return counted


def chain(whose: str, blocks: str, rounds: str) -> Figures:
    """Lower a chain of `blocks` residual blocks in the documented flow. Return each round's seconds in own code."""
    import torch

    torch.manual_seed(0)
    model, example = chain_of(int(blocks)), (torch.randn(1, CHAIN_CHANNELS, CHAIN_SIZE, CHAIN_SIZE),)
    quantizer, partitioner, backend, lower = _ours_for_chain() if whose == "ours" else _theirs_for_chain()
    meter = Meter()
    meter.wrap(type(quantizer()), "transform_for_annotation", "annotate")
    meter.wrap(partitioner, "transform_for_pre_decomposition", "partition")
    meter.wrap(backend, "preprocess")
    seconds = []
    for _ in range(int(rounds)):
        meter.seconds = 0.0
        lower(_quantized(model, example, quantizer()), example)
        seconds.append(meter.seconds)
    return {"seconds": seconds}


def _quantized(model: Any, example: tuple[Any, ...], quantizer: Any) -> Any:
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, example, strict=True).module(), quantizer)
    with torch.no_grad():
        prepared(*example)
    return convert_pt2e(prepared)


def _ours_for_chain() -> tuple[Any, Any, Any, Callable[..., Any]]:
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from openneutron import NeutronBackend, NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec

    def lower(quantized: Any, example: tuple[Any, ...]) -> None:
        spec = generate_neutron_compile_spec("imxrt700")
        to_edge_transform_and_lower(
            torch.export.export(quantized, example, strict=True), partitioner=[NeutronPartitioner(spec)]
        )

    return NeutronQuantizer, NeutronPartitioner, NeutronBackend, lower


def _theirs_for_chain() -> tuple[Any, Any, Any, Callable[..., Any]]:
    """Prepare the other backend as its example script does, so that the chain becomes one partition."""
    import torch

    names, _ = upstream().load()
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    def lower(quantized: Any, example: tuple[Any, ...]) -> None:
        to_edge_transform_and_lower(
            torch.export.export(quantized, example, strict=True),
            transform_passes=names.edge_passes(),
            partitioner=[
                names.partitioner(
                    names.backend.generate_neutron_compile_spec("imxrt700"),
                    names.target,
                    post_quantization_state_dict=quantized.state_dict(),
                )
            ],
            compile_config=EdgeCompileConfig(
                _check_ir_validity=False, _core_aten_ops_exception_list=names.backend.core_aten_ops_exception_list
            ),
        )

    return lambda: names.quantizer(names.target), names.partitioner, names.backend.NeutronBackend, lower


# ------------------------------------------------------------------------------------------------------------ inference


def _in_turn(runs: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Time each of `runs` `count` times in processor milliseconds. They alternate, after a few warm-up runs."""
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(-3, count):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_ >= 0:
                milliseconds[name].append((time.process_time() - start) * 1e3)
    return milliseconds


def _medians(runs: dict[str, Callable[[], object]], count: int) -> Figures:
    return {name: statistics.median(times) for name, times in _in_turn(runs, count).items()}


def _litert(file: str) -> Callable[[], object]:
    """Return a function that runs a TFLite file once: set input, invoke, get output; with XNNPACK, on one thread."""
    import numpy as np

    interpreter = _interpreter(Path(file).read_bytes(), xnnpack=True)
    (source,), (sink,) = interpreter.get_input_details(), interpreter.get_output_details()
    noise = np.random.default_rng(0)
    if np.issubdtype(source["dtype"], np.integer):
        limits = np.iinfo(source["dtype"])
        value = noise.integers(limits.min, limits.max, source["shape"], endpoint=True).astype(source["dtype"])
    else:
        value = noise.standard_normal(source["shape"]).astype(source["dtype"])

    def infer() -> object:
        interpreter.set_tensor(source["index"], value)
        interpreter.invoke()
        return interpreter.get_tensor(sink["index"])

    return infer


def inference(pte: str, count: str) -> Figures:
    """Time a `.pte` on the host against LiteRT on its TFLite, and against the quantized module in PyTorch."""
    import torch

    from openneutron import load

    program, image = load(pte), images(1, seed=3)[0]
    direct = _medians({"pte": lambda: program.run(image), "litert": _litert(f"{pte}.tflite")}, int(count))
    import executorch.kernels.quantized  # noqa: F401
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  the operators of quantize and dequantize

    module = torch.export.load(f"{pte}.pt2").module()
    with torch.no_grad():
        eager = _medians({"pte": lambda: program.run(image), "eager": lambda: module(image)}, max(5, int(count) // 10))
        agree = int(program.run(image).argmax()) == int(module(image).argmax())
    return {"direct": direct, "eager": eager, "threads": torch.get_num_threads(), "same_top1": agree}


def tflite_times(count: str, *files: str) -> Figures:
    """Time TFLite files in LiteRT, in turn; milliseconds in the order of `files`."""
    return {"milliseconds": list(_medians({file: _litert(file) for file in files}, int(count)).values())}


# -------------------------------------------------------------------------------------------------------------- imports


def import_seconds() -> Figures:
    """Time `import openneutron`."""
    start = time.perf_counter()
    importlib.import_module("openneutron")
    return {"seconds": time.perf_counter() - start, "torch": "torch" in sys.modules}


def imported_to_run(pte: str) -> Figures:
    """Load and run a `.pte`, and return the modules of exir, torchao and torch.export that this imports."""
    import numpy as np

    importlib.import_module("torch")
    before = set(sys.modules)
    from openneutron import load

    load(pte).run(np.zeros(SHAPE, np.float32))
    rooms = ("executorch.exir", "torchao", "torch.export", "torch._export")
    found = {
        room: sorted(name for name in sys.modules if f"{name}.".startswith(f"{room}.") and name not in before)
        for room in rooms
    }
    return {"beyond_torch": found, "torch_alone_brings": sorted(name for name in before if name == "torch.export")}


WORKLOADS: dict[str, Callable[..., Figures]] = {
    workload.__name__: workload
    for workload in (
        prepare_model, documented, short, upstream_backend, chain, inference, tflite_times, import_seconds,
        imported_to_run,
    )
}  # fmt: skip


def main() -> None:
    """Measure the workload of the command line."""
    name, out, *arguments = sys.argv[1:]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    Path(out).write_text(json.dumps(WORKLOADS[name](*arguments)))


if __name__ == "__main__":
    main()
