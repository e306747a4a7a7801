// Runs a method of a program in memory pools of given sizes, and counts what ExecuTorch's runtime allocates from them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace openneutron {

// Alignment of the pools, as NXP's runner aligns them, in bytes.
constexpr size_t kPoolAlignment = 16;

// An allocation did not fit into its pool.
class PoolTooSmall : public std::bad_alloc {
 public:
  explicit PoolTooSmall(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override {
    return message_.c_str();
  }

 private:
  std::string message_;
};

// The bytes of a tensor, or the value of a constant input.
using Input = std::variant<std::monostate, bool, int64_t, double, std::string_view>;

// Sizes in bytes; without a size, the pool is as large as needed.
struct PoolSizes {
  std::optional<uint32_t> method;
  std::optional<uint32_t> temporary;
  std::optional<std::vector<size_t>> planned;
};

struct PoolUse {
  size_t method;  // when the method is loaded
  size_t temporary_of_load;  // the most at one time
  size_t temporary_of_run;
  std::vector<std::string> outputs;  // bytes of the tensors; empty for an output that is not a tensor
};

// Loads `method` of the program `pte` and runs it once.
// Throws PoolTooSmall if a pool is too small, std::invalid_argument for an invalid program, method or input, and
// std::runtime_error if the runtime fails for another reason.
PoolUse run_in_pools(
    std::string_view pte,
    const std::string& method,
    const std::vector<Input>& inputs,
    const PoolSizes& sizes);

}  // namespace openneutron
