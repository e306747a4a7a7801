// Vectorized kernels for quantize and dequantize, which run at the inputs and outputs of every delegated program.
#pragma once

namespace openneutron {

// Registers the kernels for float32 and int8 tensors of equal dim order, contiguous of rank 1 to 6 or channels last.
// ExecuTorch's own kernels run for other tensors, and on processors for which they are vectorized. Call this once per
// process: ExecuTorch ends the process if a kernel is registered twice.
void register_edge_kernels();

}  // namespace openneutron
