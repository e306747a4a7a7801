// Runs the program "@name@" on its test vectors and compares the outputs. Needs no operating system and no heap of its own.
// Returns 0 if all outputs agree.
#include "@name@.h"

// @name@_config.h has pool sizes for 32-bit processors, and for a 64-bit host, whose delegates use LiteRT's memory.
#if UINTPTR_MAX > 0xFFFFFFFFu && @NAME@_PAYLOAD != 0 && !defined(OPENNEUTRON_HOST)
#if !defined(@NAME@_METHOD_POOL_BYTES) || !defined(@NAME@_TEMPORARY_POOL_BYTES)
#error "Define @NAME@_METHOD_POOL_BYTES and @NAME@_TEMPORARY_POOL_BYTES: their sizes on a 64-bit board are unknown."
#endif
#endif

#include "@name@_config.h"
#include "test_vectors.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#ifdef OPENNEUTRON_HOST
#include "host_backend.h"

#include <chrono>
#endif

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

// The section of the pools, such as -D@NAME@_POOL_SECTION='".bss.sram"'. A section whose name does not begin with .bss.
// is stored in the image, unless the linker script declares it NOLOAD.
#ifdef @NAME@_POOL_SECTION
#define POOL alignas(16) __attribute__((section(@NAME@_POOL_SECTION))) uint8_t
#else
#define POOL alignas(16) uint8_t
#endif

// Print each output as text, for `openneutron validate --against`.
#ifndef @NAME@_PRINT_OUTPUTS
#define @NAME@_PRINT_OUTPUTS 1
#endif

// Print the times of the NPU's kernels, for `openneutron profile`. Needs a program lowered with use_profiling.
#ifndef @NAME@_PRINT_PROFILE
#define @NAME@_PRINT_PROFILE 0
#endif
#if @NAME@_PRINT_PROFILE
#include "profile_tracer.h"
#endif

#ifdef @NAME@_PORTABLE_BYTES  // by CMakeLists.txt: a host runs the portable program instead of the microcode
extern "C" const uint8_t @name@_portable_pte[@NAME@_PORTABLE_BYTES];
#define PROGRAM @name@_portable_pte
#else
#define PROGRAM @name@_pte
#endif

namespace {

POOL method_pool[@NAME@_METHOD_POOL_BYTES];
POOL temporary_pool[@NAME@_TEMPORARY_POOL_BYTES];
@planned_pools@
// One element more than needed: C++ has no arrays of 0 elements.
uint8_t* const input_memory[@NAME@_INPUTS + 1] = {@input_memory@};
const @name@_port inputs[@NAME@_INPUTS + 1] = @NAME@_INPUT_PORTS;
const @name@_port outputs[@NAME@_OUTPUTS + 1] = @NAME@_OUTPUT_PORTS;
const size_t input_count = @NAME@_INPUTS;
const size_t output_count = @NAME@_OUTPUTS;

// Remembers the peak, and whether a request did not fit. Prints the first such request at once: a delegate may use the
// null pointer that it gets.
class Pool final : public et::MemoryAllocator {
 public:
  Pool(const char* macro, uint8_t* begin, uint32_t bytes) : MemoryAllocator(bytes, begin), macro_(macro) {}
  void* allocate(size_t bytes, size_t alignment = kDefaultAlignment) override {
    void* const found = MemoryAllocator::allocate(bytes, alignment);
    if (found == nullptr && !is_full) {
      std::printf("%s is %lu: %lu bytes are in use, and a request of %lu bytes does not fit\n", macro_,
                  static_cast<unsigned long>(size()), static_cast<unsigned long>(used_size()),
                  static_cast<unsigned long>(bytes));
    }
    is_full = is_full || found == nullptr;
    peak = used_size() > peak ? used_size() : peak;
    return found;
  }
  size_t peak = 0;
  bool is_full = false;

