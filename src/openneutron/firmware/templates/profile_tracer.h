// Prints what NXP's delegate measured of its kernels, in the form that `openneutron profile` reads:
//   PROFILE <delegate> <offset in bytes> <record in hexadecimal>
// The delegate reports each kernel of the NPU, and at last the time in which the NPU wrote the profile.
#pragma once

#include <executorch/runtime/core/event_tracer.h>

#include <cstdint>
#include <cstdio>

#ifndef ET_EVENT_TRACER_ENABLED
#error "Profiles need ET_EVENT_TRACER_ENABLED for ExecuTorch, NeutronBackend.cpp and this file; see README.md"
#endif

class ProfileTracer final : public executorch::runtime::EventTracer {
 public:
  // Delegates are numbered from 0 in each run.
  void start_run() {
    delegate_ = 0;
    is_held_ = false;
  }
  // Prints the last event.
  void end_run() {
    if (is_held_) {
      print_held(kDumpEnds);
    }
  }

  void log_profiling_delegate(const char*, executorch::runtime::DelegateDebugIntId kernel, et_timestamp_t start,
                              et_timestamp_t stop, const void* metadata, size_t bytes) override {
    if (kernel < 0) {
      return;  // an event of another delegate, which has a name instead of a number
    }
    if (is_held_) {
      print_held(kernel == 0 ? kDumpEnds : kKernelEnds);
      delegate_ += kernel == 0;
    }
    kernel_ = static_cast<uint32_t>(kernel);
    start_ = static_cast<uint32_t>(start);
    stop_ = static_cast<uint32_t>(stop);
    function_ = metadata != nullptr && bytes == 1 ? *static_cast<const uint8_t*>(metadata) : 0;
    is_held_ = true;
  }

  // Other events are not printed.
  void create_event_block(const char*) override {}
  executorch::runtime::EventTracerEntry start_profiling(const char*, executorch::runtime::ChainID,
                                                        executorch::runtime::DebugHandle) override {
    return {};
  }
  void end_profiling(executorch::runtime::EventTracerEntry) override {}
  executorch::runtime::EventTracerEntry start_profiling_delegate(const char*,
                                                                 executorch::runtime::DelegateDebugIntId) override {
    return {};
  }
  void end_profiling_delegate(executorch::runtime::EventTracerEntry, const void*, size_t) override {}
  void track_allocation(executorch::runtime::AllocatorID, size_t) override {}
  executorch::runtime::AllocatorID track_allocator(const char*) override {
    return 0;
  }
  executorch::runtime::Result<bool> log_evalue(const executorch::runtime::EValue&,
                                               executorch::runtime::LoggedEValueType) override {
    return false;
  }
  executorch::runtime::Result<bool> log_intermediate_output_delegate(const char*,
                                                                     executorch::runtime::DelegateDebugIntId,
                                                                     const executorch::aten::Tensor&) override {
    return false;
  }
  executorch::runtime::Result<bool> log_intermediate_output_delegate(
      const char*, executorch::runtime::DelegateDebugIntId,
      const executorch::runtime::ArrayRef<executorch::aten::Tensor>) override {
    return false;
  }
  executorch::runtime::Result<bool> log_intermediate_output_delegate(const char*,
                                                                     executorch::runtime::DelegateDebugIntId,
                                                                     const int&) override {
    return false;
  }
  executorch::runtime::Result<bool> log_intermediate_output_delegate(const char*,
                                                                     executorch::runtime::DelegateDebugIntId,
                                                                     const bool&) override {
    return false;
  }
  executorch::runtime::Result<bool> log_intermediate_output_delegate(const char*,
                                                                     executorch::runtime::DelegateDebugIntId,
                                                                     const double&) override {
    return false;
  }
  void set_delegation_intermediate_output_filter(executorch::runtime::EventTracerFilterBase*) override {}

 private:
  static constexpr unsigned kDumpEnds = 0;
  static constexpr unsigned kKernelEnds = 6;  // the opcode of the stop event of a kernel

  // Only the next event says whether the held one is of a kernel. A time is printed from its lowest byte on.
  void print_held(unsigned opcode) {
    std::printf("PROFILE %u %u 0000%02x00", static_cast<unsigned>(delegate_), static_cast<unsigned>(kernel_ * 16),
                static_cast<unsigned>(function_));
    print_time(start_);
    std::printf("00%02x%02x00", opcode, static_cast<unsigned>(function_));
    print_time(stop_);
    std::printf("\n");
    is_held_ = false;
  }
  static void print_time(uint32_t time) {
    for (int shift = 0; shift < 32; shift += 8) {
      std::printf("%02x", static_cast<unsigned>(time >> shift & 0xFF));
    }
  }

  uint32_t delegate_ = 0;
  uint32_t kernel_ = 0;
  uint32_t start_ = 0;
  uint32_t stop_ = 0;
  uint8_t function_ = 0;
  bool is_held_ = false;
};
