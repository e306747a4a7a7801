/* @title@ */
/* Assemble with, for example, -D@section@='".flash_model"' to place the array in a section of the linker script. */
@default_section@#ifndef @section@
#ifdef __APPLE__
#define @section@ __TEXT,__const
#else
#define @section@ ".rodata"
#endif
#endif

#ifdef __APPLE__
#define SYMBOL _@symbol@
        .section @section@
#else
#define SYMBOL @symbol@
        .section @section@, "a"
        .type SYMBOL, %object
        .size SYMBOL, @bytes@
#endif
        .globl SYMBOL
        .balign 16
SYMBOL:
        .incbin "@file@"

#ifdef __ELF__
        .section .note.GNU-stack, "", %progbits
#endif
