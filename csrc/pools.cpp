#include "pools.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/executor/program.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>

namespace et = executorch::runtime;

namespace openneutron {
namespace {

using executorch::aten::StridesType;
using executorch::aten::TensorImpl;

// Memory whose first byte is aligned. Not initialized.
class Block {
 public:
  Block(size_t size, size_t alignment) : bytes_(new uint8_t[size + alignment]), size_(size) {
    void* start = bytes_.get();
    size_t space = size + alignment;
    start_ = static_cast<uint8_t*>(std::align(alignment, size, start, space));
  }
  uint8_t* data() const {
    return start_;
  }
  size_t size() const {
    return size_;
  }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  uint8_t* start_;
  size_t size_;
};

// Allocates as MemoryAllocator does, and notes the first allocation that does not fit. That allocation gets memory from
// elsewhere, because the runtime does not check every allocation.
class Pool final : public et::MemoryAllocator {
 public:
  Pool(const char* name, std::optional<uint32_t> size)
      : MemoryAllocator(0, nullptr),
        name_(name),
        limit_(size.value_or(std::numeric_limits<uint32_t>::max())),
        block_(size.value_or(0), kPoolAlignment) {}

  void* allocate(size_t size, size_t alignment) override {
    if (!isPowerOf2(alignment)) {
      return nullptr;
    }
    const size_t start = (used_ + alignment - 1) & ~(alignment - 1);
    const size_t end = start + size;
    if (end > limit_ && failure_.empty()) {
      failure_ = std::string(name_) + " has " + std::to_string(limit_) + " bytes, of which " + std::to_string(used_) +
          " are in use: it cannot provide " + std::to_string(size) + " bytes aligned to " + std::to_string(alignment);
    }
    used_ = end;
    peak_ = std::max(peak_, end);
    return end <= block_.size() ? block_.data() + start : spilled_.emplace_back(size, alignment).data();
  }

  uint32_t size() const override {
    return limit_;
  }
  size_t used_size() const override {
    return used_;
  }
  size_t free_size() const override {
    return limit_ - std::min<size_t>(limit_, used_);
  }
  void reset() override {
    used_ = 0;
    spilled_.clear();
  }

  // Returns the most bytes in use at one time since the last call.
  size_t take_peak() {
    return std::exchange(peak_, 0);
  }
  void check() const {
    if (!failure_.empty()) {
      throw PoolTooSmall(failure_);
    }
  }

