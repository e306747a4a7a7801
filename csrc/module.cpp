// The Python module of the host delegate. Importing it registers the delegate with ExecuTorch's runtime.
#include "dim_orders.h"
#include "edge_kernels.h"
#include "host_delegate.h"
#include "pools.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

py::tuple run_in_pools(
    const py::bytes& pte,
    const std::string& method,
    const std::vector<openneutron::Input>& inputs,
    std::optional<uint32_t> method_bytes,
    std::optional<uint32_t> temporary_bytes,
    std::optional<std::vector<size_t>> planned_bytes) {
  const openneutron::PoolUse use = openneutron::run_in_pools(
      std::string_view(pte), method, inputs, {method_bytes, temporary_bytes, std::move(planned_bytes)});
  py::list outputs;
  for (const std::string& bytes : use.outputs) {
    outputs.append(py::bytes(bytes));
  }
  return py::make_tuple(use.method, use.temporary_of_load, use.temporary_of_run, outputs);
}

}  // namespace

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
  module.def(
      "run_in_pools",
      &run_in_pools,
      py::arg("pte"),
      py::arg("method"),
      py::arg("inputs"),
      py::arg("method_bytes") = py::none(),
      py::arg("temporary_bytes") = py::none(),
      py::arg("planned_bytes") = py::none(),
      "Load a method and run it once in pools of these sizes; None stands for a pool as large as needed. Returns the "
      "bytes that were allocated (method, temporary at load, temporary in the run), and the bytes of the outputs. "
      "Raises MemoryError if a pool is too small, ValueError for an invalid program, method or input.");
  module.def("clear_error", &openneutron::clear_error, "Forget this thread's last error and interrupt.");
}