 private:
  const char* const macro_;
};

#ifdef OPENNEUTRON_HOST
constexpr const char* kTimeUnit = "ns";
void start_clock() {}
uint32_t read_clock() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint32_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}
#elif defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M'
// The cycle counter of Cortex-M (DWT->CYCCNT). Replace these functions for another timer.
constexpr const char* kTimeUnit = "cycles";
volatile uint32_t& at(uintptr_t address) {
  return *reinterpret_cast<volatile uint32_t*>(address);
}
void start_clock() {
  at(0xE000EDFC) = at(0xE000EDFC) | 1u << 24;  // DEMCR.TRCENA
  at(0xE0001FB0) = 0xC5ACCE55;                 // DWT->LAR: unlocks the registers where they have a lock
  at(0xE0001004) = 0;                          // DWT->CYCCNT
  at(0xE0001000) = at(0xE0001000) | 1u;        // DWT->CTRL.CYCCNTENA
}
uint32_t read_clock() {
  return at(0xE0001004);
}
#else
constexpr const char* kTimeUnit = "ticks";
void start_clock() {}
uint32_t read_clock() {
  return 0;
}
#endif

int fail(const char* what, et::Error error) {
  std::printf("FAIL: %s (ExecuTorch error 0x%x)\n", what, static_cast<unsigned>(error));
  return 1;
}

int too_small(const char* macro, unsigned long bytes) {
  std::printf("FAIL: %s is %lu, which is too small for this program\n", macro, bytes);
  return 1;
}

constexpr double kTolerance = @NAME@_TOLERANCE_LSB;
constexpr double kFloatEpsilon = 1.0 / (1 << 23);

// The number of steps that rounding may add to a difference of floats. `steps` is the magnitude of the expected value.
// Each value is rounded by up to half an `epsilon`. A board that multiplies the zero point by the scale first rounds
// two products of up to 128 steps. Integers, whose epsilon is 0, are not rounded.
double rounding(double steps, double epsilon) {
  return epsilon > 0 && kTolerance > 0 ? epsilon * (steps + kTolerance) + kFloatEpsilon * 128 : 0;
}

// The difference of an element, in steps of the port's scale. NaN equals NaN, and 0 equals -0. If the difference
// exceeds the tolerance only by rounding, returns the tolerance.
template <typename T>
double difference(const uint8_t* found, const uint8_t* expected, size_t index, float step, double epsilon = 0) {
  T a, b;
  std::memcpy(&a, found + index * sizeof(T), sizeof(T));
  std::memcpy(&b, expected + index * sizeof(T), sizeof(T));
  const double x = static_cast<double>(a);
  const double y = static_cast<double>(b);
  if (a == b || (std::isnan(x) && std::isnan(y))) {
    return 0;
  }
  const double step_size = static_cast<double>(step > 0 ? step : 1);
  const double steps = std::fabs(x - y) / step_size;
  if (!(step > 0) || !std::isfinite(steps)) {
    return HUGE_VAL;  // NaN and infinity differ from all numbers
  }
  const double most = kTolerance + rounding(std::fabs(y) / step_size, epsilon);
  return steps > kTolerance && steps <= most ? kTolerance : steps;
}

double difference(const @name@_port& port, const uint8_t* found, const uint8_t* expected, size_t index) {
  switch (static_cast<ScalarType>(port.dtype)) {
    case ScalarType::Char:
      return difference<int8_t>(found, expected, index, port.step);
    case ScalarType::Short:
      return difference<int16_t>(found, expected, index, port.step);
    case ScalarType::Int:
      return difference<int32_t>(found, expected, index, port.step);
    case ScalarType::Long:
      return difference<int64_t>(found, expected, index, port.step);
    case ScalarType::Half:
      return difference<executorch::aten::Half>(found, expected, index, port.step, 1.0 / (1 << 10));
    case ScalarType::BFloat16:
      return difference<executorch::aten::BFloat16>(found, expected, index, port.step, 1.0 / (1 << 7));
    case ScalarType::Float:
      return difference<float>(found, expected, index, port.step, kFloatEpsilon);
    case ScalarType::Double:
      return difference<double>(found, expected, index, port.step, kFloatEpsilon);
    default:  // uint8, bool
      return difference<uint8_t>(found, expected, index, port.step);
  }
}