 private:
  const char* name_;
  uint32_t limit_;
  Block block_;
  std::vector<Block> spilled_;
  size_t used_ = 0;
  size_t peak_ = 0;
  std::string failure_;
};

template <typename Error>
void require_ok(et::Error code, const std::string& what) {
  if (code != et::Error::Ok) {
    throw Error(what + " (ExecuTorch's error " + std::to_string(static_cast<int>(code)) + ")");
  }
}

std::vector<Block> planned_blocks(const et::MethodMeta& meta, const PoolSizes& sizes) {
  const size_t count = meta.num_memory_planned_buffers();
  if (sizes.planned && sizes.planned->size() != count) {
    throw std::invalid_argument("the method has " + std::to_string(count) + " planned buffers");
  }
  std::vector<Block> result;
  for (size_t index = 0; index < count; ++index) {
    const auto needed = static_cast<size_t>(*meta.memory_planned_buffer_size(index));
    const size_t size = sizes.planned ? sizes.planned->at(index) : needed;
    if (size < needed) {
      throw PoolTooSmall(
          "planned buffer " + std::to_string(index) + " has " + std::to_string(size) + " bytes: the program needs " +
          std::to_string(needed));
    }
    result.emplace_back(size, kPoolAlignment);
  }
  return result;
}

void set_tensor(et::Method& method, const et::TensorInfo& info, size_t index, std::string_view bytes) {
  const std::string name = "input " + std::to_string(index);
  if (bytes.size() != info.nbytes()) {
    throw std::invalid_argument(name + " has " + std::to_string(info.nbytes()) + " bytes");
  }
  std::vector<TensorImpl::SizesType> dims(info.sizes().begin(), info.sizes().end());
  std::vector<TensorImpl::DimOrderType> order(info.dim_order().begin(), info.dim_order().end());
  std::vector<StridesType> strides(dims.size());
  require_ok<std::invalid_argument>(
      et::dim_order_to_stride(dims.data(), order.data(), dims.size(), strides.data()), name + " has no dim order");
  TensorImpl tensor(
      info.scalar_type(),
      static_cast<ssize_t>(dims.size()),
      dims.data(),
      const_cast<char*>(bytes.data()),  // the runtime only reads inputs
      order.data(),
      strides.data());
  require_ok<std::invalid_argument>(
      method.set_input(et::EValue(executorch::aten::Tensor(&tensor)), index), name + " is not accepted");
}

et::EValue constant(const Input& input) {
  if (const auto* flag = std::get_if<bool>(&input)) {
    return et::EValue(*flag);
  }
  if (const auto* integer = std::get_if<int64_t>(&input)) {
    return et::EValue(*integer);
  }
  if (const auto* number = std::get_if<double>(&input)) {
    return et::EValue(*number);
  }
  return et::EValue();
}

void set_inputs(et::Method& method, const std::vector<Input>& inputs) {
  const et::MethodMeta meta = method.method_meta();
  if (inputs.size() != meta.num_inputs()) {
    throw std::invalid_argument("the method has " + std::to_string(meta.num_inputs()) + " inputs");
  }
  for (size_t index = 0; index < inputs.size(); ++index) {
    const auto info = meta.input_tensor_meta(index);
    const auto* bytes = std::get_if<std::string_view>(&inputs[index]);
    if (info.ok() != (bytes != nullptr)) {
      throw std::invalid_argument("input " + std::to_string(index) + (bytes ? " is not a tensor" : " is a tensor"));
    }
    if (bytes != nullptr) {
      set_tensor(method, *info, index, *bytes);
    } else {
      require_ok<std::invalid_argument>(
          method.set_input(constant(inputs[index]), index), "input " + std::to_string(index) + " is another constant");
    }
  }
}

// Gives memory to the outputs that the program does not plan.
std::vector<Block> set_outputs(et::Method& method) {
  const et::MethodMeta meta = method.method_meta();
  std::vector<Block> blocks;
  for (size_t index = 0; index < meta.num_outputs(); ++index) {
    const auto info = meta.output_tensor_meta(index);
    if (info.ok() && !info->is_memory_planned()) {
      const Block& block = blocks.emplace_back(info->nbytes(), kPoolAlignment);
      // Fails for a constant and for an input that is returned, which have memory.
      (void)method.set_output_data_ptr(block.data(), block.size(), index);
    }
  }
  return blocks;
}

std::vector<std::string> outputs_of(const et::Method& method) {
  std::vector<std::string> result;
  for (size_t index = 0; index < method.outputs_size(); ++index) {
    const et::EValue& value = method.get_output(index);
    std::string& bytes = result.emplace_back();
    if (value.isTensor()) {
      const auto tensor = value.toTensor();
      bytes.assign(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    }
  }
  return result;
}

}  // namespace

PoolUse run_in_pools(
    std::string_view pte,
    const std::string& method_name,
    const std::vector<Input>& inputs,
    const PoolSizes& sizes) {
  executorch::extension::BufferDataLoader loader(pte.data(), pte.size());
  auto program = et::Program::load(&loader, et::Program::Verification::InternalConsistency);
  require_ok<std::invalid_argument>(program.error(), "the bytes are not an ExecuTorch program");
  const auto meta = program->method_meta(method_name.c_str());
  require_ok<std::invalid_argument>(meta.error(), "no method '" + method_name + "'");

  const std::vector<Block> blocks = planned_blocks(*meta, sizes);
  std::vector<et::Span<uint8_t>> spans;
  for (const Block& block : blocks) {
    spans.emplace_back(block.data(), block.size());
  }
  et::HierarchicalAllocator planned({spans.data(), spans.size()});
  Pool method_pool("the pool of the method allocator", sizes.method);
  Pool temporary_pool("the pool of the temporary allocator", sizes.temporary);
  et::MemoryManager manager(&method_pool, &planned, &temporary_pool);

  auto method = program->load_method(method_name.c_str(), &manager);
  method_pool.check();
  temporary_pool.check();
  require_ok<std::runtime_error>(method.error(), "the method cannot be loaded");
  PoolUse use{method_pool.used_size(), temporary_pool.take_peak(), 0, {}};

  const std::vector<Block> outputs = set_outputs(*method);
  set_inputs(*method, inputs);
  const et::Error error = method->execute();
  method_pool.check();
  temporary_pool.check();
  require_ok<std::runtime_error>(error, "the method fails");
  use.temporary_of_run = temporary_pool.take_peak();
  use.outputs = outputs_of(*method);
  return use;
}

}  // namespace openneutron
