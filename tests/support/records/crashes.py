"""A report of a crash that tests of several modules group."""

from __future__ import annotations

from crumplezone.reports.records.report import Assertion, Evidence, Exit, Fault, Frame, Report, Thread

PID = 7
LLAMA = "/venv/llama_cpp/lib/libllama.so.0.5.0"
BASE = "/venv/llama_cpp/lib/libggml-base.so.0.25.3"
CPU = "/venv/llama_cpp/lib/libggml-cpu.so"
LIBC = "/usr/lib/x86_64-linux-gnu/libc.so.6"
CXX = "/usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30"

HANDLER = [
    Frame("__write", LIBC, offset="0xf8350"),
    Frame("_Py_write_impl (inlined)", "/usr/lib/libpython3.11.so.1.0", offset="0x2b7984"),
    Frame("faulthandler_fatal_error", "/usr/lib/libpython3.11.so.1.0", offset="0x2bdf7d"),
    Frame("__restore_rt", LIBC, offset="0x3c050"),
]
CALLED = [
    Frame("", "/usr/lib/x86_64-linux-gnu/libffi.so.8.1.2", offset="0x6f7a"),
    Frame("_ctypes_callproc", "/usr/lib/_ctypes.cpython-311-x86_64-linux-gnu.so"),
    Frame("_PyEval_EvalFrameDefault", "/usr/bin/python3.11"),
    Frame("_start", "/usr/bin/python3.11"),
]
PYTHON = [
    Frame("encode", file="/venv/crumplezone/workers/native.py", line=7),
    Frame("handle", file="native.py"),
]

# As pystack saw it in llama-cpp-python 0.3.36; the second function has no symbol.
ENCODE = [
    Frame("llama_kv_cache_context::build_input_k_idxs(ggml_context*, llama_ubatch const&) const", LLAMA),
    Frame("", LLAMA, offset="0x21c372"),
    Frame("llm_graph_context::build_attn_inp_kv() const", LLAMA),
    Frame("llama_model_llama::graph<false>::graph(llama_model const&, llm_graph_params const&)", LLAMA),
    Frame("llama_context::process_ubatch(llama_ubatch const&, llm_graph_type, ggml_status&)", LLAMA),
    Frame("llama_context::encode(llama_batch_ext const&)", LLAMA),
]


def report(
    exit_kind: Exit,
    native: list[Frame] = [],  # noqa: B006 - never changed
    *,
    signal: str = "",
    assertion: Assertion | None = None,
    python: list[Frame] = PYTHON,
    faulthandler: str = "",
) -> Report:
    thread = Thread(
        PID, "python", crashed=exit_kind in {Exit.SIGNAL, Exit.ABORT}, native=native, python=python
    )
    fault = Fault(11, signal) if signal else None
    evidence = Evidence(
        exit_kind, PID, fault=fault, assertion=assertion, threads=[thread], faulthandler=faulthandler
    )
    return Report("x", "", evidence)


def segv(native: list[Frame]) -> Report:
    return report(Exit.SIGNAL, native, signal="SIGSEGV")


SEGV = segv([*HANDLER, *ENCODE, *CALLED])
