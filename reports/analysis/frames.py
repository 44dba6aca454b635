"""What native frames mean: their names, made alike across builds, and which of them tell nothing.

Frames come from reports, which are untrusted: every string is cut before it is looked at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from crumplezone.reports.analysis.mangled import plain_name
from crumplezone.reports.analysis.messages import base_name
from crumplezone.reports.records.report import Frame

_FRAMES_MAX = 256  # looked at, of one stack
_SYMBOL_MAX = 4096  # characters of a symbol that are looked at
_NAME_MAX = 256  # characters of a normalised name

# The machinery of dying and of calling from Python: where every crash passes, so it tells nothing. Names are
# matched as `name` makes them, so without parameters, versions and what the compiler added.
_RUNTIME_SYMBOL = re.compile(
    r"""
      raise | abort | kill | tgkill | gsignal | _*pthread_kill\w* | __GI_\w+             # dying of a signal
    | __restore_rt | __kernel_rt_sigreturn | _sigtramp | faulthandler\w*
    | ggml_abort | ggml_print_backtrace\w* | ggml_uncaught_exception                     # ggml's ways to die
    | (?:\w+\ )?(?:std|__gnu_cxx|__cxxabiv1)::\S* | __cxa_\w+ | __gxx_\w+ | _Unwind_\w+  # C++
    | operator\ (?:new|delete)(?:\[\])?
    | __stack_chk_fail\w* | __fortify_fail\w* | __\w+_chk | __chk_fail | __assert\w*_fail\w*  # glibc
    | (?:_int_)?(?:malloc|calloc|realloc|free)(?:_check|_consolidate|_merge_chunk|_printerr)?
    | munmap_chunk | unlink_chunk | tcache_\w+ | __libc_\w+
    | _start | start_thread | (?:__)?clone3?                                            # where threads begin
    | GOMP_\w+ | gomp_\w+ | __kmp\w+                                                    # OpenMP
    | ffi_\w+ | _ctypes\w* | _?Py[A-Z_]\w*                                              # CPython, ctypes
    """,
    re.VERBOSE,
)
# Between what a thread of a pool does and who made it do so. With and without OpenMP, each thread runs the
# same function: called by GOMP_parallel or ggml_graph_compute in the master, and in a worker by the function
# that its thread began with (ggml-cpu.c).
_SHARED_OUT_SYMBOL = re.compile(
    r"GOMP_\w+|gomp_\w+|__kmp\w+|start_thread|(?:__)?clone3?|ggml_graph_compute(?:_secondary)?(?:_thread)?"
)
_SHARED_OUT_MODULE = re.compile(r"lib(?:gomp|omp|iomp5)(?:-[0-9a-f]+)?\.so")

_RUNTIME_MODULE = re.compile(
    r"(?:lib(?:c|m|dl|rt|pthread|ffi|gomp|omp|iomp5|stdc\+\+|c\+\+|c\+\+abi|gcc_s|unwind)(?:-[0-9a-f]+)?"
    r"|libpython[\d.]*\w?|ld-linux[\w-]*|ld-musl[\w-]*|linux-vdso|_ctypes)\.so|python[\d.]*\w?|\[.*"
)

# "libggml-base-1a2b3c4d.so.0.9.1": auditwheel puts eight digits of the file's SHA-256 into its name.
_MODULE_NOISE = re.compile(
    r"(?:-[0-9a-f]{8}|-\d+(?:\.\d+)+|\.cpython-[\w-]+|\.abi3)(?=\.so)|(?<=\.so)(?:\.\d+)+$"
)
_OFFSET = re.compile(r"0x0*([0-9a-f]{1,16})", re.IGNORECASE)

# What follows a name: "(inlined)" by pystack, "[clone .cold]" and "(.cold)" by demanglers, "@plt",
# "@@GLIBC_2.14", "+0x10". No identifier of C or C++ holds a dot: the compiler added what follows one
# (".isra.0", "._omp_fn.1").
_AFTER = re.compile(
    r"(?: ?\((?:inlined|\.[\w.]+)\)| ?\[clone [^\[\]]*\]|@@?\w++(?:\.\d++)*+|\+0x[0-9a-fA-F]++|\.\w++)++$"
)
_QUALIFIERS = re.compile(r"(?<![\s&])(?:(?<=[\s)])(?:const|volatile|noexcept)|[\s&])+$")
_INLINED = "(inlined)"
_PLAIN = re.compile(r"[\w$]+")
_ANONYMOUS = re.compile(r"\(anonymous namespace\)|`anonymous namespace'|_GLOBAL__N_1|<unnamed>")
_LAMBDA = re.compile(r"\{lambda[^{}]*\}|'lambda\d*'|(?<=::)\$_\d+")
_NUMBERED = re.compile(r"#\d+(?=\})")  # GCC's "{unnamed type#1}"
REST_UNKNOWN = "(the rest is not known)"
"""The symbol of the outermost frame of a stack that goes on, but could not be followed."""

_TRAMPOLINES = {"__restore_rt", "__kernel_rt_sigreturn"}  # of x86-64 and aarch64


def module_name(path: str) -> str:
    """The base name of an ELF file without version and hash: ``libggml-base.so``."""
    return _MODULE_NOISE.sub("", base_name(path).removesuffix(" (deleted)")[:_NAME_MAX])


def function(frame: Frame) -> str:
    """The normalised function of a native frame, empty if the unwinder did not know it."""
    return _function(frame.symbol[:_SYMBOL_MAX])


def name(frame: Frame) -> str:
    """The normalised name of a native frame; two builds of one source agree on it.

    Returns:
        The function without parameters, template arguments and what the compiler added
        (``llama_context::encode``), or ``libllama.so+0x1a2b`` where there is no symbol. Empty for a frame
        that is in no file: its address differs from run to run. At most 256 characters.
    """
    if symbol := function(frame):
        return symbol
    module = module_name(frame.module)
    if not module or module.startswith("["):
        return ""
    offset = _OFFSET.fullmatch(frame.offset)
    return f"{module}+0x{offset[1].lower()}" if offset else module


def is_runtime(frame: Frame) -> bool:
    """Whether a native frame tells nothing: it belongs to a runtime, or a jump led into nowhere."""
    found = name(frame)
    return (
        not found
        or bool(_RUNTIME_SYMBOL.fullmatch(found))
        or bool(_RUNTIME_MODULE.fullmatch(module_name(frame.module)))
        or "/lib-dynload/" in frame.module  # the extension modules of CPython's own library
    )


def interrupted(frames: list[Frame]) -> list[Frame]:
    """A native stack as the signal found it: without our own handler, in which the thread was held."""
    held = [place for place, frame in enumerate(frames) if frame.symbol in _TRAMPOLINES]
    return frames[held[-1] + 1 :] if held else frames


def meaningful(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The native frames that are not part of a runtime, innermost first."""
    return (frame for frame in islice(frames, _FRAMES_MAX) if not is_runtime(frame))


