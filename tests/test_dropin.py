"""Scripts for ExecuTorch's NXP backend run on OpenNeutron, with the same names."""

from __future__ import annotations

import json
import lzma
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import EdgeProgramManager, ExportedProgram, to_edge_transform_and_lower
from tests.flow_support import convert, seeded, worst_lsb
from tests.models import Model, conv, image, small
from torch import nn
from torch.export import export

import openneutron
from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec
from openneutron.core.fx import op_name
from openneutron.errors import InputError, OptionError
from openneutron.partition.quantized_io import FloatIOWarning
from openneutron.runtime import HostProgram

# Importing openneutron.dropin replaces a package of ExecuTorch in this process, so its modules are loaded as files of
# another package.
HOME = Path(openneutron.__path__[0]) / "dropin"


def load(name: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"dropin_{name}", HOME / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


passes, options, datasets = load("edge_passes"), load("options"), load("datasets")
quantization, visualization = load("quantization"), load("visualization")


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


IMPORTS = """
import openneutron.dropin
from executorch.backends.nxp.backend.custom_delegation_options import CustomDelegationOptions
from executorch.backends.nxp.backend.neutron_target_spec import NeutronTargetSpec
from executorch.backends.nxp.edge_passes.neutron_edge_pass import NeutronEdgePass
from executorch.backends.nxp.edge_passes.neutron_edge_pass_manager import NeutronEdgePassManager
from executorch.backends.nxp.edge_passes.remove_additional_quantize_dequantize_nodes_pass import (
    RemoveAdditionalQDQClustersPass)
from executorch.backends.nxp.edge_passes.remove_io_quant_ops_pass import RemoveIOQuantOpsPass
from executorch.backends.nxp.neutron_partitioner import NeutronPartitioner
from executorch.backends.nxp.nxp_backend import (
    NeutronCompileSpecBuilder, core_aten_ops_exception_list, generate_neutron_compile_spec)
from executorch.backends.nxp.quantizer.neutron_quantizer import NeutronQuantizer
from executorch.backends.nxp.quantizer.utils import calibrate_and_quantize
from executorch.backends.nxp.tests.calibration_dataset import CalibrationDataset, RandomCalibrationDataset
from executorch.devtools.visualization.visualization_utils import visualize_with_clusters
from executorch.examples.nxp.analyzing_with_inspector import parse_delegate_metadata
from executorch.backends.transforms.quantize_fused_convbn_bias_pass import QuantizeFusedConvBnBiasAtenPass
assert parse_delegate_metadata([b"\\x02"]) == ["Neutron kernel 2"]
NeutronPartitioner(generate_neutron_compile_spec("imxrt700"), NeutronTargetSpec("imxrt700"),
                   custom_delegation_options=CustomDelegationOptions(allow_no_op_partitions=True))
for name in ("executorch.backends.nxp.neutron_node_extraction", "executorch.backends.nxp.aten_passes"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "is not provided by openneutron.dropin" in str(error)
    else:
        raise AssertionError(name)
"""


def test_the_documented_names_exist(tmp_path: Path) -> None:
    run(IMPORTS, tmp_path)


SCRIPT = """
import sys, openneutron.dropin, runpy
try:
    import torchvision_cpu_shim
except ImportError:
    pass
sys.argv = ["aot", "-m", "mlperf_tiny_image_classification", "--use_random_dataset", *{arguments}]
runpy.run_module("executorch.examples.nxp.aot_neutron_compile", run_name="__main__")
"""


def _has_torchvision() -> bool:
    code = "try:\n    import torchvision_cpu_shim\nexcept ImportError: pass\nimport torchvision"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["-d", "-q", "--remove-quant-io-ops", "--use_channels_last_dim_order", "--visualize", "store"],
        ["-d", "-q", "--use_qat", "--operators_not_to_delegate", "aten::convolution"],
        ["-d", "-q", "--use_profiling", "--debug", "--dump_kernel_selection_code", "--fetch_constants_to_sram"],
    ],
)
def test_the_example_script_of_executorch(arguments: list[str], tmp_path: Path) -> None:
    if not _has_torchvision():
        pytest.skip("torchvision cannot be imported, which the script's models need")
    run(SCRIPT.format(arguments=arguments), tmp_path)
    (program,) = tmp_path.glob("*.pte")
    taken = HostProgram.from_bytes(program.read_bytes())
    wanted = torch.int8 if "--remove-quant-io-ops" in arguments else torch.float32
    assert [info.dtype for info in taken.inputs] == [wanted]
    stored = list(tmp_path.glob("*-visualization.json"))
    assert len(stored) == ("--visualize" in arguments)
    for path in stored:
        nodes = json.loads(path.read_text())["graphs"][0]["nodes"]
        assert any("call_delegate" in node["label"] for node in nodes)


def lowered(model: nn.Module, *inputs: torch.Tensor, **compile_options: Any) -> tuple[Any, EdgeProgramManager]:
    converted = convert(seeded(lambda: model), inputs)
    partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700", **compile_options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = to_edge_transform_and_lower(
            export(converted, inputs), transform_passes=passes.NeutronEdgePassManager(), partitioner=[partitioner]
        )
    return converted, manager


def names(program: ExportedProgram) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


