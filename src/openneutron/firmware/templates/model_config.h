/* @title@ Memory, inputs and outputs. */
#ifndef @NAME@_CONFIG_H
#define @NAME@_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

@pools@

@tensors@

#endif /* @NAME@_CONFIG_H */
