// OpenNeutron's host delegate is a Python module, because LiteRT's wheel has only a Python interface. This starts the
// Python that CMake found, and imports the module, which registers the delegate with the runtime of this process.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "host_backend.h"

#include <cstdio>

bool start_host_backend() {
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  config.install_signal_handlers = 0;
  PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, OPENNEUTRON_PYTHON);
  if (!PyStatus_Exception(status)) {
    status = Py_InitializeFromConfig(&config);
  }
  PyConfig_Clear(&config);
  if (PyStatus_Exception(status)) {
    std::printf("FAIL: Python does not start: %s\n", status.err_msg == nullptr ? "unknown reason" : status.err_msg);
    return false;
  }
  if (PyRun_SimpleString("from openneutron.runtime.native import native_module; native_module()") != 0) {
    std::printf("FAIL: %s cannot import OpenNeutron's host delegate\n", OPENNEUTRON_PYTHON);
    return false;
  }
  PyEval_SaveThread();  // the delegate takes the interpreter's lock itself
  return true;
}