def test_int8_at_the_ends_after_lowering() -> None:
    converted, manager = lowered(small(), image())
    manager = manager.transform([passes.RemoveIOQuantOpsPass(edge_program_manager=manager)])
    assert not [name for name in names(manager.exported_program()) if "quantize" in name]
    program = HostProgram.from_bytes(bytes(manager.to_executorch().buffer))
    (taken,), (given,) = program.inputs, program.outputs
    assert (taken.dtype, given.dtype) == (torch.int8, torch.int8)
    assert worst_lsb(converted, lambda x: given.dequantize(program.run(taken.quantize(x))), [(image(),)]) <= 1


def test_a_warning_names_inputs_and_outputs_that_stay_in_float() -> None:
    _, manager = lowered(Model(lambda m, x: torch.sin(m.c(x)), c=conv()), image())
    with pytest.warns(FloatIOWarning, match=r"output 0, aten\.sin\.default"):
        manager.transform([passes.RemoveIOQuantOpsPass(manager)])


@pytest.mark.parametrize("operator", ["permute_copy", "cat"])
def test_the_cpu_moves_int8_if_qparams_do_not_change(operator: str) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.c(x)
        moved = y.permute(0, 2, 3, 1) if operator == "permute_copy" else torch.cat([y, y], 1)
        return m.l(moved)  # type: ignore[no-any-return]

    blocked = [f"aten::{operator}"]
    model = Model(function, c=conv(channels_out=8), l=nn.Linear(8, 3))
    _, plain = lowered(model, image(), operators_not_to_delegate=blocked)
    _, manager = lowered(model, image(), operators_not_to_delegate=blocked)
    count = len(names(manager.exported_program()))
    manager = manager.transform(passes.NeutronEdgePassManager([passes.RemoveAdditionalQDQClustersPass()]))
    found = names(manager.exported_program())
    assert any(operator in name for name in found)
    assert len(found) < count
    before, after = (HostProgram.from_bytes(bytes(each.to_executorch().buffer)) for each in (plain, manager))
    assert torch.equal(before.run(image()), after.run(image()))


def test_the_cpu_computes_float_if_qparams_differ() -> None:
    _, manager = lowered(Model(lambda m, x: torch.sin(m.c(x)), c=conv()), image())
    before = names(manager.exported_program())
    manager = manager.transform(passes.NeutronEdgePassManager([passes.RemoveAdditionalQDQClustersPass()]))
    assert names(manager.exported_program()) == before


class TestCalibration:
    def test_batches_are_split(self) -> None:
        model, batch = seeded(small), image(5, 4, 8, 8)
        module = export(model, (image(),))
        split = quantization.calibrate_and_quantize(module, [(batch,)], NeutronQuantizer())
        alone = quantization.calibrate_and_quantize(module, [(x[None],) for x in batch], NeutronQuantizer())
        assert torch.equal(split(image()), alone(image()))

    def test_a_tensor_is_an_input(self) -> None:
        module = export(seeded(small), (image(),))
        quantized = quantization.calibrate_and_quantize(module, (image(),), NeutronQuantizer())
        assert torch.equal(
            quantized(image()),
            quantization.calibrate_and_quantize(module, [(image(),)], NeutronQuantizer())(image()),
        )

    @pytest.mark.parametrize("trains", [False, True])
    def test_training(self, trains: bool) -> None:
        seen: list[bool] = []

        def train(module: Any) -> None:
            seen.append(True)
            module(image(2, 4, 8, 8)).sum().backward()

        module = export(seeded(small).train(), (image(2, 4, 8, 8),)).module()
        function = quantization.calibrate_and_quantize
        quantizer = NeutronQuantizer(is_qat=True)
        quantized = function(module, [(image(2, 4, 8, 8),)], quantizer, True, train if trains else None)
        assert seen == [True] * trains
        assert quantized(image(2, 4, 8, 8)).shape == (2, 5)


def test_compile_specs_are_built() -> None:
    builder = options.NeutronCompileSpecBuilder()
    with pytest.raises(OptionError, match="to set the target"):
        builder.build()
    built = builder.neutron_compile_spec("imxrt700", fetch_constants_to_sram=True).build()
    assert built == generate_neutron_compile_spec("imxrt700", fetch_constants_to_sram=True)


def test_data_sets(tmp_path: Path) -> None:
    random = datasets.RandomCalibrationDataset(20, (3, 4, 4), 10)
    assert len(random) == 20
    assert random[0][0].shape == (3, 4, 4)
    assert sorted(label for _, label in random.examples) == sorted([*range(10), *range(10)])
    with pytest.raises(OptionError, match="cannot be divided equally"):
        datasets.RandomCalibrationDataset(5, (1,), 2)
    torch.save(random.examples, tmp_path / "samples.pt")
    with lzma.open(tmp_path / "samples.xz", "wb") as file:
        pickle.dump(random.examples, file)
    for name in ("samples.pt", "samples.xz"):
        assert torch.equal(datasets.CalibrationDataset(tmp_path / name)[3][0], random[3][0])
    with pytest.raises(InputError, match=r"\.xz or \.pt"):
        datasets.CalibrationDataset(tmp_path / "samples.npy")


def test_a_program_is_stored_for_model_explorer(tmp_path: Path) -> None:
    _, manager = lowered(small(), image())
    visualization.visualize_with_clusters(manager.exported_program(), tmp_path / "graph.json")
    nodes = json.loads((tmp_path / "graph.json").read_text())["graphs"][0]["nodes"]
    known = {node["id"] for node in nodes}
    assert all(edge["sourceNodeId"] in known for node in nodes for edge in node["incomingEdges"])
    with pytest.raises(OptionError, match="ai-edge-model-explorer"):
        visualization.visualize_with_clusters(manager.exported_program())
