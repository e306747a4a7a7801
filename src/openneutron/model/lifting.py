"""Makes the exported program of a converted module without tracing it again.

A converted module has the operators of a graph of torch.export, and quantize and dequantize operators. Tracing it
again takes most of the time of lowering, and results in the same operators. This module copies them instead: constants
become inputs of the program (they are lifted), and the metadata of each operator is inferred once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import nn
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from openneutron.core.constants import attribute
from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import arguments, is_dequantize, is_quantize, output_node, placeholders
from openneutron.model.examples import Examples

__all__ = ["lifted_program"]

_GUARDS = "_guards_fn"
# Other metadata of a node describes the trace from which the node came.
_KEPT = ("custom", "from_node", "nn_module_stack", "stack_trace", "torch_fn")
_PREFIXES = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}


@torch.no_grad()
def lifted_program(module: nn.Module, examples: Examples) -> ExportedProgram | None:
    """Returns the exported program of `module`, or None if torch.export has to make it.

    Returns None unless `module` is a graph of torch.export, `examples` have the structure, shapes and dtypes of its
    inputs, and no operator writes to its operands or draws random numbers. Linear in nodes.
    """
    if not isinstance(module, GraphModule) or not _takes(module, examples):
        return None
    if not all(map(_can_be_copied, module.graph.nodes)):
        return None
    constants = _constants_of(module)
    if constants is None:
        return None
    graph, copies = Graph(), dict[Node, Node]()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, export=True)
    inputs = [*_lift_constants(module, graph, copies, constants, mode)]
    for node, leaf in zip(placeholders(module.graph), examples.leaves, strict=True):
        inputs.append(_copy_input(graph, copies, node, mode.from_tensor(leaf, static_shapes=True)))
    inference = _Inference()
    with mode:
        for node in module.graph.nodes:
            if node.op == "call_function":
                _copy_call(graph, copies, node, inference)
    outputs = _copy_outputs(module, graph, copies)
    graph.eliminate_dead_code()
    in_state = {name for name, (kind, _) in constants.items() if _is_in_state(module, name, kind)}
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    signature = ModuleCallSignature([], [], info.in_spec, info.out_spec, list(info.orig_args))
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: value for name, (_, value) in constants.items() if name in in_state},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", signature)],
        example_inputs=(examples.args, dict(examples.kwargs)),
        constants={name: value for name, (_, value) in constants.items() if name not in in_state},
        verifiers=[TrainingIRVerifier],
    )


def _takes(module: GraphModule, examples: Examples) -> bool:
    """Whether a graph of torch.export takes tensors of the static shapes and the dtypes of `examples`."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    leaves, structure = pytree.tree_flatten((examples.args, dict(examples.kwargs)))
    values = [node.meta.get("val") for node in placeholders(module.graph)]
    if info is None or structure != info.in_spec or len(leaves) != len(values) or not leaves:
        return False
    return all(map(_is_input_like, values, leaves))


def _is_input_like(value: Any, leaf: Any) -> bool:
    if not isinstance(value, torch.Tensor) or type(leaf) is not torch.Tensor:
        return False
    is_static = all(isinstance(size, int) for size in value.shape)
    return is_static and (value.shape, value.dtype, value.device) == (leaf.shape, leaf.dtype, leaf.device)


def _can_be_copied(node: Node) -> bool:
    """Whether a node can be copied to the program: an input, a constant, or an operator that writes to no operand."""
    if node.op == "call_module":
        return node.target == _GUARDS and not node.users
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not (node.target._schema.is_mutable or is_random or _writes_statistics(node))
    return getattr(node.target, "__name__", "") == "getitem"


def _writes_statistics(node: Node) -> bool:
    """Whether a norm writes its running statistics, which its schema does not declare."""
    given = arguments(node)
    uses_batch = given.get("training") or given.get("use_input_stats")
    return bool(uses_batch) and given.get("running_mean") is not None


def _constants_of(module: GraphModule) -> dict[str, tuple[InputKind, torch.Tensor]] | None:
    """Returns kind and value of each constant that the graph reads, in torch.export's order.

    Returns None if a constant is not a plain tensor, or if two names have the same tensor."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    read = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users)
    found: dict[str, tuple[InputKind, torch.Tensor]] = {}
    for kind, known in ((InputKind.PARAMETER, parameters), (InputKind.BUFFER, buffers)):
        found.update({name: (kind, value) for name, value in known.items() if name in read})
    for name in read:
        if name not in found:
            value = attribute(module, name)
            if type(value) is not torch.Tensor:
                return None
            found[name] = InputKind.CONSTANT_TENSOR, value
    is_repeated = len({id(value) for _, value in found.values()}) < len(found)
    return None if is_repeated else found


def _is_in_state(module: GraphModule, name: str, kind: InputKind) -> bool:
    """Whether the state dictionary of the program has the constant: a parameter or a persistent buffer."""
    return kind is InputKind.PARAMETER or (kind is InputKind.BUFFER and _is_persistent(module, name))


def _is_persistent(module: GraphModule, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last not in module.get_submodule(owner)._non_persistent_buffers_set


def _lift_constants(
    module: GraphModule,
    graph: Graph,
    copies: dict[Node, Node],
    constants: dict[str, tuple[InputKind, torch.Tensor]],
    mode: FakeTensorMode,
) -> Iterator[InputSpec]:
    lifted: dict[str, Node] = {}
    taken = {str(node.target) for node in placeholders(module.graph)}
    for name, (kind, value) in constants.items():
        free = _free_name(f"{_PREFIXES[kind]}_{name.replace('.', '_')}", taken)
        taken.add(free)
        node = lifted[name] = graph.placeholder(free)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        persistent = _is_persistent(module, name) if kind is InputKind.BUFFER else None
        yield InputSpec(kind, TensorArgument(node.name), name, persistent)
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in lifted:
            copies[node] = lifted[str(node.target)]


def _free_name(name: str, taken: Set[str]) -> str:
    """Returns `name`, or `name` with a number as torch.export adds it, so that no other input has it."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(each for each in names if each not in taken)


