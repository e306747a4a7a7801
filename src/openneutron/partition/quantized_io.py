"""Removes quantize at the inputs and dequantize at the outputs of a program, which then takes and returns int8."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from openneutron.core.fx import dtype_of, op_name, output_node
from openneutron.partition.clusters import Constants
from openneutron.quantizer.output_parts import is_float_concatenation

__all__ = ["FloatIOWarning", "int8_io"]

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


class FloatIOWarning(UserWarning):
    """Lists the inputs and outputs that `int8_io` leaves in float, each with its reason."""


def int8_io(program: ExportedProgram) -> dict[str, float | int]:
    """Changes the inputs and outputs of a quantized, exported program to int8, in place. Returns their qparams.

    For int8 inputs, the program returns the result for the dequantized inputs, quantized with the qparams of the
    outputs. The returned qparams are an argument of `to_edge_transform_and_lower(program, constant_methods=...)`. Each
    becomes a method of the `.pte`, under the name that ExecuTorch's passes use: "input0_scale", "input0_zp",
    "input0_quant_min", "input0_quant_max", "input0_dtype", and the same for "output0". An input without a quantize to
    int8, and an output that is computed in float, remain float32; a `FloatIOWarning` lists them with reasons. Linear in
    nodes.

        program = torch.export.export(converted, inputs)
        methods = int8_io(program)
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner], constant_methods=methods)
    """
    qparams: dict[str, float | int] = {}
    left: list[str] = []
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for index, argument in enumerate(inputs):
        name = argument.name
        if not isinstance(argument, TensorArgument) or dtype_of(node := nodes[name]) != torch.float32:
            continue
        if quantize := _int8_quantize_of(node):
            _change_input_to_int8(node, quantize)
            _quantize_example(program, index, quantize.args[1:])
            qparams |= _constant_methods("input", index, quantize.args[1:])
        else:
            readers = ", ".join(f"'{reader.name}' ({op_name(reader)})" for reader in node.users)
            reason = f"it is read in float by {readers}" if readers else "nothing reads it"
            left.append(f"  input {index}, '{name}': {reason}.")
    constants = Constants(program)
    for index, position in enumerate(_user_outputs(program)):
        node = _output_values(program)[position]
        if not isinstance(node, Node) or dtype_of(node) != torch.float32:
            continue
        node = _requantize_concatenation(node)
        source = node.args[0] if node.target is _DEQUANTIZE and node.args[5] == torch.int8 else None
        if isinstance(source, Node) and source not in constants:
            _change_output_to_int8(program, position, source)
            qparams |= _constant_methods("output", index, node.args[1:])
        else:
            origin, cost = _origin_text(node, constants), _concatenation_bytes_text(node)
            left.append(f"  output {index}, '{node.name}': {origin} in float.{cost}")
    _update_output_names(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    if left:
        warnings.warn("These inputs and outputs remain in float:\n" + "\n".join(left), FloatIOWarning, stacklevel=2)
    return qparams


def _requantize_concatenation(node: Node) -> Node:
    """Inserts quantize and dequantize after a concatenation in float if all its parts have the same qparams.

    Returns the dequantize; for any other node, the node itself.
    """
    found: set[tuple[Any, ...]] = set()
    pending = [node]
    while pending:
        value = pending.pop()
        if value.target is _DEQUANTIZE:
            found.add(value.args[1:])
        elif is_float_concatenation(value):
            pending.extend(value.all_input_nodes)
        else:
            return node
    if not is_float_concatenation(node) or len(found) != 1:
        return node
    (qparams,) = found
    with node.graph.inserting_after(node):
        quantize = node.graph.call_function(_QUANTIZE, (node, *qparams))
    with node.graph.inserting_after(quantize):
        dequantize = node.graph.call_function(_DEQUANTIZE, (quantize, *qparams))
    quantize.meta = {**node.meta, "val": _QUANTIZE(node.meta["val"], *qparams)}
    dequantize.meta = {**node.meta}
    return dequantize


def _concatenation_bytes_text(node: Node) -> str:
    """Returns a sentence about the bytes of an output that the CPU concatenates in float; "" for any other output."""
    if not is_float_concatenation(node):
        return ""
    size = node.meta["val"].numel()
    return (
        f" Its parts have different qparams, so the CPU dequantizes and concatenates them: {4 * size:,} bytes instead "
        f"of {size:,}. For int8, return the parts as separate outputs."
    )


def _origin_text(node: Node, constants: Constants) -> str:
    if node in constants:
        return "it is a constant that the program stores"
    if node.op == "placeholder":
        return "it is an input that the caller gives"
    return f"{op_name(node)} returns it"


def _int8_quantize_of(node: Node) -> Node | None:
    """Returns the first quantize to int8 that reads `node`; None if there is none."""
    return next((user for user in node.users if user.target is _QUANTIZE and user.args[5] == torch.int8), None)


def _change_input_to_int8(node: Node, quantize: Node) -> None:
    """Changes the input `node` to int8 with the qparams of `quantize`.

    Redirects all other readers of `node` to a dequantize of it.
    """
    value, qparams = node.meta["val"], quantize.args[1:]
    readers = list(node.users)
    equal = [reader for reader in readers if reader.target is _QUANTIZE and reader.args[1:] == qparams]
    node.meta["val"] = quantize.meta["val"]
    if len(equal) < len(readers):
        first = next(other for other in node.graph.nodes if other.op != "placeholder")
        with node.graph.inserting_before(first):
            in_float = node.graph.call_function(_DEQUANTIZE, (node, *qparams))
        in_float.meta = {**node.meta, "val": value}
        for reader in set(readers) - set(equal):
            reader.replace_input_with(node, in_float)
    for reader in equal:
        reader.replace_all_uses_with(node)
        node.graph.erase_node(reader)


def _quantize_example(program: ExportedProgram, index: int, qparams: tuple[Any, ...]) -> None:
    if program.example_inputs is not None:
        examples, structure = tree_flatten(program.example_inputs)
        examples[index] = _QUANTIZE(examples[index], *qparams)
        program.example_inputs = tree_unflatten(examples, structure)


def _user_outputs(program: ExportedProgram) -> list[int]:
    """Returns the positions of the user's outputs among all outputs of the graph."""
    specs = program.graph_signature.output_specs
    return [position for position, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT]


