// What ExecuTorch's Python bindings leave out of a method's metadata.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace openneutron {

// The dim order of each input of `method` in the program that `pte` holds. The runtime takes an input's bytes as they
// lie, so an input in any other order gives wrong numbers and no error.
// Throws std::invalid_argument where the bytes are no program, the method is not in it, or an input is no tensor.
std::vector<std::vector<uint8_t>> input_dim_orders(std::string_view pte, const std::string& method);

}  // namespace openneutron
