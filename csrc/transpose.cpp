#include "transpose.h"

#include <algorithm>
#include <cstdint>

namespace openneutron {
namespace {

// A tile of both matrices stays in the first-level cache: 64 x 64 elements of 4 bytes are 16 KB.
constexpr size_t kTile = 64;

template <typename Element>
void transpose_one(const Element* source, Element* target, size_t rows, size_t columns) {
  for (size_t row_tile = 0; row_tile < rows; row_tile += kTile) {
    const size_t row_end = std::min(rows, row_tile + kTile);
    for (size_t column_tile = 0; column_tile < columns; column_tile += kTile) {
      const size_t column_end = std::min(columns, column_tile + kTile);
      for (size_t row = row_tile; row < row_end; ++row) {
        for (size_t column = column_tile; column < column_end; ++column) {
          target[column * rows + row] = source[row * columns + column];
        }
      }
    }
  }
}

template <typename Element>
bool transpose_all(const void* source, void* target, Matrices shape) {
  const size_t elements = shape.rows * shape.columns;
  for (size_t index = 0; index < shape.count; ++index) {
    transpose_one(
        static_cast<const Element*>(source) + index * elements,
        static_cast<Element*>(target) + index * elements,
        shape.rows,
        shape.columns);
  }
  return true;
}

}  // namespace

bool transpose(const void* source, void* target, Matrices shape, size_t element_size) {
  switch (element_size) {
    case 1:
      return transpose_all<uint8_t>(source, target, shape);
    case 2:
      return transpose_all<uint16_t>(source, target, shape);
    case 4:
      return transpose_all<uint32_t>(source, target, shape);
    case 8:
      return transpose_all<uint64_t>(source, target, shape);
    default:
      return false;
  }
}

}  // namespace openneutron
