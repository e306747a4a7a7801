"""Runs `.pte` programs on the host. Importing this package registers the delegate with ExecuTorch's runtime.

The delegate then serves both this package's HostProgram and `executorch.runtime`, in any order of imports. If the
native module is not installed, nothing is registered, and running a program raises `NativeModuleError`.
"""

from openneutron.formats.method_memory import MethodMemory
from openneutron.runtime.native import is_installed
from openneutron.runtime.program import HostProgram, TensorInfo, load
from openneutron.runtime.timing import time_on_host

__all__ = ["HostProgram", "MethodMemory", "TensorInfo", "load", "time_on_host"]

is_installed()  # imports the native module, which registers the delegate
