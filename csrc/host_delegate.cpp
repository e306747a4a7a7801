#include "host_delegate.h"

#include "transpose.h"

#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/platform/log.h>
#include <pybind11/gil_simple.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace py = pybind11;
namespace et = executorch::runtime;

namespace openneutron {
namespace {

thread_local std::string thread_error;
thread_local bool thread_interrupted = false;

// A tensor of the TFLite model, and the delegate argument that it is copied from or to.
struct Port {
  size_t argument;
  bool channels_last;
  int dtype;  // of executorch's ScalarType
  size_t channels;  // the last dimension of the TFLite tensor, 0 for a scalar
  py::object view;  // () -> numpy view of the interpreter's buffer
};

struct Engine {
  py::object invoke;
  size_t argument_count;
  std::vector<Port> inputs;
  std::vector<Port> outputs;
  std::atomic_flag busy;
};

// An error in the caller's arguments, as opposed to a failure in Python or LiteRT.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Claim {
 public:
  explicit Claim(std::atomic_flag& flag) : flag_(flag), held_(!flag.test_and_set(std::memory_order_acquire)) {}
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  ~Claim() {
    if (held_) {
      flag_.clear(std::memory_order_release);
    }
  }
  bool held() const {
    return held_;
  }

 private:
  std::atomic_flag& flag_;
  bool held_;
};

bool python_is_gone() {
#if PY_VERSION_HEX >= 0x030D0000
  return !Py_IsInitialized() || Py_IsFinalizing();
#else
  return !Py_IsInitialized() || _Py_IsFinalizing();
#endif
}

et::Error fail(et::Error code, std::string message) {
  ET_LOG(Error, "NeutronBackend: %s", message.c_str());
  thread_error = std::move(message);
  return code;
}

// Records the message of a Python exception without its traceback, and returns the error code.
et::Error fail_with(const py::error_already_set& error) {
  // Ctrl-C during a run arrives here. ExecuTorch has no error code for it, and its bindings abort if a signal is
  // pending when they raise. So the caller of the program must call interrupted().
  thread_interrupted = error.matches(PyExc_KeyboardInterrupt);
  const std::string text = py::str(error.value());
  if (error.matches(py::module_::import("openneutron.errors").attr("OpenNeutronError"))) {
    return fail(et::Error::DelegateInvalidCompatibility, text);
  }
  return fail(et::Error::Internal, py::str(error.type().attr("__name__")).cast<std::string>() + ": " + text);
}

// Runs `body` with the GIL held, and converts exceptions to error codes.
template <typename Body>
et::Error guarded(Body body) {
  if (python_is_gone()) {
    return fail(et::Error::InvalidState, "the Python interpreter is shutting down");
  }
  const py::gil_scoped_acquire_simple gil;
  try {
    try {
      return body();
    } catch (const py::error_already_set& error) {
      return fail_with(error);  // may throw, because it runs Python
    }
  } catch (const ArgumentError& error) {
    return fail(et::Error::InvalidArgument, error.what());
  } catch (const std::exception& error) {
    return fail(et::Error::Internal, error.what());
  }
}

std::vector<Port> ports(const py::handle& engine, const char* attribute) {
  std::vector<Port> result;
  for (const py::handle port : engine.attr(attribute)) {
    result.push_back(
        {port.attr("argument").cast<size_t>(),
         port.attr("channels_last").cast<bool>(),
         port.attr("dtype").cast<int>(),
         port.attr("channels").cast<size_t>(),
         port.attr("view")});
  }
  return result;
}

std::string describe(const Port& port) {
  return "delegate argument " + std::to_string(port.argument);
}

et::etensor::Tensor tensor_at(const Port& port, et::Span<et::EValue*> args) {
  const et::EValue* value = args[port.argument];
  if (value == nullptr || !value->isTensor()) {
    throw ArgumentError(describe(port) + " is not a tensor");
  }
  const auto tensor = value->toTensor();
  if (static_cast<int>(tensor.scalar_type()) != port.dtype) {
    throw ArgumentError(
        describe(port) + " has scalar type " + std::to_string(static_cast<int>(tensor.scalar_type())) +
        ", the TFLite model takes " + std::to_string(port.dtype));
  }
  if (tensor.const_data_ptr() == nullptr && tensor.nbytes() != 0) {
    throw ArgumentError(describe(port) + " has no memory");
  }
  return tensor;
}

// Whether the dimensions of the tensor are stored in order, or with channels (dimension 1) last. Ignores dimensions of
// size 1, because their position does not affect the order of bytes, and exporters place them arbitrarily.
bool lies_in_order(const et::etensor::Tensor& tensor, bool channels_last) {
  size_t previous = 0;
  for (const size_t dim : tensor.dim_order()) {
    if (tensor.size(dim) == 1) {
      continue;
    }
    const size_t rank = channels_last && dim == 1 ? tensor.dim() : dim;
    if (rank < previous) {
      return false;
    }
    previous = rank;
  }
  return true;
}

// Returns the matrices [C, S] that must be transposed to make a tensor channels last; a count of 0 if no transpose is
// needed. The rules are those of the device's runtime, extended to every rank.
Matrices channel_matrices(const Port& port, const et::etensor::Tensor& tensor) {
  constexpr Matrices kStraight{0, 0, 0};
  if (!port.channels_last) {
    const auto order = tensor.dim_order();
    if (!et::is_contiguous_dim_order(order.data(), order.size())) {
      throw ArgumentError(describe(port) + " is not contiguous");
    }
    return kStraight;
  }
  if (tensor.dim() < 2) {
    throw ArgumentError(describe(port) + " cannot be converted to channels last: it has no channels");
  }
  const auto batch = static_cast<size_t>(tensor.size(0));
  const auto channels = static_cast<size_t>(tensor.size(1));
  if (channels != port.channels) {
    throw ArgumentError(
        describe(port) + " has " + std::to_string(channels) + " channels, the TFLite model " +
        std::to_string(port.channels));
  }
  if (tensor.numel() == 0 || lies_in_order(tensor, true)) {
    return kStraight;
  }
  if (!lies_in_order(tensor, false)) {
    throw ArgumentError(describe(port) + " is neither contiguous nor channels last");
  }
  return {batch, channels, static_cast<size_t>(tensor.numel()) / (batch * channels)};
}

void copy(const void* source, void* target, size_t bytes, Matrices matrices, size_t element_size) {
  if (matrices.count == 0) {
    std::memcpy(target, source, bytes);
  } else if (!transpose(source, target, matrices, element_size)) {
    throw ArgumentError("elements of " + std::to_string(element_size) + " bytes cannot be transposed");
  }
}

// Returns a view of the interpreter's buffer of a port. Release it before invoke(), because LiteRT counts references.
py::array view_of(const Port& port, size_t bytes) {
  py::array array = port.view();
  if (static_cast<size_t>(array.nbytes()) != bytes) {
    throw ArgumentError(
        describe(port) + " has " + std::to_string(bytes) + " bytes, the TFLite model's tensor " +
        std::to_string(array.nbytes()));
  }
  return array;
}

void copy_in(const Port& port, et::Span<et::EValue*> args) {
  const auto tensor = tensor_at(port, args);
  const Matrices matrices = channel_matrices(port, tensor);
  py::array array = view_of(port, tensor.nbytes());
  copy(tensor.const_data_ptr(), array.mutable_data(), tensor.nbytes(), matrices, tensor.element_size());
}

void copy_out(const Port& port, et::Span<et::EValue*> args) {
  const auto tensor = tensor_at(port, args);
  const Matrices matrices = channel_matrices(port, tensor);
  const py::array array = view_of(port, tensor.nbytes());
  const Matrices back{matrices.count, matrices.columns, matrices.rows};
  copy(array.data(), tensor.mutable_data_ptr(), tensor.nbytes(), back, tensor.element_size());
}

}  // namespace

