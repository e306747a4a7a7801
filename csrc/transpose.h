// Channels first <-> channels last is a batch of matrix transposes: [N, C, S] <-> [N, S, C], S being all spatial dims.
#pragma once

#include <cstddef>

namespace openneutron {

struct Matrices {
  size_t count;
  size_t rows;
  size_t columns;
};

// Writes to `target` the transpose of each of the row-major matrices in `source`. The two must not overlap.
// `element_size` is 1, 2, 4 or 8; returns false for any other, having written nothing.
bool transpose(const void* source, void* target, Matrices shape, size_t element_size);

}  // namespace openneutron
