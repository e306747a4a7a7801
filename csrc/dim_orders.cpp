#include "dim_orders.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/runtime/executor/program.h>

#include <stdexcept>

namespace et = executorch::runtime;

namespace openneutron {
namespace {

template <typename Value>
Value& value_or_throw(et::Result<Value>& result, const std::string& what) {
  if (!result.ok()) {
    throw std::invalid_argument(what + " (ExecuTorch's error " + std::to_string(static_cast<int>(result.error())) + ")");
  }
  return result.get();
}

}  // namespace

std::vector<std::vector<uint8_t>> input_dim_orders(std::string_view pte, const std::string& method) {
  executorch::extension::BufferDataLoader loader(pte.data(), pte.size());
  auto program = et::Program::load(&loader, et::Program::Verification::InternalConsistency);
  auto meta = value_or_throw(program, "the bytes are not an ExecuTorch program").method_meta(method.c_str());
  const size_t count = value_or_throw(meta, "no method '" + method + "'").num_inputs();

  std::vector<std::vector<uint8_t>> orders;
  for (size_t index = 0; index < count; ++index) {
    auto info = meta->input_tensor_meta(index);
    const auto order = value_or_throw(info, "input " + std::to_string(index) + " is not a tensor").dim_order();
    orders.emplace_back(order.begin(), order.end());
  }
  return orders;
}

}  // namespace openneutron
