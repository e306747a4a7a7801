#include "edge_kernels.h"

#include "quantize.h"

#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace et = executorch::runtime;

namespace openneutron {
namespace {

using DimOrder = std::vector<executorch::aten::DimOrderType>;
using ScalarType = executorch::aten::ScalarType;
using Stack = et::Span<et::EValue*>;
using Tensor = executorch::aten::Tensor;

// On other processors, ExecuTorch's own kernels are vectorized and treat NaN differently.
#if defined(__x86_64__)
constexpr bool kFasterThanExecuTorch = true;
#else
constexpr bool kFasterThanExecuTorch = false;
#endif

constexpr const char* kQuantize = "quantized_decomposed::quantize_per_tensor.out";
constexpr const char* kDequantize = "quantized_decomposed::dequantize_per_tensor.out";

void require(bool holds, const char* what) {
  if (!holds) {
    throw std::invalid_argument(what);
  }
}

template <typename Value>
Value value_of(const et::Result<Value>& result, const char* what) {
  require(result.ok(), what);
  return *result;
}

// Arguments of both operators: (input, scale, zero_point, quant_min, quant_max, dtype, ..., out, and out again as the
// result).
struct Arguments {
  Tensor input;
  Grid grid;
  int64_t quant_min;
  int64_t quant_max;
  Tensor out;
};

Arguments arguments(Stack stack, size_t out_index, ScalarType from, ScalarType to) {
  require(stack.size() > out_index, "too few arguments");
  Arguments result{
      value_of(stack[0]->tryToTensor(), "the input is not a tensor"),
      // ExecuTorch's kernels also convert scale to float and zero_point to int32_t.
      {static_cast<float>(value_of(stack[1]->tryToDouble(), "scale is not a float")),
       static_cast<int32_t>(value_of(stack[2]->tryToInt(), "zero_point is not an integer"))},
      value_of(stack[3]->tryToInt(), "quant_min is not an integer"),
      value_of(stack[4]->tryToInt(), "quant_max is not an integer"),
      value_of(stack[out_index]->tryToTensor(), "out is not a tensor"),
  };
  const int64_t dtype = value_of(stack[5]->tryToInt(), "dtype is not an integer");
  require(dtype == static_cast<int64_t>(ScalarType::Char), "dtype is not int8");
  const auto& [input, grid, quant_min, quant_max, out] = result;
  require(input.scalar_type() == from && out.scalar_type() == to, "the tensors are not of the dtypes of the kernel");
  require(et::resize_tensor(result.out, input.sizes()) == et::Error::Ok, "out cannot take the shape of the input");
  const auto order = input.dim_order();
  require(std::equal(order.begin(), order.end(), out.dim_order().begin()), "the tensors differ in dim order");
  require(
      input.numel() == 0 || (input.const_data_ptr() != nullptr && out.const_data_ptr() != nullptr),
      "a tensor has no memory");
  return result;
}

void quantize_per_tensor(Stack stack) {
  const auto [input, grid, quant_min, quant_max, out] = arguments(stack, 6, ScalarType::Float, ScalarType::Char);
  using Limits = std::numeric_limits<int8_t>;
  require(quant_min >= Limits::min() && quant_max <= Limits::max(), "quant_min or quant_max is outside the range of int8");
  const auto count = static_cast<size_t>(input.numel());
  auto* const integers = out.mutable_data_ptr<int8_t>();
  if (quant_min > quant_max) {
    // ExecuTorch applies the lower limit first, so the upper limit takes precedence.
    std::memset(integers, static_cast<int8_t>(quant_max), count);
  } else {
    quantize(input.const_data_ptr<float>(), integers, count, grid, quant_min, quant_max);
  }
}

void dequantize_per_tensor(Stack stack) {
  const auto [input, grid, quant_min, quant_max, out] = arguments(stack, 7, ScalarType::Char, ScalarType::Float);
  require(quant_min <= quant_max, "quant_min is greater than quant_max");
  if (!stack[6]->isNone()) {
    const int64_t out_dtype = value_of(stack[6]->tryToInt(), "out_dtype is not an integer");
    require(out_dtype == static_cast<int64_t>(ScalarType::Float), "out_dtype is not float32");
  }
  dequantize(input.const_data_ptr<int8_t>(), out.mutable_data_ptr<float>(), static_cast<size_t>(input.numel()), grid);
}

// ExecuTorch's kernels end the process for wrong arguments; these kernels let the run fail.
template <void (*kernel)(Stack)>
void guarded(et::KernelRuntimeContext& context, Stack stack) {
  try {
    kernel(stack);
  } catch (const std::exception& error) {
    ET_LOG(Error, "quantize_per_tensor or dequantize_per_tensor: %s", error.what());
    context.fail(et::Error::InvalidArgument);
  }
}

std::vector<DimOrder> dim_orders() {
  std::vector<DimOrder> result{{0, 2, 3, 1}};
  for (size_t rank = 1; rank <= 6; ++rank) {
    DimOrder& contiguous = result.emplace_back(rank);
    std::iota(contiguous.begin(), contiguous.end(), 0);
  }
  return result;
}

// Returns the key of a kernel for such tensors. It is never freed, because the registry keeps the pointer.
const char* key(ScalarType from, ScalarType to, DimOrder& order) {
  const et::Span<DimOrder::value_type> dims(order.data(), order.size());
  // The runtime computes the key from all arguments of the instruction, which lists out twice, also as the result.
  const std::array<et::TensorMeta, 3> tensors{{{from, dims}, {to, dims}, {to, dims}}};
  auto* const text = new std::array<char, et::internal::kKernelKeyBufSize>;
  if (et::internal::make_kernel_key_string({tensors.data(), tensors.size()}, text->data(), text->size()) !=
      et::Error::Ok) {
    throw std::logic_error("ExecuTorch has no kernel key for a dim order");
  }
  return text->data();
}

}  // namespace

void register_edge_kernels() {
  if (!kFasterThanExecuTorch) {
    return;
  }
  std::vector<et::Kernel> kernels;
  for (DimOrder& order : dim_orders()) {
    kernels.emplace_back(kQuantize, key(ScalarType::Float, ScalarType::Char, order), guarded<quantize_per_tensor>);
    kernels.emplace_back(kDequantize, key(ScalarType::Char, ScalarType::Float, order), guarded<dequantize_per_tensor>);
  }
  (void)et::register_kernels({kernels.data(), kernels.size()});  // does not return on failure
}

}  // namespace openneutron
