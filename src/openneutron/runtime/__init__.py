"""Run `.pte` programs on the host. Importing this package registers the delegate with ExecuTorch's runtime.

The delegate then serves every runtime of the process: this package's HostProgram and `executorch.runtime` alike, in
whatever order they are imported.
"""

# Both load libraries for their effect: `_C` first, so that `_host` finds libexecutorch.so in the process, wherever
# executorch is installed.
import executorch.extension.pybindings._C  # noqa: F401

import openneutron.runtime._host  # noqa: F401
from openneutron.runtime.program import HostProgram, TensorInfo, load

__all__ = ["HostProgram", "TensorInfo", "load"]
