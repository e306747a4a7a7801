"""The memory of methods: the computation against what the runtime allocates, and runs in pools of exactly that size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge, to_edge_transform_and_lower
from torch import nn

from openneutron import NeutronProgram, load, lower, quantize
from openneutron.errors import HostError, InputError, PoolError
from openneutron.formats import pte
from openneutron.formats.method_memory import POOL_ALIGNMENT, Allocation, memory_of
from openneutron.formats.payload import MICROCODE_MAGIC, PayloadHeader, pack_device, parse
from openneutron.runtime.memory import measure, run_in_pools


class Counter(nn.Module):
    """A stream: its buffer is written in each step."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("total", torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.copy_(0.5 * self.total + self.layer(x))
        return self.total + 0


class Split(nn.Module):
    """Two outputs, and lists of tensors on the CPU."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = torch.split(x * torch.cumsum(x, 1), 4, dim=1)
        return torch.cat([first, second], 1), torch.topk(x, 3, dim=1).values


class Named(nn.Module):
    """Inputs that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, times: int, scale: float, mode: str, add: bool) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) * scale
        return y + times if add and mode == "plus" else y


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


def image() -> torch.Tensor:
    return torch.randn(1, 3, 12, 12)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 4))


CASES = {
    "one delegate": Case(network, (image(),)),
    "one delegate of int8": Case(network, (image(),), {"int8_io": True}),
    "several delegates": Case(network, (image(),), {"operators_not_to_delegate": ["sigmoid"]}),
    "transposed on the CPU": Case(network, (image(),), {"use_neutron_for_format_conversion": False}),
    "channels last": Case(network, (image().contiguous(memory_format=torch.channels_last),), {"int8_io": True}),
    "no delegate": Case(Split, (torch.randn(2, 8),)),
    "a state": Case(Counter, (torch.randn(1, 8),)),
    "constant inputs": Case(Named, (torch.randn(1, 8), 3, 0.5, "plus", True)),
}


def lowered(name: str) -> NeutronProgram:
    case = CASES[name]
    torch.manual_seed(0)
    quantized = quantize(case.build().eval(), case.inputs, [case.inputs], recover=None)
    return lower(quantized, **case.options)


@pytest.fixture(scope="module")
def programs() -> dict[str, NeutronProgram]:
    return {name: lowered(name) for name in CASES}


def raw_inputs(data: bytes, method: str = "forward") -> list[Any]:
    """Zeros for tensors, and the values of constants."""
    plan = next(one for one in pte.read(data).methods if one.name == method)
    return [
        None
        if value.dtype in ("none", "str")
        else value.constant
        if value.constant is not None
        else bytes(torch.Size(value.shape).numel() * pte.ITEM_BYTES.get(value.dtype, 1))
        for value in plan.inputs
    ]


