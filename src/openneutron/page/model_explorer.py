"""Writes graphs and node data for Google's Model Explorer (PyPI: ai-edge-model-explorer; format of version 0.1.34)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.files import created_folder, write_files
from openneutron.core.fx import (
    is_dequantize,
    is_operator,
    is_quantize,
    iterate_nodes,
    modules_of,
    op_name,
    placeholders,
)
from openneutron.formats import tflite
from openneutron.page.content import LayerRow, PlacementRow, Summary
from openneutron.report.extract import tflite_models

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["GRAPHS", "write_model_explorer"]

GRAPHS = "graphs.json"
MODEL_GRAPH = "model"
"""The id of the graph of ATen operators."""
_LOW_TO_HIGH = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#e8590c"}]
_BAD_TO_GOOD = [{"stop": 0, "bgColor": "#e8590c"}, {"stop": 1, "bgColor": "#ffffff"}]

Graph = dict[str, Any]


def write_model_explorer(
    portable: bytes, summary: Summary, folder: str | os.PathLike[str], module: GraphModule | None = None
) -> tuple[Path, ...]:
    """Writes graphs.json and a file of node data for each measure to `folder`. Returns the paths.

    graphs.json has a graph for each delegate of the `portable` program, and the graph of the ATen operators of
    `module`, the float graph or the converted module, grouped by modules. The node data are estimated cycles and bytes
    of weights, the processor of each operator (1 for the NPU, 0 for the CPU), and, if `summary` has an analysis, the
    SQNR of each layer in dB.

    Open them with `model-explorer graphs.json --node_data_paths=cycles.json`. Raises `OutputError` if a file cannot be
    written, and `PayloadError` for a program that is not portable. Linear in the operators.
    """
    models = [tflite.read_checked(model) for model in tflite_models(portable)]
    layers = [[row for row in summary.layers if row.delegate == index] for index in range(len(models))]
    delegates = [
        _delegate_graph(f"delegate{index}", model.subgraphs[0], rows)
        for index, (model, rows) in enumerate(zip(models, layers, strict=True))
    ]
    placement = {row.node: row for row in summary.placement}
    graphs = [*([] if module is None else [_model_graph(module, placement)]), *delegates]
    files = {GRAPHS: {"label": summary.model, "graphs": graphs}, **_node_data(summary, layers, delegates, module)}
    with created_folder(folder) as written:
        contents = {written / name: json.dumps(content).encode() for name, content in files.items()}
        write_files(contents)
    return tuple(contents)


def _delegate_graph(name: str, graph: tflite.Subgraph, layers: Sequence[LayerRow]) -> Graph:
    """Returns the graph of a TFLite model. The id of a node is the name of its first output tensor."""
    rows = {row.tensor: row for row in layers}
    producers = {tensor.index: (f"input{number}", 0) for number, tensor in enumerate(graph.inputs)}
    nodes = [_node(f"input{i}", "input", outputs=[_tensor(tensor)]) for i, tensor in enumerate(graph.inputs)]
    for operator in graph.operators:
        identifier = operator.outputs[0].name
        row = rows.get(identifier)
        computed = [tensor for tensor in operator.inputs if tensor is not None and tensor.index in producers]
        nodes.append(
            _node(
                identifier,
                operator.name,
                namespace="" if row is None else _namespace(row.module),
                edges=[producers[tensor.index] for tensor in computed],
                attributes={**_estimates(row), **operator.attrs, **_constants(operator)},
                outputs=map(_tensor, operator.outputs),
            )
        )
        producers.update({tensor.index: (identifier, number) for number, tensor in enumerate(operator.outputs)})
    for number, tensor in enumerate(graph.outputs):
        edges = [producers[tensor.index]] if tensor.index in producers else []
        nodes.append(_node(f"output{number}", "output", edges=edges))
    return {"id": name, "nodes": nodes}


def _estimates(row: LayerRow | None) -> dict[str, Any]:
    if row is None:
        return {}
    found = {
        "cycles (estimated)": row.cycles, "MACs": row.macs, "busy share of the array": f"{row.utilization:.3f}",
        "bytes of weights": row.weight_bytes, "node": row.node, "source": row.source,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _constants(operator: tflite.Operator) -> dict[str, Any]:
    constants = [tensor for tensor in operator.inputs if tensor is not None and tensor.buffer is not None]
    return {f"constant {number}": f"{one.dtype} {list(one.shape)}" for number, one in enumerate(constants)}


def _tensor(tensor: tflite.FileTensor) -> dict[str, Any]:
    found: dict[str, Any] = {"tensor_name": tensor.name, "shape": f"{tensor.dtype} {list(tensor.shape)}"}
    if tensor.quantization is not None and len(tensor.quantization.scale) == 1:
        found["quantization"] = (
            f"scale {tensor.quantization.scale[0]:.9g}, zero point {tensor.quantization.zero_point[0]}"
        )
    return found


def _model_graph(module: GraphModule, placement: Mapping[str, PlacementRow]) -> Graph:
    """Returns the graph of ATen operators. The id of a node is its name. Conversions to and from int8 are left out."""
    inputs = placeholders(module.graph)
    known = {node: node.name for node in inputs}
    shown = []
    for node in filter(is_operator, module.graph.nodes):
        if is_quantize(node) or is_dequantize(node):
            known.update({node: known[node.all_input_nodes[0]]} if node.all_input_nodes[0] in known else {})
        else:
            shown.append(node)
            known[node] = node.name
    nodes = [_node(node.name, "input", outputs=[_value(node)]) for node in inputs]
    for node in shown:
        modules = modules_of(node)
        row = placement.get(node.name)
        nodes.append(
            _node(
                node.name,
                op_name(node),
                namespace=_namespace(modules[-1][0] if modules else None),
                edges=[(known[one], 0) for one in node.all_input_nodes if one in known],
                attributes=_placement(row),
                outputs=[_value(node)],
            )
        )
    returned = iterate_nodes(list(module.graph.nodes)[-1].args)
    nodes += [
        _node(f"output{number}", "output", edges=[(known[one], 0)] if one in known else [])
        for number, one in enumerate(returned)
    ]
    return {"id": MODEL_GRAPH, "nodes": nodes}


def _placement(row: PlacementRow | None) -> dict[str, Any]:
    if row is None:
        return {}
    found = {"runs on": row.where.upper(), "reason": row.reason, "delegate": row.partition, "source": row.source}
    return {name: value for name, value in found.items() if value is not None}


def _value(node: Node) -> dict[str, Any]:
    value: Any = node.meta.get("val")
    shape = {"shape": f"{value.dtype} {list(value.shape)}"} if hasattr(value, "shape") else {}
    return {"tensor_name": node.name, **shape}


def _namespace(module: str | None) -> str:
    return (module or "").replace(".", "/")


def _node(
    identifier: str,
    label: str,
    *,
    namespace: str = "",
    edges: Iterable[tuple[str, int]] = (),
    attributes: Mapping[str, Any] | None = None,
    outputs: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    return {
        "id": identifier,
        "label": label,
        "namespace": namespace,
        "attrs": _pairs(attributes or {}),
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": str(number), "targetNodeInputId": str(position)}
            for position, (source, number) in enumerate(edges)
        ],
        "outputsMetadata": [{"id": str(number), "attrs": _pairs(one)} for number, one in enumerate(outputs)],
    }


def _pairs(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": name, "value": str(value)} for name, value in values.items()]


def _node_data(
    summary: Summary, layers: Sequence[Sequence[LayerRow]], delegates: Sequence[Graph], module: GraphModule | None
) -> dict[str, Any]:
    """Returns the files of node data, by name."""
    ids = [{node["id"] for node in graph["nodes"]} for graph in delegates]

    def values_of_layers(value: Callable[[LayerRow], float]) -> dict[str, dict[str, float]]:
        return {
            graph["id"]: {row.tensor: value(row) for row in rows if row.tensor in known}
            for graph, rows, known in zip(delegates, layers, ids, strict=True)
        }

    files = {
        "cycles.json": _data("estimated cycles", values_of_layers(lambda row: row.cycles), _LOW_TO_HIGH),
        "weight_bytes.json": _data("bytes of weights", values_of_layers(lambda row: row.weight_bytes), _LOW_TO_HIGH),
    }
    if module is None:
        return files
    names = {node.name for node in module.graph.nodes}
    where = {row.node: float(row.where == "npu") for row in summary.placement if row.node in names}
    files["placement.json"] = _data("runs on the NPU", {MODEL_GRAPH: where}, _BAD_TO_GOOD)
    if summary.analysis is not None:
        sqnr = {
            row.node: row.sqnr_db for row in summary.analysis.layers if row.node in names and row.sqnr_db is not None
        }
        files["sqnr.json"] = _data("SQNR in dB", {MODEL_GRAPH: sqnr}, _BAD_TO_GOOD)
    return files


def _data(name: str, values: Mapping[str, Mapping[str, float]], gradient: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        graph: {
            "name": name,
            "results": {node: {"value": value} for node, value in found.items()},
            "gradient": gradient,
        }
        for graph, found in values.items()
    }
