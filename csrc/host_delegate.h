// The delegate "NeutronBackend" on the host: ExecuTorch's arguments in, LiteRT in the middle, ExecuTorch's results out.
#pragma once

#include <executorch/runtime/backend/interface.h>

#include <string>

namespace openneutron {

// What the last failed call of a delegate on this thread had to say, and whether it was a KeyboardInterrupt; empty and
// false after clear_error().
const std::string& last_error();
bool interrupted();
void clear_error();

// Each handle owns an `openneutron.runtime.engine.Engine`. No call throws, and each takes the GIL itself, whether or not
// its caller holds it. A handle serves any thread, one at a time: a call that overlaps another returns InvalidState.
class HostDelegate final : public executorch::runtime::BackendInterface {
 public:
  bool is_available() const override;

  // DelegateInvalidCompatibility where the engine refuses the payload, Internal where it failed otherwise.
  executorch::runtime::Result<executorch::runtime::DelegateHandle*> init(
      executorch::runtime::BackendInitContext& context,
      executorch::runtime::FreeableBuffer* processed,
      executorch::runtime::ArrayRef<executorch::runtime::CompileSpec> compile_specs) const override;

  // InvalidArgument where an argument is not what the payload says, Internal where LiteRT failed.
  executorch::runtime::Error execute(
      executorch::runtime::BackendExecutionContext& context,
      executorch::runtime::DelegateHandle* handle,
      executorch::runtime::Span<executorch::runtime::EValue*> args) const override;

  void destroy(executorch::runtime::DelegateHandle* handle) const override;
};

}  // namespace openneutron
