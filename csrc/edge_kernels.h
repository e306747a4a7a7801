// The operators at the edge of every delegated program, quantize and dequantize, faster than ExecuTorch's own kernels.
#pragma once

namespace openneutron {

// Registers them beside ExecuTorch's kernels for what a program has at its edges: float32 and int8, both tensors of one
// dim order, contiguous of rank 1 to 6 or channels last. Everything else stays with ExecuTorch's, and all of it where
// those are vectorized. To be called once in a process: ExecuTorch ends it where a kernel is registered twice.
void register_edge_kernels();

}  // namespace openneutron
