"""Rows, filters and groups."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from crumplezone.diagnostics.triage.listing import Filter, cells, groups, near_duplicates, rows
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Evidence, Exit, Frame, Report, Signature, Thread, VerdictKind
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import Count
from crumplezone.reports.store.store import Store
from tests.support.records.reports import ESCAPE, put

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def row(name: str, hours: int, signature: str = "abc", **more: object) -> Row:
    given = {"exit": Exit.SIGNAL, "title": f"title of {signature}", "confidence": "high", **more}
    return Row(id=name, crashed_at=NOON + hours * HOUR, signature=signature, **given)  # type: ignore[arg-type]


ROWS = [
    row("e", 4, "", exit=None, problem="report.json is corrupt"),
    row("d", 3, verdict=VerdictKind.BATCH_ONLY, model="/m/SmolLM2.gguf", llama_cpp="b2", same_as="b"),
    row("c", 2, "abd", exit=Exit.HANG, verdict=VerdictKind.INPUT, description="llama 7B", llama_cpp="b1"),
    row("b", 1, verdict=VerdictKind.BATCH_ONLY, model="/m/smol.gguf", llama_cpp="b1"),
    row("a", 0, verdict=VerdictKind.FLAKY, model="/m/smol.gguf", llama_cpp="b1", same_as="b"),
]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Filter(), "edcba"),
        (Filter(signature="ab"), "dcba"),
        (Filter(signature="abd"), "c"),
        (Filter(exit=Exit.HANG), "c"),
        (Filter(verdict=VerdictKind.BATCH_ONLY), "db"),
        (Filter(model="SMOL"), "dba"),
        (Filter(model="7b"), "c"),
        (Filter(since=(NOON + 3 * HOUR).astimezone(timezone(5 * HOUR))), "ed"),
        (Filter(signature="abc", verdict=VerdictKind.BATCH_ONLY, since=NOON + 2 * HOUR), "d"),
    ],
)
def test_filters(wanted: Filter, names: str) -> None:
    assert "".join(found.id for found in rows(ROWS, wanted)) == names


def test_cells_are_safe_to_print_and_none_is_empty() -> None:
    hostile = dict.fromkeys(("signal", "top", "result", "title"), ESCAPE + "\t\n")
    shown = cells(row("a", 0, "f" * 64, **hostile))
    assert len(shown) == 8
    assert all(cell.isprintable() for cell in shown)
    assert shown[:3] == ("a", "2026-11-21T12:00:00Z", "signal")
    assert shown[5] == "f" * 12
    assert cells(ROWS[0])[2:] == ("unreadable", "-", "title of ", "-", "-", "report.json is corrupt")
    assert cells(ROWS[1])[4] == "title of abc"  # a slim report has no frame


def test_groups_count_what_was_pruned_too() -> None:
    removed = Count("abc", 100, NOON - 9 * HOUR, NOON + HOUR)
    first, *others = groups(ROWS, {"abc": removed})
    assert (first.signature, first.title, first.confidence) == ("abc", "title of abc", "high")
    assert (first.count, first.pruned) == (103, 100)
    assert (first.first_seen, first.last_seen) == (NOON - 9 * HOUR, NOON + 3 * HOUR)
    assert (first.first, first.latest) == ("b", "d")  # "a" is older, but only counts
    assert first.exits == {"signal": 3}
    assert first.verdicts == {"batch-only": 2, "flaky": 1}
    assert first.versions == {"b1": 2, "b2": 1}
    assert first.models == {"/m/smol.gguf": 2, "/m/SmolLM2.gguf": 1}
    assert [(group.signature, group.count) for group in others] == [("", 1), ("abd", 1)]
    assert others[0].title == "cannot be read"
    assert groups([], {"abc": removed}) == []


def test_what_is_counted_by_another_signature_is_in_its_group() -> None:
    """And what was removed of it; the group begins with a report that knows all there is to know."""
    found = [row("b", 2), row("a", 1, signed="cut")]
    counts = {
        name: Count(name, number, found[0].crashed_at, found[0].crashed_at)
        for name, number in (("abc", 3), ("cut", 4), ("other", 5))
    }
    (group,) = groups(found, counts)
    assert (group.signature, group.count, group.pruned, group.first) == ("abc", 9, 7, "b")
    assert [each.id for each in rows(found, Filter(signature="cut"))] == ["a"]


def report(name: str, *frames: str) -> Report:
    stack = [Frame(frame, "/lib/libx.so") for frame in frames]
    evidence = Evidence(Exit.ABORT, 1, threads=[Thread(1, crashed=True, native=stack)])
    found = Report(name, NOON.isoformat(), evidence)
    # Without frames, two signatures are told apart only by their assertion.
    signed = sign(found) if frames else Signature(name, "abort")
    return msgspec.structs.replace(found, signature=signed)


def test_near_duplicates_have_one_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    deep = ["top", "b", "c", "d", "e", "f"]
    stacks = {
        "one": deep,
        "two": ["top", "b", "x", "d", "e", "f"],
        "far": ["other", *deep],
        "no": [],
        "nor": [],
    }
    for name, frames in stacks.items():
        store.write(report(name, *frames), "")
    put(tmp_path, "corrupt", b"")
    found = groups(store.rows(), {})
    near = near_duplicates(store, found)
    number = {group.first: near[group.signature] for group in found}
    assert number["one"] == number["two"]
    assert sorted(set(number.values())) == [1, 2, 3, 4, 5]
