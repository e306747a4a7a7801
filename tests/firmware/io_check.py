"""A C program that compares the functions of a package's `model_io.h` with Python, and checks the array of the program.

It compiles as C11 and as C++17, for this machine and for Cortex-M33. There, `BOARD` is a start-up for the machine
mps2-an505 of QEMU, and results are printed by semihosting.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from openneutron import NeutronProgram
from openneutron.formats import pte
from openneutron.runtime import TensorInfo

__all__ = ["LINKER_SCRIPT", "STARTUP", "check_source"]

SPECIAL = (0.0, -0.0, 1e-30, 0.5, -0.5, 1e30, -1e30, math.inf, -math.inf)
SOFTMAX_ERROR = 1e-6

STARTUP = """
#include <stdint.h>
extern uint32_t stack_top, bss_start, bss_end;
extern void initialise_monitor_handles(void);
extern int main(void);
extern void exit(int);

/* exit() calls the destructors of the C library, which has none without its start-up files. */
void _init(void) {}
void _fini(void) {}

void reset(void) {
  *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* CPACR: the floating-point unit */
  for (uint32_t *word = &bss_start; word < &bss_end; ++word) {
    *word = 0;
  }
  initialise_monitor_handles();
  exit(main());
}

void fault(void) {
  exit(3);
}

__attribute__((section(".vectors"), used)) void *const vectors[16] = {
    &stack_top, (void *)reset, (void *)fault, (void *)fault, (void *)fault, (void *)fault, (void *)fault,
};
"""

LINKER_SCRIPT = """
ENTRY(reset)
MEMORY { CODE (rx) : ORIGIN = 0x10000000, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x38000000, LENGTH = 4M }
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) *(.flash_model) } > CODE
  .ARM.exidx : { *(.ARM.exidx*) } > CODE
  .data : { *(.data*) } > RAM
  .bss : { bss_start = .; *(.bss*) *(COMMON) . = ALIGN(8); bss_end = .; } > RAM
  end = .;
  stack_top = ORIGIN(RAM) + LENGTH(RAM);
}
"""

_HEAD = """\
#include <stdio.h>
#include <string.h>
#include "{name}.h"
#include "{name}_config.h"
#include "{name}_io.h"
#include "test_vectors.h"

static uint32_t crc32(const uint8_t *data, uint32_t bytes) {{
  uint32_t crc = 0xFFFFFFFFu;
  for (uint32_t i = 0; i < bytes; ++i) {{
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) {{
      crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
    }}
  }}
  return ~crc;
}}

static int failures = 0;

static void expect(int holds, const char *what) {{
  if (!holds) {{
    printf("FAIL: %s\\n", what);
    ++failures;
  }}
}}

