"""The check of the contents that ExecuTorch's runtime trusts: valid programs pass, each kind of damage is refused.

Each case changes one field of a valid program and writes a valid flatbuffer again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from executorch.exir import schema
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
from torch import nn

from openneutron import load, lower, quantize
from openneutron.cpu.registry import kernel_names
from openneutron.cpu.signatures import signature_of
from openneutron.errors import FormatError, HostError
from openneutron.formats import pte
from openneutron.formats.flatbuffer import Source, Table, root
from openneutron.formats.pte import ValueKind
from openneutron.formats.pte_check import check

Change = Callable[[schema.ExecutionPlan], None]


class Net(nn.Module):
    """An operator in float on the CPU, a constant, and a state."""

    table: torch.Tensor
    state: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("state", torch.zeros(1, 8, 4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x) + self.state
        self.state.copy_(y)
        return y, torch.cat([torch.cumsum(y.flatten(1), 1)[:, :8], self.table[None]])


def _program() -> bytes:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 6)
    return lower(quantize(Net().eval(), (x,), [(x,)])).buffer


PROGRAM = _program()


def changed(change: Change) -> bytes:
    """Returns the program with a change of its method `forward`."""
    file = deserialize_pte_binary(PROGRAM)
    change(method(file))
    return bytes(serialize_pte_binary(PTEFile(file.program, file.mutable_data, file.named_data)))


def method(file: PTEFile) -> schema.ExecutionPlan:
    return next(plan for plan in file.program.execution_plan if plan.name == "forward")


def assert_refused(change: Change, message: str) -> None:
    data = changed(change)
    with pytest.raises(FormatError, match=message):
        check(data, signature_of)
    with pytest.raises(HostError, match=message):
        load(data)


def tensors(plan: schema.ExecutionPlan) -> list[schema.Tensor]:
    return [value.val for value in plan.values if isinstance(value.val, schema.Tensor)]


def planned(plan: schema.ExecutionPlan) -> schema.Tensor:
    return next(each for each in tensors(plan) if each.allocation_info is not None and not each.data_buffer_idx)


def constant(plan: schema.ExecutionPlan) -> schema.Tensor:
    return next(each for each in tensors(plan) if each.allocation_info is None and each.data_buffer_idx)


def calls(plan: schema.ExecutionPlan) -> list[Any]:
    return [each.instr_args for each in plan.chains[0].instructions]


def kernel_call(plan: schema.ExecutionPlan, name: str) -> schema.KernelCall:
    names = [each.name for each in plan.operators]
    found = (call for call in calls(plan) if isinstance(call, schema.KernelCall))
    return next(call for call in found if names[call.op_index].endswith(name))


def set_field(get: Callable[[schema.ExecutionPlan], Any], **fields: Any) -> Change:
    def change(plan: schema.ExecutionPlan) -> None:
        for name, value in fields.items():
            setattr(get(plan), name, value)

    return change


def append_call(make: Callable[[schema.ExecutionPlan], Any]) -> Change:
    """Adds an instruction at the end of the method."""
    return lambda plan: plan.chains[0].instructions.append(schema.Instruction(make(plan)))


def set_value(position: int, value: Any) -> Change:
    """Replaces an argument of the kernel that quantizes the input."""

    def change(plan: schema.ExecutionPlan) -> None:
        index = kernel_call(plan, "::quantize_per_tensor").args[position]
        plan.values[index] = schema.EValue(value)

    return change


def set_argument(name: str, position: int, get: Callable[[schema.ExecutionPlan], int]) -> Change:
    def change(plan: schema.ExecutionPlan) -> None:
        kernel_call(plan, name).args[position] = get(plan)

    return change


def remove_memory_of_an_output(plan: schema.ExecutionPlan) -> None:
    plan.values[plan.outputs[1]].val.allocation_info = None


def index_of_constant(plan: schema.ExecutionPlan) -> int:
    return next(i for i, value in enumerate(plan.values) if value.val is constant(plan))


CASES: dict[str, tuple[Change, str]] = {
    "unknown dtype": (set_field(planned, scalar_type=20), "a dtype of ExecuTorch"),
    "negative size": (set_field(planned, sizes=[1, -1, 4, 4]), "sizes of dimensions"),
    "too many dimensions": (set_field(planned, sizes=[1] * 17, dim_order=list(range(17))), "at most 16 dimensions"),
    "short dim order": (set_field(planned, dim_order=[0, 1]), "a dim order of 4 dimensions"),
    "dimension twice": (set_field(planned, dim_order=[0, 1, 1, 3]), "a dim order of 4 dimensions"),
    "storage offset": (set_field(planned, storage_offset=4), "a storage offset of 0"),
    "unbounded shape": (
        set_field(planned, shape_dynamism=schema.TensorShapeDynamism.DYNAMIC_UNBOUND),
        "a tensor of bounded shape",
    ),
    "size overflows": (set_field(planned, sizes=[2**30, 2**30, 2**30, 16]), "a tensor of at most 2147483648"),
    "empty, but its size overflows": (
        set_field(planned, sizes=[2**31 - 1, 2**31 - 1, 2**31 - 1, 0]), "a tensor of at most 2147483648 bytes",
    ),
    "beyond its buffer": (
        set_field(lambda plan: planned(plan).allocation_info, memory_offset_low=892), "a tensor within 896 bytes",
    ),
    "offset in the high word": (
        set_field(lambda plan: planned(plan).allocation_info, memory_offset_high=1), "a tensor within 896 bytes",
    ),
    "unaligned": (set_field(lambda plan: planned(plan).allocation_info, memory_offset_low=2), "a multiple of 4"),
    "memory 0": (set_field(lambda plan: planned(plan).allocation_info, memory_id=0), "a memory buffer from 1 to 1"),
    "memory 2": (set_field(lambda plan: planned(plan).allocation_info, memory_id=2), "a memory buffer from 1 to 1"),
    "large buffer": (set_field(lambda plan: plan, non_const_buffer_sizes=[0, 1 << 40]), "a memory buffer of at most"),
    "negative buffer": (set_field(lambda plan: plan, non_const_buffer_sizes=[0, -1]), "sizes of memory buffers"),
    "constant beyond its segment": (set_field(constant, sizes=[1, 9]), "36 bytes in buffer 1"),
    "no such constant": (set_field(constant, data_buffer_idx=7), "32 bytes in buffer 7"),
    "external constant": (
        set_field(
            constant,
            extra_tensor_info=schema.ExtraTensorInfo(
                mutable_data_segments_idx=0, fully_qualified_name="table", location=schema.TensorDataLocation.EXTERNAL
            ),
        ),
        "a constant in this file",
    ),
    "no such input": (set_field(lambda plan: plan, inputs=[99]), "value below"),
    "no such output": (set_field(lambda plan: plan, outputs=[-1]), "value below"),
    "no such tensor in a list": (
        set_field(lambda plan: plan.values[kernel_call(plan, "::cat").args[0]].val, items=[99]),
        "value below",
    ),
    "a number in a list of tensors": (
        set_field(lambda plan: plan.values[kernel_call(plan, "::cat").args[0]].val, items=[4]),
        "a list of tensors",
    ),
    "a list of tensors that follow it": (
        lambda plan: plan.values.append(schema.EValue(schema.TensorList([len(plan.values)]))),
        "a list of tensors before value",
    ),
    "no such operator": (set_field(lambda plan: kernel_call(plan, "::cat"), op_index=9), "below 4, found 9"),
    "no such delegate": (
        set_field(lambda plan: next(c for c in calls(plan) if isinstance(c, schema.DelegateCall)), delegate_index=3),
        "the index of a delegate|an index below",
    ),
    "too few arguments": (set_field(lambda plan: kernel_call(plan, "::cat"), args=[0]), "3 arguments of aten::cat.out"),
    "no such argument": (set_argument("::cat", 1, lambda _: 99), "a value below"),
    "argument of another kind": (
        set_argument("::cat", 1, lambda plan: plan.inputs[0]),
        "argument 1 of aten::cat.out of kind 2, found kind 5",
    ),
    "tensor without memory": (remove_memory_of_an_output, "a tensor with memory for aten::cat.out"),
    "writes to a constant": (set_argument("::cat", 2, index_of_constant), "memory that aten::cat.out may write to"),
    "dtype of quantize": (set_value(5, schema.Int(3)), "integers of dtype 1 for quantized_decomposed"),
    "range of quantize": (set_value(4, schema.Int(128)), "integers of dtype 1 for quantized_decomposed"),
    "shapes of dequantize": (
        set_field(
            lambda plan: plan.values[kernel_call(plan, "::dequantize_per_tensor").args[0]].val, sizes=[8, 2, 4, 1]
        ),
        "tensors of one shape for quantized_decomposed",
    ),
    "dtype of the output of dequantize": (
        lambda plan: plan.values.__setitem__(
            kernel_call(plan, "::dequantize_per_tensor").args[6], schema.EValue(schema.Int(7))
        ),
        "the dtype 6 of the output of quantized_decomposed",
    ),
    "frees a tensor": (append_call(lambda plan: schema.FreeCall(plan.inputs[0])), "a tensor that keeps its memory"),
    "endless loop": (
        append_call(lambda _: schema.JumpFalseCall(cond_value_index=4, destination_instruction=0)),
        "a jump forward",
    ),
    "jump beyond the end": (
        append_call(lambda _: schema.JumpFalseCall(cond_value_index=4, destination_instruction=99)),
        "a jump forward",
    ),
    "moves a tensor to a number": (
        append_call(lambda plan: schema.MoveCall(move_from=plan.inputs[0], move_to=4)),
        "a move between values of one kind",
    ),
    "moves a tensor to another shape": (
        append_call(lambda plan: schema.MoveCall(move_from=plan.inputs[0], move_to=plan.outputs[0])),
        "a move between tensors of one shape",
    ),
}  # fmt: skip


_ARGS = 1  # field of KernelCall and DelegateCall


def _instructions(data: bytes) -> list[Table]:
    plan = next(plan for plan in root(Source(data, "it"), pte.FILE_IDENTIFIERS).tables(1) if plan.text(0) == "forward")
    return list(next(plan.tables(5)).tables(2))


def _vtable(table: Table) -> int:
    return table.at - table.source.integer(table.at, "i", "a table")


class TestDamage:
    @pytest.mark.parametrize("name", CASES)
    def test_is_refused(self, name: str) -> None:
        assert_refused(*CASES[name])

    def test_text_that_python_cannot_read(self) -> None:
        assert PROGRAM.count(b"NeutronBackend") == 1
        data = PROGRAM.replace(b"NeutronBackend", b"NeutronBacken\xff")
        with pytest.raises(FormatError, match="a text in UTF-8"):
            check(data, signature_of)

    @pytest.mark.parametrize("kind", [schema.KernelCall, schema.DelegateCall])
    def test_absent_fields_of_a_call(self, kind: type) -> None:
        # Tables share vtables, so the error may name another table without this field.
        number = [type(call) for call in calls(method(deserialize_pte_binary(PROGRAM)))].index(kind)
        arguments = _instructions(PROGRAM)[number].table(1)
        assert arguments is not None
        entry = _vtable(arguments) + 4 + 2 * _ARGS
        with pytest.raises(FormatError, match=r"with field 1|no buffer"):
            check(PROGRAM[:entry] + bytes(2) + PROGRAM[entry + 2 :], signature_of)

    def test_valid_programs_are_accepted(self) -> None:
        data = changed(lambda _: None)
        check(data, signature_of)
        x = torch.randn(1, 3, 6, 6)
        for ours, original in zip(load(data).run(x), load(PROGRAM).run(x), strict=True):
            assert torch.equal(ours, original)


class TestSignatures:
    def test_of_operators_of_torch(self) -> None:
        add = signature_of("aten::add.out")
        assert add is not None
        number = frozenset({ValueKind.INT, ValueKind.DOUBLE, ValueKind.BOOL})
        tensor = frozenset({ValueKind.TENSOR})
        assert add.kinds == (tensor, tensor, number, tensor)
        assert add.written == {3}

    def test_of_operators_of_executorch(self) -> None:
        quantize_kernel = signature_of("quantized_decomposed::quantize_per_tensor.out")
        assert quantize_kernel is not None
        assert len(quantize_kernel.kinds) == 7
        assert quantize_kernel.quantized == 6

    def test_unknown_operators_have_no_signature(self) -> None:
        assert signature_of("mine::operator.out") is None
        assert signature_of("aten::name") is None  # an attribute of torch.ops.aten that is not an operator
        assert signature_of("aten::no_such_operator.out") is None

    def test_of_nearly_all_kernels(self) -> None:
        unknown = {name for name in kernel_names() if signature_of(name) is None}
        spaces = {name.partition("::")[0] for name in unknown}
        assert spaces <= {"executorch_prim", "et_copy", "quantized_decomposed", "aten"}
        assert len([name for name in unknown if name.startswith("aten")]) < 5