// Sets an input to its value in a vector. `memory` is nullptr if the runtime copies the value to a planned buffer;
// otherwise the runtime keeps a pointer to it, because the NPU of some chips cannot read the vectors in flash.
bool set_input(et::Method& method, const @name@_port& port, const uint8_t* vector, uint8_t* memory, size_t index) {
  if (port.kind != 0) {
    const et::EValue value = port.kind == 1 ? et::EValue(port.integer)
        : port.kind == 2                    ? et::EValue(port.number)
        : port.kind == 3                    ? et::EValue(port.integer != 0)
                                            : et::EValue();
    return method.set_input(value, index) == et::Error::Ok;
  }
  int32_t shape[@rank@];
  uint8_t dim_order[@rank@];
  int32_t strides[@rank@];
  std::memcpy(shape, port.shape, sizeof shape);
  std::memcpy(dim_order, port.dim_order, sizeof dim_order);
  int32_t stride = 1;
  for (int i = port.rank - 1; i >= 0; --i) {
    strides[dim_order[i]] = stride;
    stride *= shape[dim_order[i]] > 0 ? shape[dim_order[i]] : 1;
  }
  auto* const data = memory != nullptr ? memory : const_cast<uint8_t*>(vector + port.offset);  // it is only read
  if (memory != nullptr) {
    std::memcpy(memory, vector + port.offset, port.bytes);
  }
  TensorImpl tensor(static_cast<ScalarType>(port.dtype), port.rank, shape, data, dim_order, strides);
  return method.set_input(et::EValue(Tensor(&tensor)), index) == et::Error::Ok;
}

void print_output(size_t vector, size_t output, const uint8_t* bytes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (i % 32 == 0) {
      std::printf("%sOUTPUT %u %u %u ", i == 0 ? "" : "\n", static_cast<unsigned>(vector),
                  static_cast<unsigned>(output), static_cast<unsigned>(i));
    }
    std::printf("%02x", bytes[i]);
  }
  std::printf("\n");
}

// Whether an output that is not a tensor has its value. NaN equals NaN.
bool has_value(const @name@_port& port, const et::EValue& value) {
  switch (port.kind) {
    case 1:
      return value.isInt() && value.toInt() == port.integer;
    case 2:
      return value.isDouble() &&
          (value.toDouble() == port.number || (std::isnan(value.toDouble()) && std::isnan(port.number)));
    case 3:
      return value.isBool() && value.toBool() == (port.integer != 0);
    default:  // None and text, which are not compared
      return !value.isTensor();
  }
}

// Compares the outputs of one vector. Returns the largest difference in LSBs.
double compare(et::Method& method, const uint8_t* vector, size_t number) {
  double largest = 0;
  for (size_t i = 0; i < output_count; ++i) {
    const @name@_port& port = outputs[i];
    const et::EValue& value = method.get_output(i);
    if (port.kind != 0 && !has_value(port, value)) {
      std::printf("output %u is not the constant that it is on the host\n", static_cast<unsigned>(i));
      return HUGE_VAL;
    }
    if (port.kind != 0) {
      continue;
    }
    if (!value.isTensor() || value.toTensor().nbytes() != port.bytes) {
      std::printf("output %u is not a tensor of %u bytes\n", static_cast<unsigned>(i), static_cast<unsigned>(port.bytes));
      return HUGE_VAL;
    }
    const auto* const found = static_cast<const uint8_t*>(value.toTensor().const_data_ptr());
    if (@NAME@_PRINT_OUTPUTS) {
      print_output(number, i, found, port.bytes);
    }
    const size_t elements = static_cast<size_t>(value.toTensor().numel());
    for (size_t element = 0; element < elements; ++element) {
      const double steps = difference(port, found, vector + port.offset, element);
      if (steps > kTolerance && steps > largest) {
        std::printf("vector %u, output %u, element %u differs by %g LSB\n", static_cast<unsigned>(number),
                    static_cast<unsigned>(i), static_cast<unsigned>(element), steps);
      }
      largest = steps > largest ? steps : largest;
    }
  }
  return largest;
}