def _copy_input(graph: Graph, copies: dict[Node, Node], node: Node, value: torch.Tensor) -> InputSpec:
    copies[node] = copy = graph.placeholder(str(node.target))
    copy.name = str(node.target)  # torch.fx changes names of builtins such as "input", and torch.export does not
    copy.meta["val"] = value
    return InputSpec(InputKind.USER_INPUT, TensorArgument(copy.name), None)


def _copy_outputs(module: GraphModule, graph: Graph, copies: dict[Node, Node]) -> list[OutputSpec]:
    """Adds the output node to `graph`, which returns the leaves of the outputs of `module`."""
    leaves = pytree.tree_leaves(output_node(module.graph).args[0])
    graph.output(tuple(copies[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves)).meta.update(
        {"val": tuple(copies[leaf].meta["val"] if isinstance(leaf, Node) else leaf for leaf in leaves)}
    )
    return [OutputSpec(OutputKind.USER_OUTPUT, _argument_of(copies.get(leaf), leaf), None) for leaf in leaves]


def _copy_call(graph: Graph, copies: dict[Node, Node], node: Node, inference: _Inference) -> None:
    """Copies a call under the name that torch.export would give, and infers its value."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copies.__getitem__)
    assert callable(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    copies[node] = copy = graph.create_node("call_function", node.target, args, kwargs, name=packet.__name__)
    copy.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    copy.meta["val"] = inference.value_of(copy)


class _Inference:
    """Infers the values of calls. Calls of an operator on equal arguments get the same value.

    An inference takes much longer than a look-up, and deep networks repeat their calls.
    """

    def __init__(self) -> None:
        self._known: dict[Any, FakeTensor] = {}

    def value_of(self, node: Node) -> Any:
        """Returns the value of a call."""
        operand, dtype = node.args[0] if node.args else None, _dtype_of_conversion(node)
        if dtype is not None and isinstance(operand, Node) and _is_contiguous(operand.meta["val"]):
            return self._contiguous(operand.meta["val"], dtype)
        try:
            key = node.target, _form(_determining(node)), _form(node.kwargs)
            known = self._known.get(key)
        except _UnknownFormError:
            return infer_meta(node)
        if known is None:
            value = infer_meta(node)
            if not _is_determined(value):
                return value
            known = self._known[key] = value
        return known

    def _contiguous(self, operand: FakeTensor, dtype: torch.dtype) -> FakeTensor:
        """Returns a contiguous tensor with the shape of `operand`. torch's inference would run the meta kernel."""
        key = tuple(operand.shape), dtype, operand.device
        if key not in self._known:
            self._known[key] = torch.empty_like(operand, dtype=dtype)  # type: ignore[assignment]
        return self._known[key]


class _UnknownFormError(Exception):
    """Raised for an argument from which the value of a call may not be determined, so that calls are not compared."""


def _determining(node: Node) -> tuple[Any, ...]:
    """Returns the positional arguments of a call without the scale and the zero point of a tensor."""
    has_numbers = (is_quantize(node) or is_dequantize(node)) and isinstance(node.args[1], float)
    return (node.args[0], *node.args[3:]) if has_numbers else node.args


def _form(value: Any) -> Any:
    """Returns a hashable key of the properties of an argument on which the value of a call may depend.

    Raises `_UnknownFormError` for an argument of an unknown type, and for a tensor of unknown shape or known elements.
    """
    if isinstance(value, Node):
        value = value.meta["val"]
        if not _is_determined(value):
            raise _UnknownFormError
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout)):
        return type(value), value  # 1, 1.0 and True are equal
    if isinstance(value, torch.memory_format):
        return value
    raise _UnknownFormError


def _dtype_of_conversion(node: Node) -> torch.dtype | None:
    """Returns the dtype of the result of a quantize or dequantize; None for any other call."""
    if is_quantize(node):
        return arguments(node)["dtype"]  # type: ignore[no-any-return]
    return arguments(node).get("out_dtype") or torch.float32 if is_dequantize(node) else None


def _is_contiguous(value: Any) -> bool:
    return _is_determined(value) and value.is_contiguous()


def _is_determined(value: Any) -> bool:
    """Whether a value is a fake tensor of static shape without known elements."""
    return isinstance(value, FakeTensor) and value.constant is None and all(isinstance(n, int) for n in value.shape)


def _argument_of(node: Node | None, leaf: Any) -> TensorArgument | ConstantArgument:
    return ConstantArgument("", leaf) if node is None else TensorArgument(node.name)