static void array(void) {{
  expect((uintptr_t){name}_pte % 16 == 0, "the program's alignment");
  expect(crc32({name}_pte, {upper}_PTE_BYTES) == {upper}_PTE_CRC32, "the program's hash");
  expect((uintptr_t){name}_vectors % 16 == 0, "the vectors' alignment");
  expect(crc32({name}_vectors, sizeof {name}_vectors) == {crc}u, "the vectors' hash");
  expect(sizeof(void *) == 8 || {upper}_METHOD_POOL_BYTES == {pool}u, "the method pool");
}}
"""


def check_source(program: NeutronProgram, name: str, vectors: bytes) -> str:
    """Returns the C source for a package of `program` with this name. `vectors` are the bytes of its test vectors."""
    method = pte.read(program.buffer).methods[0]
    pool = program.memory.device.method.pool_bytes
    checks = [
        text
        for kind, infos in (("input", program.inputs), ("output", program.outputs))
        for index, (info, value) in enumerate(zip(infos, getattr(method, f"{kind}s"), strict=True))
        if isinstance(info, TensorInfo)
        for text in _checks(name, kind, index, info, value.dim_order)
    ]
    calls = "".join(f"  check{number}();\n" for number in range(len(checks)))
    functions = "".join(f"static void check{number}(void) {{\n{text}}}\n\n" for number, text in enumerate(checks))
    head = _HEAD.format(name=name, upper=name.upper(), crc=zlib.crc32(vectors), pool=pool)
    return (
        f"{head}\n{functions}int main(void) {{\n  array();\n{calls}"
        f'  printf("%s: %d checks\\n", failures ? "FAIL" : "PASS", {len(checks) + 5});\n  return failures != 0;\n}}\n'
    )


def _checks(name: str, kind: str, index: int, info: TensorInfo, order: tuple[int, ...]) -> Iterator[str]:
    generator = torch.Generator().manual_seed(index)
    upper = f"{name.upper()}_{kind.upper()}_{index}"
    elements = math.prod(info.shape)
    codes = torch.randint(-128, 128, info.shape, generator=generator, dtype=torch.int8)
    if info.scale is not None and kind == "input":
        values = torch.randn(elements, generator=generator) * info.scale * 80
        half = (torch.arange(elements) - elements // 2 + 0.5) * info.scale  # between two codes
        for given in (values, half):
            given[: len(SPECIAL)] = torch.tensor(SPECIAL)[:elements]
            yield (
                f"{_array('float', 'values', given)}{_array('int8_t', 'expected', info.quantize(given))}"
                f"  int8_t found[{upper}_ELEMENTS];\n  {name}_quantize_input{index}(values, found);\n"
                f'  expect(memcmp(found, expected, sizeof found) == 0, "quantize input {index}");\n'
            )
    if info.scale is not None and kind == "output":
        yield (
            f"{_array('int8_t', 'codes', codes)}{_array('float', 'expected', info.dequantize(codes))}"
            f"  float found[{upper}_ELEMENTS];\n  {name}_dequantize_output{index}(codes, found);\n"
            f'  expect(memcmp(found, expected, sizeof found) == 0, "dequantize output {index}");\n'
        )
    if order == (0, 2, 3, 1):
        yield _order_check(name, kind, index, codes)
    if kind == "output" and info.scale is not None and max(info.shape) == elements > 1:
        yield _score_check(name, index, info, codes)


def _order_check(name: str, kind: str, index: int, first: torch.Tensor) -> str:
    """Returns the check of a function that converts the order of `first`, codes in the order of the shape."""
    last = first.permute(0, 2, 3, 1)
    given, expected, to = (first, last, "last") if kind == "input" else (last, first, "first")
    return (
        f"{_array('int8_t', 'given', given)}{_array('int8_t', 'expected', expected)}"
        f"  int8_t found[{first.numel()}];\n  {name}_{kind}{index}_to_channels_{to}(given, found);\n"
        f'  expect(memcmp(found, expected, sizeof found) == 0, "order of {kind} {index}");\n'
    )


def _score_check(name: str, index: int, info: TensorInfo, scores: torch.Tensor) -> str:
    """Returns the check of the functions for scores."""
    assert info.scale is not None
    flat = scores.reshape(-1)
    order = sorted(range(len(flat)), key=lambda i: (-int(flat[i]), i))
    soft = torch.softmax((flat.to(torch.float64) * info.scale), 0).to(torch.float32)
    return (
        f"{_array('int8_t', 'scores', flat)}{_array('size_t', 'expected', torch.tensor(order))}"
        f"{_array('float', 'soft', soft)}"
        f"  size_t found[{len(flat)}];\n  float probabilities[{len(flat)}];\n"
        f'  expect({name}_argmax_output{index}(scores) == expected[0], "argmax");\n'
        f"  for (size_t count = 0; count <= {len(flat)}; ++count) {{\n"
        f"    {name}_top_k_output{index}(scores, count, found);\n"
        f'    expect(memcmp(found, expected, count * sizeof *found) == 0, "top-k");\n  }}\n'
        f"  {name}_softmax_output{index}(scores, probabilities);\n"
        f"  for (size_t i = 0; i < {len(flat)}; ++i) {{\n"
        f'    expect(fabsf(probabilities[i] - soft[i]) <= {SOFTMAX_ERROR}f, "softmax");\n  }}\n'
    )


def _array(kind: str, name: str, values: Any) -> str:
    numbers = np.ascontiguousarray(values.numpy() if isinstance(values, torch.Tensor) else values).reshape(-1)
    return f"  static const {kind} {name}[{len(numbers)}] = {{{', '.join(map(_literal, numbers))}}};\n"


def _literal(value: Any) -> str:
    if not isinstance(value, np.floating):
        return str(value)
    if np.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = repr(float(value))
    return f"{text}f" if any(mark in text for mark in ".e") else f"{text}.0f"
