// Quantizing and dequantizing, element by element, as ExecuTorch's own kernels for x86-64 do: equal to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openneutron {

// The integers that stand for numbers: an integer's number is (integer - zero_point) * scale.
struct Grid {
  float scale;
  int32_t zero_point;
};

// Writes the nearest integer of the grid, halves to even, limited to [low, high]; low where the number is a NaN or too
// large for an int64_t.
void quantize(const float* numbers, int8_t* integers, size_t count, Grid grid, int8_t low, int8_t high);

void dequantize(const int8_t* integers, float* numbers, size_t count, Grid grid);

}  // namespace openneutron
