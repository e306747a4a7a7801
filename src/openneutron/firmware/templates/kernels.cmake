# The CPU kernels that the program "@name@" calls. In a project that has ExecuTorch's sources as a subdirectory:
#   set(EXECUTORCH_ROOT path/to/executorch)
#   include(path/to/this/folder/kernels.cmake)
#   target_link_libraries(your_firmware PRIVATE @name@_kernels)
# Only these kernels are then registered and linked. kernels.yaml has their dtypes and dim orders, too.
#
# For several programs in one firmware, include only one kernels.cmake: ExecuTorch aborts at start-up if two libraries
# register the same operator. Before the include, set the operators of the other packages (see their kernels.cmake):
#   set(OPENNEUTRON_MORE_OPERATORS "aten::cos.out" "aten::sin.out")
set(@NAME@_OPERATORS
@operators@

list(APPEND @NAME@_OPERATORS ${OPENNEUTRON_MORE_OPERATORS})
list(REMOVE_DUPLICATES @NAME@_OPERATORS)

include(${EXECUTORCH_ROOT}/tools/cmake/Codegen.cmake)
list(JOIN @NAME@_OPERATORS "," @NAME@_ROOT_OPS)
gen_selected_ops(LIB_NAME "@name@_kernels" ROOT_OPS "${@NAME@_ROOT_OPS}")
generate_bindings_for_kernels(
  LIB_NAME "@name@_kernels"
  FUNCTIONS_YAML ${EXECUTORCH_ROOT}/kernels/portable/functions.yaml
  CUSTOM_OPS_YAML ${EXECUTORCH_ROOT}/kernels/quantized/quantized.yaml)
gen_operators_lib(
  LIB_NAME "@name@_kernels" KERNEL_LIBS portable_kernels quantized_kernels DEPS executorch_core)
