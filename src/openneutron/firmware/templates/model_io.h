/* @title@ Conversion of inputs and outputs. No function allocates memory. */
#ifndef @NAME@_IO_H
#define @NAME@_IO_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "@name@_config.h"

#ifdef __cplusplus
extern "C" {
#endif

@functions@

#ifdef __cplusplus
}
#endif

#endif /* @NAME@_IO_H */
