// Metadata of methods that ExecuTorch's Python bindings lack.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace openneutron {

// Returns the dim order of each input of `method` in the program `pte`. The runtime does not check the order of an
// input's bytes, so an input in another order gives wrong numbers and no error.
// Throws std::invalid_argument if the bytes are not a program, the method does not exist, or an input is not a tensor.
std::vector<std::vector<uint8_t>> input_dim_orders(std::string_view pte, const std::string& method);

}  // namespace openneutron
