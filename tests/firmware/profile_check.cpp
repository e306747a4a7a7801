// Reports kernels to the tracer of a package as NXP's delegate does: each kernel, then the write of the profile.
#include "profile_tracer.h"

#include <executorch/runtime/core/event_tracer_hooks_delegate.h>

#include <initializer_list>

namespace et = executorch::runtime;

namespace {

void delegate(et::EventTracer* tracer, uint32_t at, std::initializer_list<uint32_t> kernels, uint32_t dump) {
  uint8_t function = 9;
  uint32_t index = 0;
  for (const uint32_t cycles : kernels) {
    et::event_tracer_log_profiling_delegate(tracer, nullptr, index++, at, at + cycles, &function, 1);
    at += cycles;
  }
  et::event_tracer_log_profiling_delegate(tracer, nullptr, index, at, at + dump, &function, 1);
}

}  // namespace

int main() {
  ProfileTracer tracer;
  for (uint32_t run = 0; run < 3; ++run) {
    tracer.start_run();
    delegate(&tracer, 1000, {100 + run, 20000}, 7);
    tracer.log_profiling_delegate("of another delegate", -1, 0, 1, nullptr, 0);
    delegate(&tracer, 0xFFFFFF00u, {70000}, 8);  // the clock starts again within the kernel
    tracer.end_run();
  }
  return 0;
}
