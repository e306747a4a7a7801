/* @title@ */
#ifndef @NAME@_H
#define @NAME@_H

#include <stdint.h>

#define @NAME@_PTE_BYTES @bytes@u
#define @NAME@_PTE_CRC32 @crc32@u
#define @NAME@_PTE_SHA256 "@sha256@"
#define @NAME@_EXECUTORCH_VERSION "@executorch@"
#define @NAME@_OPENNEUTRON_VERSION "@openneutron@"
#define @NAME@_TARGET "@target@"
#define @NAME@_CONVERTER "@converter@"

/* Contents of the delegates: 0 = no delegates, 1 = TFLite models, which only a host runs, 2 = microcode of the NPU. */
#define @NAME@_PAYLOAD @payload@

#ifdef __cplusplus
extern "C" {
#endif

/* The .pte, aligned to 16 bytes. @NAME@_SECTION selects its section; see @source@. */
extern const uint8_t @name@_pte[@NAME@_PTE_BYTES];

#ifdef __cplusplus
}
#endif

#endif /* @NAME@_H */