const std::string& last_error() {
  return thread_error;
}

bool interrupted() {
  return thread_interrupted;
}

void clear_error() {
  thread_error.clear();
  thread_interrupted = false;
}

bool HostDelegate::is_available() const {
  return true;
}

et::Result<et::DelegateHandle*> HostDelegate::init(
    et::BackendInitContext&,
    et::FreeableBuffer* processed,
    et::ArrayRef<et::CompileSpec>) const {
  Engine* handle = nullptr;
  const et::Error error = guarded([&] {
    const auto payload =
        py::memoryview::from_memory(processed->data(), static_cast<py::ssize_t>(processed->size()));
    const py::object python_engine = py::module_::import("openneutron.runtime.engine").attr("Engine")(payload);
    auto engine = std::make_unique<Engine>();
    engine->invoke = python_engine.attr("invoke");
    engine->argument_count = python_engine.attr("argument_count").cast<size_t>();
    engine->inputs = ports(python_engine, "inputs");
    engine->outputs = ports(python_engine, "outputs");
    handle = engine.release();
    return et::Error::Ok;
  });
  if (error != et::Error::Ok) {
    return error;
  }
  processed->Free();
  return static_cast<et::DelegateHandle*>(handle);
}

et::Error HostDelegate::execute(
    et::BackendExecutionContext&,
    et::DelegateHandle* handle,
    et::Span<et::EValue*> args) const {
  return guarded([&] {
    auto& engine = *static_cast<Engine*>(handle);
    const Claim claim(engine.busy);
    if (!claim.held()) {
      return fail(et::Error::InvalidState, "the program is running in another thread");
    }
    const size_t expected = engine.argument_count + engine.outputs.size();
    if (args.size() != expected) {
      throw ArgumentError(
          "the program gives the delegate " + std::to_string(args.size()) + " arguments, the payload takes " +
          std::to_string(expected));
    }
    for (const Port& port : engine.inputs) {
      copy_in(port, args);
    }
    engine.invoke();
    for (const Port& port : engine.outputs) {
      copy_out(port, args);
    }
    return et::Error::Ok;
  });
}

void HostDelegate::destroy(et::DelegateHandle* handle) const {
  // Python objects cannot be released after the interpreter has shut down. The leak is harmless, as the process ends.
  if (python_is_gone()) {
    return;
  }
  const py::gil_scoped_acquire_simple gil;
  delete static_cast<Engine*>(handle);
}

}  // namespace openneutron
