// Converts between channels first and channels last by a batch of matrix transposes, [N, C, S] <-> [N, S, C]. S is the
// product of the spatial dims.
#pragma once

#include <cstddef>

namespace openneutron {

struct Matrices {
  size_t count;
  size_t rows;
  size_t columns;
};

// Writes the transpose of each row-major matrix in `source` to `target`. The buffers must not overlap. Returns false,
// without writing, if `element_size` is not 1, 2, 4 or 8.
bool transpose(const void* source, void* target, Matrices shape, size_t element_size);

}  // namespace openneutron
