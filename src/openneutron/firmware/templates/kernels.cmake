# The CPU kernels that the program "@name@" calls. In a project that has ExecuTorch's sources as a subdirectory:
#   set(EXECUTORCH_ROOT path/to/executorch)
#   include(path/to/this/folder/kernels.cmake)
#   target_link_libraries(your_firmware PRIVATE @name@_kernels)
# Only these kernels are then registered and linked. kernels.yaml has their dtypes and dim orders, too.
set(@NAME@_OPERATORS
@operators@

include(${EXECUTORCH_ROOT}/tools/cmake/Codegen.cmake)
list(JOIN @NAME@_OPERATORS "," @NAME@_ROOT_OPS)
gen_selected_ops(LIB_NAME "@name@_kernels" ROOT_OPS "${@NAME@_ROOT_OPS}")
generate_bindings_for_kernels(
  LIB_NAME "@name@_kernels"
  FUNCTIONS_YAML ${EXECUTORCH_ROOT}/kernels/portable/functions.yaml
  CUSTOM_OPS_YAML ${EXECUTORCH_ROOT}/kernels/quantized/quantized.yaml)
gen_operators_lib(
  LIB_NAME "@name@_kernels" KERNEL_LIBS portable_kernels quantized_kernels DEPS executorch_core)
