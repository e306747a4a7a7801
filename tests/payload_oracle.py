"""Prints what ExecuTorch's own code reads from converted models: `python payload_oracle.py REQUESTS`, in a process of
its own.

REQUESTS is a JSON file with a list of {"model": path, "inputs": [0 or 1, ...], "outputs": [...], "result": path}. The
formats are those of the graph's inputs and outputs, 1 for channels last. The test double replaces the vendor's SDK,
which that code imports.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "doubles"))
    from executorch.backends.nxp.backend.data_format import DataFormat
    from executorch.backends.nxp.backend.ir.lib.tflite.Model import Model
    from executorch.backends.nxp.nxp_backend import PayloadComposer

    known = {1: DataFormat.CHANNELS_LAST, 0: DataFormat.FORMATLESS}
    for request in json.loads(Path(sys.argv[1]).read_text()):
        model = Path(request["model"]).read_bytes()
        graph = Model.GetRootAs(model, 0).Subgraphs(0)
        io_formats = {}
        for side, indices in (("inputs", graph.InputsAsNumpy()), ("outputs", graph.OutputsAsNumpy())):
            names = [graph.Tensors(index).Name().decode() for index in indices.tolist()]
            io_formats[side] = {name: known[flag] for name, flag in zip(names, request[side], strict=True)}
        Path(request["result"]).write_bytes(PayloadComposer().get_binary_payload(io_formats, model))


if __name__ == "__main__":
    main()
