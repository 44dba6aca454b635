"""Names out of mangled symbols, as demanglers and the normaliser make them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crumplezone.reports.analysis.frames import function
from crumplezone.reports.analysis.mangled import plain_name
from crumplezone.reports.records.report import Frame


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN13llama_context6encodeERK15llama_batch_ext", "llama_context::encode"),
        ("_ZNK1A1fEv", "A::f"),
        ("_ZN1AC2Ei", "A::A"),
        ("_ZN1AIiED0Ev", "A<T>::~A"),
        ("_ZNSt6vectorIiSaIiEE9push_backEOi", "std::vector<T>::push_back"),
        ("_Z1fIL9ggml_type8EEvv", "f<T>"),
        ("_Z1fILN1A1BE3EEvv", "f<T>"),
        ("_ZThn16_N1A1fEv", "A::f"),
        ("_ZZN1A1fEvENKUlvE_clEv", "A::f::{lambda}::operator()"),
        ("_ZN12_GLOBAL__N_11fEv", "{anonymous}::f"),
        ("_ZN1AcvbEv", "A::operator bool"),
        ("_Z1fB5cxx11v", "f"),
        ("ggml_abort", ""),
        ("_ZN", ""),
        ("_Z9999f", ""),
        ("_ZN1AcvNS_1BEEv", ""),  # what it converts to would have to be unfolded
    ],
)
def test_names(symbol: str, name: str) -> None:
    assert plain_name(symbol) == name


@pytest.mark.parametrize("library", ["libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so"])
def test_every_function_of_llama_cpp_has_the_name_that_a_demangler_gives_it(library: str) -> None:
    path = Path(llama_cpp.__file__).parent / "lib" / library
    table = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in table.splitlines()]
    symbols = sorted({name for _, kind, name in rows if kind in "TtWw" and name.startswith("_Z")})
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    assert len(symbols) > 10
    different = {
        symbol: text
        for symbol, text in zip(symbols, demangled.stdout.splitlines(), strict=True)
        if function(Frame(symbol)) != function(Frame(text)) or not plain_name(symbol)
    }
    assert different == {}


@given(st.text(alphabet="_ZNKISTELJXUltscvCD0123456789abdf", max_size=200).map("_Z".__add__))
@example("_Z" + "I" * 4000)
@example("_ZN1AI" + "N" * 4000)
@example("_Z" + "Z" * 4000)
@example("_ZN1A" * 800)
def test_anything_has_a_name_or_none(symbol: str) -> None:
    assert len(plain_name(symbol)) <= 16 * len(symbol)
