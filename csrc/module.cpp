// The Python module of the host delegate. Importing it registers the delegate with ExecuTorch's runtime.
#include "dim_orders.h"
#include "edge_kernels.h"
#include "host_delegate.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

PYBIND11_MODULE(_host, module) {
  // Never destroyed, because programs may outlive this module's globals, and ExecuTorch cannot unregister a backend.
  static auto* const delegate = new openneutron::HostDelegate;
  const auto error = executorch::runtime::register_backend({"NeutronBackend", delegate});
  if (error != executorch::runtime::Error::Ok) {
    throw py::import_error(
        "ExecuTorch's runtime did not register NeutronBackend (error " + std::to_string(static_cast<int>(error)) +
        "): another delegate of that name is there, or too many are");
  }
  openneutron::register_edge_kernels();
  module.doc() = "The host delegate of NeutronBackend; importing it registers it with ExecuTorch's runtime.";
  module.def(
      "last_error",
      &openneutron::last_error,
      "The message of the last failed call of a delegate on this thread since clear_error(), else an empty string.");
  module.def(
      "interrupted",
      &openneutron::interrupted,
      "Whether a KeyboardInterrupt ended a delegate's call on this thread since clear_error().");
  module.def(
      "input_dim_orders",
      [](const py::bytes& pte, const std::string& method) {
        py::list result;
        for (const auto& order : openneutron::input_dim_orders(std::string_view(pte), method)) {
          result.append(py::tuple(py::cast(std::vector<int>(order.begin(), order.end()))));
        }
        return result;
      },
      py::arg("pte"),
      py::arg("method"),
      "The dim order of each input of a method. Raises ValueError for an invalid program, method or input.");
  module.def("clear_error", &openneutron::clear_error, "Forget this thread's last error and interrupt.");
}