def given(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames of what a thread was given to do, which are those of any thread of its pool."""
    begun = False
    for frame in islice(frames, _FRAMES_MAX):
        if begun and (
            _SHARED_OUT_SYMBOL.fullmatch(name(frame))
            or _SHARED_OUT_MODULE.fullmatch(module_name(frame.module))
        ):
            return
        begun = begun or not is_runtime(frame)
        yield frame


def is_inlined(frame: Frame) -> bool:
    """Whether a frame is told of by debug information only: its code is that of the frame around it."""
    return frame.symbol.endswith(_INLINED)


@functools.lru_cache(maxsize=1024)
def _function(symbol: str) -> str:
    symbol = _AFTER.sub("", " ".join(symbol.split()))
    if not symbol.strip("?"):
        return ""  # "??" and "???": unwinders that do not know
    symbol = (plain_name(symbol) or symbol) if _PLAIN.fullmatch(symbol) else _cplusplus(symbol)
    return symbol[:_NAME_MAX]


def _cplusplus(symbol: str) -> str:
    # Imported here because it takes 0.1 s, which a program that never crashes need not pay. These are the
    # parts of siggen's CSignatureTool. The tool itself insists on lists, Mozilla's or a directory of ours,
    # which know names but not modules; it loses offsets, and cuts "const" off the end of a C name.
    from siggen.utils import collapse, drop_prefix_and_return_type

    symbol = re.sub(r"\[abi:\w+\]", "", symbol)
    symbol = _LAMBDA.sub("{lambda}", _ANONYMOUS.sub("{anonymous}", symbol))
    symbol = _QUALIFIERS.sub("", _NUMBERED.sub("", symbol))
    if symbol and not re.search(r"\boperator\b", symbol):
        symbol = drop_prefix_and_return_type(symbol)
    # In "operator<<" and "operator()" the brackets are the name.
    symbol = collapse(symbol, "<", ">", "<T>", ("operator", "operator<"))
    symbol = collapse(symbol, "(", ")", "", ("operator",))
    # "std::ostream& std::operator<< <T>": the type that a template's name begins with, and demanglers' space.
    return re.sub(r"^.* (?=\S*\boperator\b)| (?=<T>)", "", str(symbol).strip())
