"""Names of frames that two builds of one source agree on."""

from __future__ import annotations

import pytest

from crumplezone.reports.analysis import frames
from crumplezone.reports.records.report import Frame

DYNLOAD = "/usr/lib/python3.11/lib-dynload"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("llama_context::encode(llama_batch const&)", "llama_context::encode"),
        ("ggml_is_const", "ggml_is_const"),
        ("ggml_vec_dot_q4_0.constprop.0.cold", "ggml_vec_dot_q4_0"),
        ("ggml_graph_compute._omp_fn.0", "ggml_graph_compute"),
        ("f(int) [clone .part.1] [clone .cold]", "f"),
        ("f (inlined)", "f"),
        ("f@plt", "f"),
        ("f@@GLIBC_2.2.5", "f"),
        ("f+0x1f", "f"),
        ("format[abi:cxx11](char const*, ...)", "format"),
        ("std::vector<int> ns::make<int, g<2> >(int) const &", "ns::make<T>"),
        ("void (anonymous namespace)::tiny<16, float>::gemm<4>(long)", "{anonymous}::tiny<T>::gemm<T>"),
        ("f(int)::{lambda(int, float)#2}::operator()(int, float) const", "f::{lambda}::operator()"),
        ("f(int)::$_0::operator()(int) const", "f::{lambda}::operator()"),
        ("A::operator<(A const&) const", "A::operator<"),
        ("A::operator<<(int)", "A::operator<<"),
        ("non-virtual thunk to A::apply()", "A::apply"),
        ("???", "libllama.so+0x1a2b"),
        ("&&", "libllama.so+0x1a2b"),
    ],
)
def test_a_name_is_that_of_the_source(symbol: str, name: str) -> None:
    assert frames.name(Frame(symbol, "/x/libllama-1a2b3c4d.so.0.9.1", offset="0x0001A2B")) == name


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("/a/llama_cpp_python.libs/libggml-base-1a2b3c4d.so.0.9.1", "libggml-base.so"),
        ("libggml-cpu-haswell.so", "libggml-cpu-haswell.so"),
        ("/lib/libc-2.31.so", "libc.so"),
        ("/x/_ctypes.cpython-313-x86_64-linux-gnu.so", "_ctypes.so"),
        ("/dev/zero (deleted)", "zero"),
        ("", ""),
    ],
)
def test_a_module_is_named_alike_in_every_build(module: str, name: str) -> None:
    assert frames.module_name(module) == name


@pytest.mark.parametrize(
    ("module", "runtime"),
    [
        (f"{DYNLOAD}/_json.cpython-311-x86_64-linux-gnu.so", True),
        ("/site-packages/mine/_json.cpython-311-x86_64-linux-gnu.so", False),
    ],
)
def test_extension_modules_of_cpython_itself_tell_nothing(module: str, runtime: bool) -> None:
    assert frames.is_runtime(Frame(symbol="encoder_listencode_obj", module=module)) == runtime
