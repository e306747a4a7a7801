"""Builds an exported program from another program and a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import TreeSpec, tree_leaves, tree_structure, tree_unflatten, treespec_dumps

from openneutron.core.fx import output_node

__all__ = ["with_graph"]

Spec = TypeVar("Spec", InputSpec, OutputSpec)


def with_graph(
    program: ExportedProgram,
    graph: Graph,
    copies: Mapping[Node, Node],
    *,
    inputs: Sequence[InputSpec] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    kind: type[ExportedProgram] = ExportedProgram,
    verifiers: Sequence[type[Verifier]] | None = None,
) -> ExportedProgram:
    """Returns `program` with another graph.

    `copies` maps nodes of the program to nodes of `graph`, and contains at least the inputs. `inputs` are the input
    specs, by default those of the program. `constants` and `state` are added to those of the program, or replace those
    of the same name. The signature is a copy; the tensors are shared with `program`. The result has the class `kind`
    and the `verifiers`, by default those of the program.
    """
    names = {old.name: new.name for old, new in copies.items()}
    signature = program.graph_signature
    returned = output_node(graph).args[0]
    assert isinstance(returned, (tuple, list))  # torch.export guarantees this
    return kind(
        root=GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(
            [
                _rename_spec(spec, names.get(_spec_name(spec)))
                for spec in (signature.input_specs if inputs is None else inputs)
            ],
            [
                _rename_spec(spec, getattr(value, "name", None))
                for spec, value in zip(signature.output_specs, returned, strict=True)
            ],
        ),
        state_dict={**program.state_dict, **(state or {})},
        range_constraints=program.range_constraints,
        **_flatten_containers(program),
        constants={**program.constants, **(constants or {})},
        verifiers=list(program.verifiers if verifiers is None else verifiers),
    )


def _flatten_containers(program: ExportedProgram) -> dict[str, Any]:
    """Returns the program's call graph and example inputs, flattened if ExecuTorch cannot serialize their containers.

    ExecuTorch writes the registered name of each container's type. `torch.export.register_dataclass` registers no name
    by default.
    """
    root, *others = program.module_call_graph
    signature, examples = root.signature, program.example_inputs
    if signature is not None and not _has_registered_names(signature.in_spec):
        structure = tree_structure((tuple(range(signature.in_spec.num_leaves)), {}))
        signature = replace(signature, in_spec=structure, forward_arg_names=None)
        examples = None if examples is None else tree_unflatten(tree_leaves(examples), structure)
    if signature is not None and not _has_registered_names(signature.out_spec):
        signature = replace(signature, out_spec=tree_structure(tuple(range(signature.out_spec.num_leaves))))
    entry = root if signature is root.signature else replace(root, signature=signature)
    return {"module_call_graph": [entry, *others], "example_inputs": examples}


def _has_registered_names(structure: TreeSpec) -> bool:
    try:
        treespec_dumps(structure)
    except NotImplementedError:
        return False
    return True


def _spec_name(spec: InputSpec) -> str:
    return str(getattr(spec.arg, "name", ""))


def _rename_spec(spec: Spec, name: str | None) -> Spec:
    """Returns `spec` with the name `name`; unchanged if that is None.

    A name changes if torch.fx renames a placeholder with the name of a builtin ('input'), or if another node computes
    an output.
    """
    return spec if name is None else replace(spec, arg=replace(spec.arg, name=name))
