"""Checks the name of a package, which becomes a prefix of identifiers in C and C++, and that of a section."""

from __future__ import annotations

import re

from openneutron.errors import OptionError

__all__ = ["check_name", "check_section"]

_SECTION = re.compile(r"[ !#-\[\]-~]+")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_LONGEST = 63  # characters of an identifier that a C11 compiler distinguishes (5.2.4.1)
_OWN_FILES = frozenset({
    "main", "test_vectors", "host_backend", "manifest", "kernels", "kernel_selection", "etrecord", "profile_tracer",
})  # fmt: skip
_HEADERS = frozenset({
    "assert", "byteswap", "complex", "ctype", "dirent", "dlfcn", "elf", "endian", "errno", "error", "fcntl", "features",
    "fenv", "float", "getopt", "glob", "iconv", "inttypes", "langinfo", "libgen", "libintl", "limits", "link", "locale",
    "malloc", "math", "memory", "monetary", "netdb", "newlib", "nl_types", "poll", "pthread", "pwd", "reent", "regex",
    "sched", "search", "semaphore", "setjmp", "signal", "spawn", "stdalign", "stdarg", "stdatomic", "stdbit", "stdbool",
    "stdckdint", "stddef", "stdint", "stdio", "stdlib", "stdnoreturn", "string", "strings", "sysexits", "syslog",
    "termios", "tgmath", "threads", "time", "uchar", "unistd", "utime", "values", "wchar", "wctype", "wordexp",
})  # fmt: skip
"""Headers of C, POSIX and common C libraries, which `<name>.h` would hide, because its folder is an include path."""
_KEYWORDS = frozenset({
    "alignas", "alignof", "and", "and_eq", "asm", "atomic", "auto", "bitand", "bitor", "bool", "break", "case",
    "catch", "char", "char16_t", "char32_t", "char8_t", "class", "compl", "complex", "concept", "const",
    "const_cast", "consteval", "constexpr", "constinit", "continue", "co_await", "co_return", "co_yield",
    "decltype", "default", "defined", "delete", "do", "double", "dynamic_cast", "else", "enum", "explicit",
    "export", "extern", "false", "final", "float", "for", "friend", "goto", "if", "imaginary", "import", "inline",
    "int", "long", "module", "mutable", "namespace", "new", "noexcept", "not", "not_eq", "nullptr", "operator",
    "or", "or_eq", "override", "private", "protected", "public", "register", "reinterpret_cast", "requires",
    "restrict", "return", "short", "signed", "sizeof", "static", "static_assert", "static_cast", "struct",
    "switch", "template", "this", "thread_local", "throw", "true", "try", "typedef", "typeid", "typename",
    "typeof", "union", "unsigned", "using", "virtual", "void", "volatile", "wchar_t", "while", "xor", "xor_eq",
})  # fmt: skip
"""Keywords of C11, C17, C++17 and C++20, and names with a meaning in some places."""

_MACROS = frozenset({
    "BUFSIZ", "CLOCKS_PER_SEC", "EDOM", "EILSEQ", "EINVAL", "ENOMEM", "EOF", "ERANGE", "EXIT_FAILURE", "EXIT_SUCCESS",
    "FILE", "FILENAME_MAX", "FOPEN_MAX", "HUGE_VAL", "HUGE_VALF", "HUGE_VALL", "I", "INFINITY", "NAN", "NDEBUG", "NULL",
    "RAND_MAX", "SEEK_CUR", "SEEK_END", "SEEK_SET", "TMP_MAX", "arm", "i386", "linux", "mips", "noreturn", "offsetof",
    "posix", "sparc", "std", "stderr", "stdin", "stdout", "sun", "unix", "va_arg", "va_copy", "va_end", "va_start",
})  # fmt: skip
"""Macros of the headers of C, macros that compilers define for a processor or a system, and namespaces of C++."""
_SIZED_MACRO = re.compile(r"U?INT(?:_LEAST|_FAST)?\d+(?:_MAX|_MIN|_C)?")


def check_name(name: object) -> str:
    """Returns the name. Raises `OptionError` if it cannot be a prefix of identifiers and a name of files."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or "__" in name:
        raise OptionError(
            f"The name of a package must be an identifier of C, not {name!r}. Use letters, digits and single "
            "underscores, and begin with a letter."
        )
    if name in _KEYWORDS:
        raise OptionError(f"'{name}' is a keyword of C or C++. Give the package another name, such as '{name}_model'.")
    if name in _MACROS or _SIZED_MACRO.fullmatch(name):
        raise OptionError(
            f"'{name}' cannot be the name of a package: the headers or compilers of C or C++ define this name. Give "
            f"another name, such as '{name}_model'."
        )
    if name.lower() in _HEADERS:  # the names of files have no case on some machines
        raise OptionError(
            f"'{name}' cannot be the name of a package: '{name}.h' would hide the header <{name.lower()}.h> of the C "
            f"library. Give another name, such as '{name}_model'."
        )
    if name.lower() in _OWN_FILES or len(name) > _LONGEST - 32:
        raise OptionError(
            f"'{name}' cannot be the name of a package: it is longer than {_LONGEST - 32} characters, or a file of the "
            f"package has this name. Give another name, such as '{name[:20]}_model'."
        )
    return name


def check_section(section: object) -> None:
    """Raises `OptionError` if a value is neither None nor the name of a section that C sources can hold in quotes."""
    if section is not None and (not isinstance(section, str) or not _SECTION.fullmatch(section)):
        raise OptionError(
            f"'section' is the name of a section of the linker script, not {section!r}. Give printable ASCII "
            "characters without quotes and backslashes."
        )
