"""Inserts observers into an annotated graph, and converts them to quantize and dequantize operators.

`prepare_pt2e` and `convert_pt2e` of torchao do the same for the documented flow. `quantize` does not call them, because
their time grows with the square of the number of observers, and because they generate the module's code after each
step. The functions here call torchao's functions for single nodes, and return modules with the same nodes, names,
metadata and numbers (`tests/quantizer/test_conversion.py`). They do not take graphs for training.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import computed_constants
from openneutron.core.evaluation import compute_from
from openneutron.core.fx import is_dequantize, is_quantize, is_state_write

if TYPE_CHECKING:
    from openneutron.quantizer.int8_quantizer import Int8Quantizer

__all__ = ["convert", "insert_observers"]

_PREFIX = "activation_post_process_"


def insert_observers(model: GraphModule, quantizer: Int8Quantizer) -> GraphModule:
    """Annotates a graph of `quantizer.prepare_graph` and inserts observers in place, as `prepare_pt2e` does.

    Returns `model`. Linear in nodes. Raises the errors of `Int8Quantizer.annotate`.
    """
    from torchao.quantization.pt2e import prepare as torchao
    from torchao.quantization.pt2e.utils import _disallow_eval_train

    quantizer.annotate(model)
    nodes = list(model.graph.nodes)
    qspecs = torchao._get_edge_or_node_to_qspec(model)
    observers = torchao._get_obs_or_fq_map(torchao._get_edge_or_node_to_group_id(qspecs), qspecs, is_qat=False)
    quantizer.prepare_obs_or_fq_callback(model, observers)
    insertion = _Insertion(model, observers)
    for node in nodes:
        if torchao.Q_ANNOTATION_KEY in node.meta:
            insertion.observe(node)
    model.recompile()
    return _disallow_eval_train(model)  # type: ignore[no-any-return]


class _Insertion:
    """Inserts calls of observers into the graph of `model`.

    `observers` maps each value, and each edge of a value and its reader, to its observer. Values that share qparams
    share an observer.
    """

    def __init__(self, model: GraphModule, observers: Mapping[Any, Any]) -> None:
        self.model = model
        self.observers = observers
        self.device = _device_of(model)
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.names: Iterator[str] = (f"{_PREFIX}{number}" for number in itertools.count())
        self.called = {
            node: model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"
        }

    def observe(self, node: Node) -> None:
        """Inserts the observers of the operands of `node` and of its output."""
        node.args = tuple(self._observed_operand(value, node) for value in node.args)
        observer = self.observers.get(node)
        if observer is None or not isinstance(node.meta.get("val"), torch.Tensor):
            return
        call = self._call(observer, node)
        if "from_node" in node.meta:
            call.meta["from_node"] = node.meta["from_node"]
        for reader in list(node.users):
            if reader is not call:
                reader.replace_input_with(node, call)

    def _observed_operand(self, value: Any, reader: Node) -> Any:
        """Returns what `reader` reads in place of `value`: a call of an observer, or `value` itself."""
        from torchao.quantization.pt2e.prepare import _is_mutable_buffer_arg

        if isinstance(value, (list, tuple)):
            return type(value)([self._observed_operand(item, reader) for item in value])
        if not isinstance(value, Node):
            return value
        source = value
        while self._is_observer_call(source):
            (source,) = source.all_input_nodes
        observer = self.observers.get((source, reader))
        if observer is None or observer is self.observers.get(source):
            return value
        if _is_mutable_buffer_arg(reader, source, self.buffers):
            return value
        calls = (user for user in value.users if self.called.get(user) is observer)
        return next(calls, None) or self._call(observer, value)

    def _is_observer_call(self, node: Node) -> bool:
        from torchao.quantization.pt2e.observer import _is_activation_post_process

        return node in self.called and bool(_is_activation_post_process(self.called[node]))

    def _call(self, observer: Any, value: Node) -> Node:
        if self.device:
            observer.to(self.device)
        name = next(name for name in self.names if not hasattr(self.model, name))
        setattr(self.model, name, observer)
        with self.model.graph.inserting_after(value):
            call = self.model.graph.call_module(name, (value,))
        self.called[call] = observer
        return call


def convert(prepared: GraphModule) -> GraphModule:
    """Returns the converted module of a calibrated module of `insert_observers`, as `convert_pt2e` does.

    Linear in nodes. Raises `CalibrationError` for a value that calibration never reached or that is not finite.
    """
    from torchao.quantization.pt2e import convert as torchao
    from torchao.quantization.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ
    from torchao.quantization.pt2e.utils import _disallow_eval_train

    modules = dict(prepared.named_modules(remove_duplicate=False))
    device = _device_of(prepared)
    for node in list(prepared.graph.nodes):
        if node.op == "call_module" and torchao._is_activation_post_process(modules[node.target]):
            torchao._replace_observer_with_quantize_dequantize_node_decomposed(prepared, node, modules, {}, {}, device)
    prepared.graph.eliminate_dead_code()
    converted = GraphModule(prepared, prepared.graph)
    converted.meta.update(prepared.meta)  # the initial states, among others
    converted.delete_all_unused_submodules()
    _give_each_reader_a_dequantize(converted)
    PortNodeMetaForQDQ().call(converted)
    _fold_quantized_constants(converted)
    converted.recompile()
    return _disallow_eval_train(converted)  # type: ignore[no-any-return]


def _fold_quantized_constants(converted: GraphModule) -> None:
    """Replaces each quantize operator of constants by its result, as `constant_fold` of torchao does.

    Removes constants without readers. Keeps constants to which the model writes. Linear in nodes.
    """
    from torchao.quantization.pt2e.constant_fold import replace_node_with_constant

    written = {node.args[0] for node in converted.graph.nodes if is_state_write(node)}
    constants = computed_constants(converted)
    known: dict[Node, Any] = {}
    for node in list(converted.graph.nodes):
        read = node.all_input_nodes
        if is_quantize(node) and constants.issuperset(read) and written.isdisjoint(read):
            replace_node_with_constant(converted, node, compute_from(known, converted, node))
    for node in converted.graph.find_nodes(op="get_attr"):
        if not node.users:
            if hasattr(converted, str(node.target)):
                delattr(converted, str(node.target))
            converted.graph.erase_node(node)
    converted.graph.eliminate_dead_code()


def _device_of(model: GraphModule) -> Any:
    """Returns the device of the constants of `model`; None if it has none.

    torchao caches the result for each module, without a limit. The cache would keep each model that was quantized in
    memory, so this calls the function below the cache.
    """
    from torchao.utils import _assert_and_get_unique_device

    return inspect.unwrap(_assert_and_get_unique_device)(model)


def _give_each_reader_a_dequantize(converted: GraphModule) -> None:
    """Copies the dequantize operators that several annotated operators read, so that each has one reader."""
    from torchao.quantization.pt2e.quantizer.duplicate_dq_pass import _maybe_duplicate_dq
    from torchao.quantization.pt2e.utils import _filter_sym_size_users

    for node in converted.graph.nodes:
        if is_dequantize(node) and len(readers := _filter_sym_size_users(node)) > 1:
            for reader in readers:
                _maybe_duplicate_dq(converted, node, reader)
    converted.graph.eliminate_dead_code()
