#include "quantize.h"

#include <cmath>

// The x86-64 baseline has no instructions to round or widen eight values at once. With glibc, the loader selects the
// version for the CPU. It does so before it relocates this library, where a resolver that ThreadSanitizer instruments
// crashes.
#if defined(__x86_64__) && defined(__GLIBC__) && __has_attribute(target_clones) && !defined(__SANITIZE_THREAD__)
#define OPENNEUTRON_VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define OPENNEUTRON_VECTORIZED
#endif

namespace openneutron {

OPENNEUTRON_VECTORIZED
void quantize(
    const float* __restrict numbers,
    int8_t* __restrict integers,
    size_t count,
    Grid grid,
    int8_t low,
    int8_t high) {
  // ExecuTorch multiplies by the inverse, in float, and converts the sum to int64_t before clamping. On x86-64, NaN and
  // values out of range become the smallest int64_t.
  constexpr float kTooLarge = 0x1p63f;
  const float inverse = 1.0f / grid.scale;
  const auto zero_point = static_cast<float>(grid.zero_point);
  const float lowest = low;
  const float highest = high;
  for (size_t i = 0; i < count; ++i) {
    float sum = std::nearbyint(numbers[i] * inverse) + zero_point;
    sum = sum < kTooLarge ? sum : lowest;
    sum = sum > lowest ? sum : lowest;
    sum = sum < highest ? sum : highest;
    integers[i] = static_cast<int8_t>(static_cast<int32_t>(sum));
  }
}

OPENNEUTRON_VECTORIZED
void dequantize(const int8_t* __restrict integers, float* __restrict numbers, size_t count, Grid grid) {
  // Unsigned, because the difference overflows for a zero point near the limits of int32_t.
  const auto zero_point = static_cast<uint32_t>(grid.zero_point);
  for (size_t i = 0; i < count; ++i) {
    const auto difference = static_cast<int32_t>(static_cast<uint32_t>(integers[i]) - zero_point);
    numbers[i] = static_cast<float>(difference) * grid.scale;
  }
}

}  // namespace openneutron
