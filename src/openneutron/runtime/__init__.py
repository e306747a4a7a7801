"""Run `.pte` programs on the host. Importing this package registers the delegate with ExecuTorch's runtime.

The delegate then serves every runtime of the process: this package's HostProgram and `executorch.runtime` alike, in
whatever order they are imported. Where the native module is not installed, nothing is registered, and running a program
raises `NativeModuleError`.
"""

from openneutron.runtime.native import is_installed
from openneutron.runtime.program import HostProgram, TensorInfo, load

__all__ = ["HostProgram", "TensorInfo", "load"]

is_installed()  # imports the native module, which registers the delegate