def _output_values(program: ExportedProgram) -> list[Any]:
    """Returns the outputs of the graph."""
    values: Any = output_node(program.graph).args[0]
    return list(values)


def _update_output_names(program: ExportedProgram) -> None:
    """Updates the names of outputs in the signature. The output may be a new dequantize of an input."""
    specs = program.graph_signature.output_specs
    for position, value in enumerate(_output_values(program)):
        if isinstance(value, Node) and specs[position].arg.name != value.name:
            specs[position] = replace(specs[position], arg=TensorArgument(name=value.name))


def _change_output_to_int8(program: ExportedProgram, position: int, value: Node) -> None:
    returned, specs = _output_values(program), program.graph_signature.output_specs
    returned[position] = value
    output_node(program.graph).args = (tuple(returned),)
    specs[position] = replace(specs[position], arg=TensorArgument(name=value.name))


def _constant_methods(kind: str, index: int, qparams: tuple[Any, ...]) -> dict[str, float | int]:
    """Returns the qparams of an input or output, by method name in ExecuTorch's `QuantizeInputs`, `QuantizeOutputs`."""
    from executorch.exir.passes.quantize_io_pass import get_config_method_name
    from executorch.exir.tensor import scalar_type_enum

    scale, zero_point, low, high, dtype = qparams
    values = {
        "scale": float(scale), "zp": int(zero_point), "quant_min": int(low), "quant_max": int(high),
        "dtype": int(scalar_type_enum(dtype)),
    }  # fmt: skip
    return {get_config_method_name(None, kind, index, key): value for key, value in values.items()}
