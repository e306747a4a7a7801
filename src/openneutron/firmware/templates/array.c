/* @title@ */
@declared@

/* Compile with, for example, -D@section@='".flash_model"' to place the array in a section of the linker script. */
@default_section@#ifdef @section@
#define PLACEMENT __attribute__((section(@section@)))
#else
#define PLACEMENT
#endif

_Alignas(16) PLACEMENT const uint8_t @symbol@[@bytes@] = {
@rows@
};