int run() {
  executorch::extension::BufferDataLoader loader(PROGRAM, sizeof PROGRAM);
  auto program = et::Program::load(&loader);
  if (!program.ok()) {
    return fail("the program cannot be read", program.error());
  }
  const auto meta = program->method_meta("forward");
  if (!meta.ok()) {
    return fail("the program has no method 'forward'", meta.error());
  }
@planned_checks@
  Pool method_memory("@NAME@_METHOD_POOL_BYTES", method_pool, @NAME@_METHOD_POOL_BYTES);
  Pool temporary_memory("@NAME@_TEMPORARY_POOL_BYTES", temporary_pool, @NAME@_TEMPORARY_POOL_BYTES);
@planned_memory@
  et::MemoryManager memory(&method_memory, &planned_memory, &temporary_memory);
#if @NAME@_PRINT_PROFILE
  ProfileTracer tracer;
  auto method = program->load_method("forward", &memory, &tracer);
#else
  auto method = program->load_method("forward", &memory);
#endif
  if (!method.ok() && method_memory.is_full) {
    // If the temporary pool is too small to search for a kernel, the runtime takes memory of the method pool instead.
    std::printf("FAIL: @NAME@_METHOD_POOL_BYTES is %lu and @NAME@_TEMPORARY_POOL_BYTES is %lu; one of them is too small\n",
                static_cast<unsigned long>(@NAME@_METHOD_POOL_BYTES),
                static_cast<unsigned long>(@NAME@_TEMPORARY_POOL_BYTES));
    return 1;
  }
  if (!method.ok()) {
    return fail("the program cannot be loaded", method.error());
  }
  temporary_memory.is_full = false;  // the search for kernels may have used the method pool instead
@given_outputs@
  double largest = 0;
  for (size_t number = 0; number < @NAME@_VECTORS; ++number) {
    const uint8_t* const vector = @name@_vectors + number * @NAME@_VECTOR_BYTES;
    for (size_t i = 0; i < input_count; ++i) {
      if (!set_input(*method, inputs[i], vector, input_memory[i], i)) {
        std::printf("FAIL: the program does not take input %u\n", static_cast<unsigned>(i));
        return 1;
      }
    }
#if @NAME@_PRINT_PROFILE
    tracer.start_run();
#endif
    const uint32_t start = read_clock();
    const et::Error error = method->execute();
    const uint32_t end = read_clock();
#if @NAME@_PRINT_PROFILE
    tracer.end_run();
#endif
    if (temporary_memory.is_full) {
      return too_small("@NAME@_TEMPORARY_POOL_BYTES", @NAME@_TEMPORARY_POOL_BYTES);
    }
    if (error != et::Error::Ok) {
      return fail("a run failed", error);
    }
    const double steps = compare(*method, vector, number);
    largest = steps > largest ? steps : largest;
    std::printf("vector %u: %lu %s, largest difference %g LSB\n", static_cast<unsigned>(number),
                static_cast<unsigned long>(end - start), kTimeUnit, steps);
  }
  std::printf("method pool: %u of %u bytes used; temporary pool: %u of %u\n", static_cast<unsigned>(method_memory.peak),
              static_cast<unsigned>(@NAME@_METHOD_POOL_BYTES), static_cast<unsigned>(temporary_memory.peak),
              static_cast<unsigned>(@NAME@_TEMPORARY_POOL_BYTES));
  const bool passed = largest <= kTolerance;
  std::printf("%s: @name@, %d vectors, largest difference %g LSB, allowed %g LSB\n", passed ? "PASS" : "FAIL",
              @NAME@_VECTORS, largest, kTolerance);
  return passed ? 0 : 1;
}

}  // namespace

int main() {
  et::runtime_init();
  start_clock();
#if defined(OPENNEUTRON_HOST) && @NAME@_PAYLOAD == 2 && !defined(@NAME@_PORTABLE_BYTES)
  std::printf("SKIP: the delegates of this program hold microcode, which only the board runs\n");
  return 77;
#endif
  if (@NAME@_PAYLOAD == 1) {
    std::printf("The delegates of this program hold TFLite models, not microcode: only a host runs it. "
                "README.md says how to compile it for the NPU.\n");
  }
#ifdef OPENNEUTRON_HOST
  if (!start_host_backend()) {
    return 1;
  }
#endif
  return run();
}
