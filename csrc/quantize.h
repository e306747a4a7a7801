// Quantizes and dequantizes elements with the same results as ExecuTorch's own kernels for x86-64, to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openneutron {

// Quantization parameters: number = (integer - zero_point) * scale.
struct Grid {
  float scale;
  int32_t zero_point;
};

// Writes the nearest integer of each number, rounding half to even and clamped to [low, high]. Writes low for NaN and
// for numbers that overflow an int64_t.
void quantize(const float* numbers, int8_t* integers, size_t count, Grid grid, int8_t low, int8_t high);

void dequantize(const int8_t* integers, float* numbers, size_t count, Grid grid);

}  // namespace openneutron