@pytest.mark.filterwarnings("ignore:.*no operator.*")
class TestPools:
    @pytest.mark.parametrize("name", CASES)
    def test_the_computation_agrees_with_the_runtime_to_the_byte(
        self, programs: dict[str, NeutronProgram], name: str
    ) -> None:
        memory = programs[name].memory
        assert memory.measured is not None
        assert memory.host.method.used_bytes == memory.measured.method_bytes
        assert memory.host.temporary.used_bytes >= memory.measured.load_bytes
        assert memory.host.temporary.used_bytes >= memory.measured.run_bytes
        assert (memory.measured.run_bytes > 0) == (name == "no delegate")  # topk
        assert load(programs[name].buffer).memory == memory

    @pytest.mark.parametrize("name", CASES)
    def test_a_method_runs_in_its_computed_pools_and_not_in_smaller_ones(
        self, programs: dict[str, NeutronProgram], name: str
    ) -> None:
        data, memory = programs[name].portable, programs[name].memory
        sizes: dict[str, Any] = {
            "method_bytes": memory.host.method.pool_bytes,
            "temporary_bytes": memory.host.temporary.pool_bytes,
            "planned_bytes": [buffer.bytes for buffer in memory.planned],
        }
        inputs = raw_inputs(data)
        outputs = run_in_pools(data, inputs, **sizes)
        generous = run_in_pools(
            data, inputs, method_bytes=1 << 20, temporary_bytes=1 << 20, planned_bytes=[1 << 20 for _ in memory.planned]
        )
        assert outputs == generous
        for key, size in sizes.items():
            smaller = [one - POOL_ALIGNMENT for one in size] if isinstance(size, list) else size - POOL_ALIGNMENT
            if smaller and (isinstance(smaller, list) or smaller >= 0):
                with pytest.raises(PoolError, match=r"has \d+ bytes"):
                    run_in_pools(data, inputs, **{**sizes, key: smaller})

    def test_outputs_in_pools_equal_the_program(self, programs: dict[str, NeutronProgram]) -> None:
        program = programs["one delegate"]
        memory, x = program.memory, torch.randn(1, 3, 12, 12)
        (output,) = run_in_pools(
            program.portable,
            [x.numpy().tobytes()],
            method_bytes=memory.host.method.used_bytes,
            temporary_bytes=memory.host.temporary.used_bytes,
            planned_bytes=[buffer.bytes for buffer in memory.planned],
        )
        assert output == program.run(x).numpy().tobytes()

    def test_every_method_has_its_own_memory(self, programs: dict[str, NeutronProgram]) -> None:
        data = programs["constant inputs"].portable
        names = [method.name for method in pte.read(data).methods]
        assert len(names) > 1
        for name in names:
            memory, measured = memory_of(data, name), measure(data, name)
            assert memory.host.method.used_bytes == measured.method_bytes

    def test_wrong_calls_are_refused(self, programs: dict[str, NeutronProgram]) -> None:
        data = programs["one delegate"].portable
        sizes: dict[str, Any] = {"method_bytes": 1 << 20, "temporary_bytes": 1 << 20, "planned_bytes": [1 << 20]}
        with pytest.raises(InputError, match=r"no method 'backward'\. Its methods are: forward"):
            memory_of(data, "backward")
        for inputs in ([], [b"1234"], [3], raw_inputs(data) * 2):
            with pytest.raises(HostError, match="input"):
                run_in_pools(data, inputs, **sizes)
        with pytest.raises(HostError, match="planned buffers"):
            run_in_pools(data, raw_inputs(data), **{**sizes, "planned_bytes": []})
        for wrong in ({"method_bytes": 1 << 32}, {"temporary_bytes": -1}, {"planned_bytes": [-1]}):
            with pytest.raises(HostError, match="Give sizes from 0 to 4,294,967,295 bytes"):
                run_in_pools(data, raw_inputs(data), **{**sizes, **wrong})
        with pytest.raises(HostError, match="not an ExecuTorch program"):
            run_in_pools(b"ET12" * 9, [], **sizes)

    def test_ctrl_c_interrupts_the_measurement(
        self, programs: dict[str, NeutronProgram], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("openneutron.runtime.engine.Engine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(programs["one delegate"].portable)


def compiled(program: NeutronProgram, version: int, **words: int) -> bytes:
    """Returns the program with payloads whose microcode states these sizes. Nothing runs it."""
    (method,) = (one for one in pte.read(program.portable).methods if one.name == "forward")
    payloads = {}
    for call in method.delegates:
        old = parse(call.payload).header
        header = PayloadHeader(
            old.input_formats, old.output_formats, old.input_map, old.output_map, old.argument_count, version
        )
        counts = (len(header.input_formats), len(header.output_formats))
        code = [0] * 16
        code[0], code[6], code[9] = MICROCODE_MAGIC, 64, words["scratch"]
        code[10:15] = (
            (words["prefetch"], *counts, 0, 0)
            if version == 0
            else (words["profile"] | 1 << 31, words["debug"], words["prefetch"], *counts)
        )
        assert call.segment is not None
        payloads[call.segment] = pack_device(header, b"".join(word.to_bytes(4, "little") for word in code), b"", b"")
    return pte.replace_payloads(program.portable, payloads)


class TestBoard:
    """The allocations of NXP's delegate, in the order of its source code."""

    def test_microcode_states_the_sizes(self, programs: dict[str, NeutronProgram]) -> None:
        program = programs["one delegate of int8"]
        memory = memory_of(compiled(program, 1, scratch=1001, profile=32, debug=5, prefetch=100))
        (one,) = memory.delegates
        assert (one.scratch_bytes, one.profile_bytes, one.debug_bytes, one.prefetch_bytes) == (1001, 32, 5, 100)
        assert (one.is_estimated, one.context_bytes, memory.device.temporary.unknown) == (False, None, ())
        # 1 + 1 + 3 pointers, then each buffer at a multiple of 16
        assert memory.device.temporary.parts == (
            Allocation("pointers of the delegate", 20),
            Allocation("scratch of the NPU", 12 + 1001),
            Allocation("profile of the NPU", 7 + 32),
            Allocation("debug buffer of the NPU", 5),
            Allocation("prefetched weights", 11 + 100),
        )
        assert memory.device.temporary.pool_bytes == 1200
        assert memory.device.method == program.memory.device.method

    def test_old_microcode_has_neither_profile_nor_debug_buffer(self, programs: dict[str, NeutronProgram]) -> None:
        (one,) = memory_of(compiled(programs["one delegate"], 0, scratch=64, prefetch=0)).delegates
        assert (one.scratch_bytes, one.profile_bytes, one.debug_bytes, one.prefetch_bytes) == (64, 0, 0, 0)

    def test_delegates_share_the_temporary_allocator(self, programs: dict[str, NeutronProgram]) -> None:
        program = programs["several delegates"]
        memory, loaded = program.memory, dict(memory_parts(program))
        assert len(memory.delegates) == 2
        assert memory.device.temporary.used_bytes >= max(one.scratch_bytes for one in memory.delegates)
        assert memory.device.temporary.used_bytes < sum(one.scratch_bytes for one in memory.delegates) + 400
        assert loaded["delegates"] > 2 * (40 + 80)

    def test_tensors_that_the_cpu_transposes_count_as_memory(self, programs: dict[str, NeutronProgram]) -> None:
        (transposed,) = programs["transposed on the CPU"].memory.delegates
        (straight,) = programs["one delegate"].memory.delegates
        assert (transposed.transposed_bytes, straight.transposed_bytes) == (3 * 12 * 12, 0)

    def test_sizes_that_only_the_converter_computes_are_unknown(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(1, 8)
        quantized = quantize(nn.Linear(8, 8).eval(), (x,), [(x,)], "mcxn94x", recover=None)
        program = lower(quantized, target="mcxn94x", use_profiling=True, fetch_constants_to_sram=True)
        assert program.memory.device.temporary.unknown == (
            "profile of the NPU",
            "debug buffer of the NPU",
            "prefetched weights",
        )


def memory_parts(program: NeutronProgram) -> list[tuple[str, int]]:
    return [(part.name, part.bytes) for part in program.memory.device.method.parts]


class Free(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(torch.cat([x, x * 2], 1), 2, dim=1).values


def test_dynamic_shapes_count_with_their_upper_bound() -> None:
    batch = torch.export.Dim("batch", min=1, max=9)
    exported = torch.export.export(Free(), (torch.randn(2, 4),), dynamic_shapes=({0: batch},))
    data = bytes(to_edge(exported).to_executorch().buffer)
    memory, measured = memory_of(data), measure(data)
    assert memory.host.method.used_bytes == measured.method_bytes
    assert measured.run_bytes > 0  # topk
    assert memory.planned_bytes >= 9 * 4 * 4
    assert any(slot.is_resizable for slot in pte.read(data).methods[0].slots)


def test_the_memory_of_other_delegates_is_unknown() -> None:
    exported = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    memory = memory_of(bytes(program.buffer))
    assert memory.device.method.unknown == memory.device.temporary.unknown == ("memory of XnnpackBackend",)
    assert memory.delegates == ()
