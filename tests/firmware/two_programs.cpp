// Loads two packages in one application, and runs their test vectors in turn. Both methods use one temporary pool.
#include "kws/host_backend.h"
#include "kws/kws.h"
#include "kws/kws_config.h"
#include "kws/test_vectors.h"
#include "vision/test_vectors.h"
#include "vision/vision.h"
#include "vision/vision_config.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

alignas(16) uint8_t temporary_pool[std::max(KWS_TEMPORARY_POOL_BYTES, VISION_TEMPORARY_POOL_BYTES)];
alignas(16) uint8_t kws_pool[KWS_METHOD_POOL_BYTES];
alignas(16) uint8_t vision_pool[VISION_METHOD_POOL_BYTES];
alignas(16) uint8_t kws_planned[KWS_PLANNED_0_BYTES];
alignas(16) uint8_t vision_planned[VISION_PLANNED_0_BYTES];
alignas(16) uint8_t kws_input[KWS_INPUT_0_BYTES];
alignas(16) uint8_t vision_input[VISION_INPUT_0_BYTES];
const kws_port kws_inputs[] = KWS_INPUT_PORTS;
const kws_port kws_outputs[] = KWS_OUTPUT_PORTS;
const vision_port vision_inputs[] = VISION_INPUT_PORTS;
const vision_port vision_outputs[] = VISION_OUTPUT_PORTS;

// Whether the first output has the bytes that a vector stores.
template <typename Port>
bool is_equal(et::Method& method, const Port& port, const uint8_t* vector) {
  return std::memcmp(method.get_output(0).toTensor().const_data_ptr(), vector + port.offset, port.bytes) == 0;
}

}  // namespace

int main() {
  et::runtime_init();
  executorch::extension::BufferDataLoader kws_loader(kws_pte, sizeof kws_pte);
  executorch::extension::BufferDataLoader vision_loader(vision_pte, sizeof vision_pte);
  auto kws_program = et::Program::load(&kws_loader);
  auto vision_program = et::Program::load(&vision_loader);
  if (!start_host_backend() || !kws_program.ok() || !vision_program.ok()) {
    return 2;
  }
  et::MemoryAllocator temporary(sizeof temporary_pool, temporary_pool);
  et::MemoryAllocator kws_memory(sizeof kws_pool, kws_pool);
  et::MemoryAllocator vision_memory(sizeof vision_pool, vision_pool);
  et::Span<uint8_t> kws_spans[] = {{kws_planned, sizeof kws_planned}};
  et::Span<uint8_t> vision_spans[] = {{vision_planned, sizeof vision_planned}};
  et::HierarchicalAllocator kws_buffers(kws_spans);
  et::HierarchicalAllocator vision_buffers(vision_spans);
  et::MemoryManager kws_manager(&kws_memory, &kws_buffers, &temporary);
  et::MemoryManager vision_manager(&vision_memory, &vision_buffers, &temporary);
  auto kws = kws_program->load_method("forward", &kws_manager);
  auto vision = vision_program->load_method("forward", &vision_manager);
  if (!kws.ok() || !vision.ok()) {
    return 3;
  }
  int32_t kws_shape[] = KWS_INPUT_0_SHAPE;
  int32_t vision_shape[] = VISION_INPUT_0_SHAPE;
  uint8_t kws_order[] = KWS_INPUT_0_DIM_ORDER;
  uint8_t vision_order[] = VISION_INPUT_0_DIM_ORDER;
  TensorImpl kws_tensor(ScalarType::Char, KWS_INPUT_0_RANK, kws_shape, kws_input, kws_order);
  TensorImpl vision_tensor(ScalarType::Float, VISION_INPUT_0_RANK, vision_shape, vision_input, vision_order);
  unsigned different = 0;
  for (size_t number = 0; number < KWS_VECTORS; ++number) {
    const uint8_t* const kws_vector = kws_vectors + number * KWS_VECTOR_BYTES;
    const uint8_t* const vision_vector = vision_vectors + number * VISION_VECTOR_BYTES;
    std::memcpy(kws_input, kws_vector + kws_inputs[0].offset, sizeof kws_input);
    std::memcpy(vision_input, vision_vector + vision_inputs[0].offset, sizeof vision_input);
    if (kws->set_input(et::EValue(Tensor(&kws_tensor)), 0) != et::Error::Ok ||
        vision->set_input(et::EValue(Tensor(&vision_tensor)), 0) != et::Error::Ok ||
        vision->execute() != et::Error::Ok || kws->execute() != et::Error::Ok) {
      return 4;
    }
    different += is_equal(*kws, kws_outputs[0], kws_vector) ? 0u : 1u;
    different += is_equal(*vision, vision_outputs[0], vision_vector) ? 0u : 1u;
  }
  std::printf("%u vectors, %u different outputs\n", static_cast<unsigned>(KWS_VECTORS), different);
  return different == 0 ? 0 : 1;
}
