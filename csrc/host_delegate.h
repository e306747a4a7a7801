// The delegate "NeutronBackend" on the host. Copies ExecuTorch's arguments to LiteRT, runs LiteRT, and copies the
// results back.
#pragma once

#include <executorch/runtime/backend/interface.h>

#include <string>

namespace openneutron {

// The message of the last failed call of a delegate on this thread, and whether a KeyboardInterrupt ended it. Empty and
// false after clear_error().
const std::string& last_error();
bool interrupted();
void clear_error();

// Each handle owns an `openneutron.runtime.engine.Engine`. Calls do not throw, and acquire the GIL themselves. Any
// thread may use a handle, but a call during another call returns InvalidState.
class HostDelegate final : public executorch::runtime::BackendInterface {
 public:
  bool is_available() const override;

  // Returns DelegateInvalidCompatibility if the engine rejects the payload, and Internal for other failures.
  executorch::runtime::Result<executorch::runtime::DelegateHandle*> init(
      executorch::runtime::BackendInitContext& context,
      executorch::runtime::FreeableBuffer* processed,
      executorch::runtime::ArrayRef<executorch::runtime::CompileSpec> compile_specs) const override;

  // Returns InvalidArgument if an argument does not match the payload, and Internal if LiteRT fails.
  executorch::runtime::Error execute(
      executorch::runtime::BackendExecutionContext& context,
      executorch::runtime::DelegateHandle* handle,
      executorch::runtime::Span<executorch::runtime::EValue*> args) const override;

  void destroy(executorch::runtime::DelegateHandle* handle) const override;
};

}  // namespace openneutron
