/* @title@ Test vectors: inputs, and the outputs that the host computed. */
#ifndef @NAME@_TEST_VECTORS_H
#define @NAME@_TEST_VECTORS_H

#include <stdint.h>

#define @NAME@_VECTORS @count@
#define @NAME@_VECTOR_BYTES @stride@u /* of the inputs and outputs of one vector, each aligned to 16 bytes */

/* The allowed difference of outputs, in steps of their scale (LSBs). main.cpp adds the rounding of floats, unless it
   is 0. */
#ifndef @NAME@_TOLERANCE_LSB
#define @NAME@_TOLERANCE_LSB @tolerance@
#endif

/* `kind`: 0 = tensor, 1 = int, 2 = double, 3 = bool, 4 = None. `dtype` is ExecuTorch's ScalarType. `step` is the value
   of one LSB; 0 for an output that has to be equal. */
typedef struct {
  uint8_t kind;
  uint8_t dtype;
  uint8_t rank;
  uint8_t dim_order[@rank@];
  int32_t shape[@rank@];
  uint32_t offset; /* in a vector, in bytes */
  uint32_t bytes;
  int64_t integer; /* the value of an int or bool input */
  double number;   /* the value of a float input */
  float step;
} @name@_port;

#ifdef __cplusplus
extern "C" {
#endif
extern const uint8_t @name@_vectors[@total@];
#ifdef __cplusplus
}
#endif

#define @NAME@_INPUT_PORTS { \
@inputs@
}
#define @NAME@_OUTPUT_PORTS { \
@outputs@
}

#endif /* @NAME@_TEST_VECTORS_H */
