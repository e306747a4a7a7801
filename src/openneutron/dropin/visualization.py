"""Writes a program as a file for Google's Model Explorer. ExecuTorch's own function needs an older version of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.core.files import write_file
from openneutron.core.fx import op_name, source_of
from openneutron.errors import OptionError

__all__ = ["visualize_with_clusters"]

Named = Callable[[Node], str | None]


def _tag(node: Node) -> str | None:
    return node.meta.get("delegation_tag")


def _cluster(node: Node) -> str | None:
    return node.meta.get("cluster")


def visualize_with_clusters(  # noqa: PLR0917  the parameters of ExecuTorch's function
    exported_program: ExportedProgram,
    json_file_name: str | os.PathLike[str] | None = None,
    no_open_in_browser: bool = False,  # noqa: ARG001  of Model Explorer itself
    reuse_server: bool = False,  # noqa: ARG001
    get_node_partition_name: Named = _tag,
    get_node_qdq_cluster_name: Named = _cluster,
    **_: Any,
) -> None:
    """Writes a program's graph to `json_file_name` for Model Explorer. Partitions and clusters become groups.

    Raises `OptionError` without a file name, because a browser view needs Model Explorer. Raises `OutputError` if the
    file cannot be written.
    """
    if json_file_name is None:
        raise OptionError(
            "Give json_file_name to write the program to a file, and open that in Model Explorer. ExecuTorch's view "
            "needs an older version of ai-edge-model-explorer than the one that is installed, if any."
        )
    nodes = [
        _explorer_node(node, [get_node_partition_name(node), get_node_qdq_cluster_name(node)])
        for node in exported_program.graph.nodes
    ]
    graphs = {"label": "ExecuTorch", "graphs": [{"id": "forward", "nodes": nodes}]}
    write_file(Path(json_file_name), json.dumps(graphs).encode())


def _explorer_node(node: Node, groups: list[str | None]) -> dict[str, Any]:
    attributes = {"target": str(node.target), "value": str(node.meta.get("val", "")), "source": source_of(node) or ""}
    edges = [
        {"sourceNodeId": source.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(number)}
        for number, source in enumerate(node.all_input_nodes)
    ]
    return {
        "id": node.name,
        "label": op_name(node),
        "namespace": "/".join(group.replace("/", ":") for group in groups if group),
        "attrs": [{"key": key, "value": value} for key, value in attributes.items()],
        "incomingEdges": edges,
    }
