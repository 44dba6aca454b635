"""JUnit XML of a diagnostic run, as its readers see it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

import junitparser
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, Skipped

from crumplezone.reports.formats import junit
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Evidence, Exit, Frame, Report, Thread
from crumplezone.reports.records.run import Ending, News, RunRecord
from tests.support.records.exports import NASTY
from tests.support.records.reports import ID, full
from tests.support.records.runs import ENCODE, MODEL, case, full_run

_NEW = (Ending.CRASH, News.NEW)
ILLEGAL = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def loaded(data: bytes) -> Any:
    return JUnitXml.fromstring(data)  # half of whose methods have no types


def read(run: RunRecord, reports: Mapping[str, Report]) -> dict[str, Any]:
    parsed = loaded(junit.render(run, reports))
    return {test.name: test for suite in parsed for test in suite}


def test_junitparser_reads_what_was_said_and_writes_it_again() -> None:
    data = junit.render(full_run(), {ID: full(ID)})
    parsed = loaded(data)
    (suite,) = parsed
    assert isinstance(suite, junitparser.TestSuite)
    assert (suite.name, suite.tests, suite.failures, suite.errors, suite.skipped) == (MODEL, 9, 3, 1, 3)
    assert (parsed.tests, parsed.failures, parsed.errors, parsed.skipped) == (9, 3, 1, 3)
    assert suite.time == pytest.approx(9 * 1.5)
    again = loaded(data)
    again.update_statistics()  # junitparser counts for itself
    assert elements(again.tostring()) == elements(data)


def elements(data: bytes) -> list[tuple[str, dict[str, str], str]]:
    """All that a file says, times apart: junitparser writes them with fewer digits."""
    found = ET.fromstring(data).iter()
    return [
        (each.tag, {name: value for name, value in each.items() if name != "time"}, (each.text or "").strip())
        for each in found
    ]


def test_each_ending_is_what_it_should_be() -> None:
    tests = read(full_run(), {ID: full(ID)})
    kinds = {
        name.removeprefix(f"{MODEL} "): [(type(found), found.type, found.message) for found in test.result]
        for name, test in tests.items()
    }
    assert kinds == {
        "decode 1x1": [],
        "decode 3x10": [],
        "encode 1x1": [(Failure, "crash", "crash: SIGSEGV in encode")],
        "encode 3x10": [(Failure, "crash", "crash: SIGSEGV in encode")],
        "decode 3x10 q8_0": [(Failure, "mismatch", "mismatch: mismatch it was")],
        "process 1x1": [(Skipped, "hang", "known: hang: hang it was")],
        "process 3x10": [(Skipped, "oom", "known: oom: oom it was")],
        "embed 3x1": [(Skipped, "refused", "known: refused: refused it was")],
        "safe 1x1": [(Error, "error", "error: error it was")],
    }
    assert "fixed" in tests[f"{MODEL} decode 3x10"].system_out
    crashed = tests[f"{MODEL} encode 3x10"]
    properties = {
        each.name: each.value for group in crashed.iterchildren(junitparser.Properties) for each in group
    }
    assert properties["sequences"] == "3"
    assert properties["signature"] == ENCODE.id
    assert properties["report"] == ID
    for line in (
        f"report: reports/{ID}",
        "ggml_compute_forward_get_rows (libggml-cpu.so+0x1234)",
        "decode (/app/run.py:7)",
    ):
        assert line in crashed.result[0].text
    mismatch = tests[f"{MODEL} decode 3x10 q8_0"].result[0].text
    assert "native: one" in mismatch
    assert "safe:   two" in mismatch


def test_without_its_report_a_crash_is_still_named() -> None:
    crashed = read(full_run(), {})[f"{MODEL} encode 1x1"]
    assert f"report: reports/{ID}" in crashed.result[0].text
    assert "stack" not in crashed.result[0].text


def test_a_run_that_was_interrupted_is_not_green() -> None:
    run = full_run(planned=20, complete=False, cases=full_run().cases[:1])
    parsed = loaded(junit.render(run, {}))
    assert (parsed.tests, parsed.errors) == (2, 1)
    (error,) = read(run, {})["complete"].result
    assert isinstance(error, Error)
    assert "interrupted after 1 of 20 cases" in error.message
    empty = loaded(junit.render(full_run(cases=[], planned=0), {}))
    assert (empty.tests, list(empty)) == (0, [])


@pytest.mark.parametrize(
    "nasty", [*NASTY, "]]>", "<![CDATA[", "&amp;", "\ufffe", "\x85\u2028", "x" * 100_000]
)
def test_hostile_text_stays_text(nasty: str) -> None:
    report = msgspec.structs.replace(full(ID, hostile=nasty), result=nasty)
    data = junit.render(full_run(nasty), {ID: report})
    assert ILLEGAL.search(data.decode()) is None
    assert len(data) < 500_000
    tags = [element.tag for element in ET.fromstring(data).iter()]
    assert tags == [element.tag for element in ET.fromstring(junit.render(full_run(), {ID: full(ID)})).iter()]
    names = {element.get("name", "") for element in ET.fromstring(data).iter("testcase")}
    assert all(name.isprintable() for name in names)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))  # lone surrogates too
def test_any_text_comes_back_as_it_was_made_printable(text: str) -> None:
    run = full_run(cases=[case(text, *_NEW, detail=text)], planned=1)
    (test,) = read(run, {}).values()
    assert test.name == printable(f"{MODEL} {text}")
    assert test.result[0].message == printable(f"crash: {text}" if text else "crash")


def test_a_stack_without_end_is_cut() -> None:
    thread = Thread(7, crashed=True, native=[Frame("f" * 9000, "/lib/x.so", offset="0x1")] * 5000)
    report = Report(ID, "", Evidence(Exit.SIGNAL, 7, threads=[thread]))
    data = junit.render(full_run(), {ID: report})
    assert b"... and 4936 more" in data
    assert len(data) < 400_000
