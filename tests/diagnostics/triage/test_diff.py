"""What differs between two crashes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crumplezone.diagnostics.triage.diff import compare
from crumplezone.reports.analysis.signature import frames, sign
from crumplezone.reports.records.report import (
    BatchRecord,
    Environment,
    Evidence,
    Exit,
    Frame,
    Generating,
    Report,
    Thread,
    Verdict,
    VerdictKind,
)
from tests.support.records.reports import full

BASE = full()
ROWS = st.lists(st.tuples(*[st.integers(0, 1)] * 3, st.booleans()), min_size=1, max_size=20)


def differences(a: Report, b: Report) -> list[tuple[str, str, str, str]]:
    return [(each.section, each.name, each.a, each.b) for each in compare(a, b).differences]


def batch(**changes: Any) -> Report:
    assert BASE.batch is not None
    return replace(BASE, batch=replace(BASE.batch, **changes))


def environment(**changes: Any) -> Report:
    return replace(BASE, environment=Environment(**changes))


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (BASE, replace(BASE, result="not cured"), ("ending", "result", "cured by safe", "not cured")),
        (BASE, replace(BASE, redacted=True), ("ending", "redacted", "", "yes")),
        (BASE, replace(BASE, context={"n_ctx": 64}), ("parameters", "n_ctx", "512", "64")),
        (BASE, batch(operation="encode"), ("batch", "operation", "decode", "encode")),
        (BASE, batch(chunk=8), ("batch", "tokens per call", "all", "8")),
        (BASE, batch(seq_ids=[0] * 12), ("batch", "tokens per sequence", "10 2", "12")),
        (
            BASE,
            batch(seq_ids=[0] * 10 + [7] * 2),
            ("batch", "sequence ids", "0 0 0 0 0 0 0 0 0 0 3 3", "0 0 0 0 0 0 0 0 0 0 7 7"),
        ),
        (BASE, batch(outputs=[False] * 11 + [True]), ("batch", "outputs at", "9 11", "11")),
        (BASE, replace(BASE, batch=None), ("batch", "tokens", "12", "")),
        (BASE, replace(BASE, model=None), ("model", "file", "tiny.gguf", "")),
        (environment(cpu="a"), environment(cpu="b"), ("machine", "cpu", "a", "b")),
        (
            environment(cpu_flags=["sse3", "avx"]),
            environment(cpu_flags=["avx", "amx", "avx512f"]),
            ("machine", "cpu flags of this one only", "sse3", "amx avx512f"),
        ),
        (
            environment(system_info="CPU : AVX = 1 | REPACK = 1 | "),
            environment(system_info="CPU : AVX = 1 | REPACK = 0 | "),
            ("machine", "REPACK", "1", "0"),
        ),
        (
            environment(versions={"llama.cpp": "b1"}),
            environment(versions={"llama.cpp": "b2"}),
            ("versions", "llama.cpp", "b1", "b2"),
        ),
        (
            environment(variables={"OMP_NUM_THREADS": "2"}),
            environment(),
            ("variables", "OMP_NUM_THREADS", "2", ""),
        ),
        (
            batch(generating=[Generating(1, [5, 6], 9, seed=3)]),
            batch(generating=[Generating(1, [5, 6], 9, seed=4)]),
            ("batch", "seeds", "3", "4"),
        ),
        (
            BASE,
            replace(BASE, verdict=Verdict(VerdictKind.INPUT, "")),
            ("ending", "verdict", "", "input"),
        ),
    ],
)
def test_a_difference_is_named(a: Report, b: Report, difference: tuple[str, str, str, str]) -> None:
    assert difference in differences(a, b)
    section, name, left, right = difference
    assert (section, name, right, left) in differences(b, a)


def test_nothing_differs_from_itself() -> None:
    for report in (BASE, msgspec.json.decode(msgspec.json.encode(BASE), type=Report), full("another-id")):
        assert differences(BASE, report) == []


@settings(max_examples=200, deadline=None)
@given(one=ROWS, other=ROWS)
def test_two_batches_that_differ_never_look_the_same(one: list[Any], other: list[Any]) -> None:
    reports = []
    for rows in (one, other):
        tokens, positions, seq_ids, outputs = (list(column) for column in zip(*rows, strict=True))
        reports.append(replace(BASE, batch=BatchRecord(tokens, positions, seq_ids, outputs)))
    found = differences(*reports)
    assert bool(found) == (one != other)
    assert all(section == "batch" for section, *_ in found)


def stack(letters: str) -> Report:
    native = [Frame(f"frame_{letter}", "/lib/libx.so") for letter in letters]
    found = Report("x", "", Evidence(Exit.ABORT, 1, threads=[Thread(1, crashed=True, native=native)]))
    return replace(found, signature=sign(found))


@settings(max_examples=50, deadline=None)
@given(a=st.text("abcd", max_size=12), b=st.text("abcd", max_size=12))
def test_aligned_frames_are_both_stacks(a: str, b: str) -> None:
    one, other = stack(a), stack(b)
    found = compare(one, other)
    assert [line.frame for line in found.frames if line.side != "b"] == frames(one)
    assert [line.frame for line in found.frames if line.side != "a"] == frames(other)
    assert found.same_signature == (a[:3] == b[:3])
    if a == b:
        assert {line.side for line in found.frames} <= {"both"}


def test_without_a_signature_nothing_is_called_the_same() -> None:
    assert not compare(BASE, BASE).same_signature
