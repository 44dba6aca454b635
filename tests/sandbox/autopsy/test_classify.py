"""Why a process aborted: only what it said itself, in its own words, when it died."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.reports.records.report import Assertion, Exit, Fault
from crumplezone.sandbox.autopsy.classify import assertion, classify
from crumplezone.sandbox.process.cgroup import HOST
from crumplezone.sandbox.process.procfs import Map, find_map
from tests.support.services.tricks import perform


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("reallocating buffers for session 4711\n", None),
        ("the user wrote: double free or corruption (out)\n", None),
        ("/x/a.txt:3: GGML_ASSERT(a) failed\n", None),
        ("free(): invalid pointer\n" + "and on it goes\n" * 50, None),
        ("load\nfree(): invalid pointer\n", Assertion("free(): invalid pointer", "glibc")),
        (
            "*** stack smashing detected ***: terminated\n",
            Assertion("*** stack smashing detected ***: terminated", "glibc"),
        ),
        (
            "/x/ggml.c:12: GGML_ASSERT(a < b) failed\n",
            Assertion("GGML_ASSERT(a < b) failed", "ggml", "/x/ggml.c", 12),
        ),
        (
            "a.cpp:1: fatal error\nterminate called recursively\n",
            Assertion("terminate called recursively", "terminate"),
        ),
        (
            "terminate called after throwing an instance of 'X'\n  what():  no\n",
            Assertion("terminate called after throwing an instance of 'X'\n  what():  no", "terminate"),
        ),
    ],
)
def test_what_stderr_tells_of_an_abort(stderr: str, expected: Assertion | None) -> None:
    assert assertion("", stderr) == expected


def test_an_assertion_that_only_stderr_has() -> None:
    """As ggml_abort writes it where it has no callback."""
    evidence = perform("os.write(2, b'/b/ggml.c:7: GGML_ASSERT(a) failed\\n'); lib.abort()")
    assert evidence.assertion == Assertion("GGML_ASSERT(a) failed", "ggml", "/b/ggml.c", 7)


def test_words_of_an_abort_are_none_of_another_end() -> None:
    evidence = perform("os.write(2, b'free(): invalid pointer\\n'); lib.memset(0x18, 1, 1)")
    assert (evidence.exit, evidence.assertion) == (Exit.SIGNAL, None)


def test_a_counter_that_cannot_be_read_any_more_is_not_replaced_by_that_of_the_host() -> None:
    before, after = {"memory.events": 1, HOST: 5}, {HOST: 6}
    kind, _ = classify(-9, Fault(9, "SIGKILL"), "call", (before, after), pid=1)
    assert kind is Exit.KILLED
    kind, _ = classify(-9, Fault(9, "SIGKILL"), "call", ({HOST: 5}, {HOST: 6}), pid=1)
    assert kind is Exit.OOM


def test_a_taken_exit_status_is_an_oom_kill_if_one_was_counted() -> None:
    kind, detail = classify(None, None, "call", ({"memory.events": 1}, {"memory.events": 2}), pid=1)
    assert kind == Exit.OOM
    assert "rose from 1 to 2" in detail


@given(st.lists(st.integers(0, 100), max_size=20, unique=True), st.integers(-1, 101))
def test_find_map_is_a_search_of_all(edges: list[int], address: int) -> None:
    edges.sort()
    maps = [Map(start, end, "", 0, "") for start, end in zip(edges[::2], edges[1::2], strict=False)]
    assert find_map(maps, address) == next((m for m in maps if m.start <= address < m.end), None)
