"""The page: what it says, that no string can break out of it, and `crumplezone triage html`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crumplezone import Batch
from crumplezone.reports.formats.text import render as as_text
from crumplezone.reports.html import page
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import (
    BatchRecord,
    Evidence,
    Exit,
    Frame,
    Phase,
    Report,
    Sample,
    Thread,
)
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, RunRecord, Shape
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import Count
from crumplezone.reports.store.store import Store
from tests.support.cli import crumplezone
from tests.support.decoders import Record
from tests.support.records.pages import ENCODE, HOSTILE, MODELS, everything, report, run

PIECES = [
    "<b>",
    "</script>",
    "</style>",
    "<!--",
    "&#60;",
    "{0}",
    "onload=",
    *"<>\"'&]`= \nx\0\u2028\u202e\udc80",
]


class Parsed(HTMLParser):
    """The elements of a page in order with the names of their attributes, and what they say."""

    def __init__(self, shown: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.said = ""
        self.feed(shown)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "style")]

    def handle_data(self, data: str) -> None:
        self.said += data


HARMLESS = Parsed(everything("x"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@example(HOSTILE)
def test_no_string_becomes_markup(hostile: str) -> None:
    found = Parsed(everything(f"x{hostile}x"))
    assert found.elements == HARMLESS.elements
    assert all(link.startswith("#") for link in found.links)
    assert not any(name.startswith("on") for _, names in found.elements for name in names)
    unsafe = {c for c in found.said if not c.isprintable()} - {"\n"}
    assert not unsafe


def test_the_page_says_what_is_known() -> None:
    said = Parsed(page.render(run(), [report()])).said
    for part in (
        "Diagnostic run: 6 new, 10 known, 1 fixed, 2 not known",
        "SIGSEGV (SEGV_MAPERR), read of address 0xdead in ggml_compute_forward_get_rows",
        "6 frames of a runtime",
        "libggml-cpu.so+0x1234",
        "run.py:3",
        "54 in hand, 27 ms, did not end",
        "323 MiB at the end",
        "12 tokens 4 to 15, 1 output, 4 in memory",
        "1 blamed",
        "compute passes of 16, 16, 4 tokens",
        "✗ crashed 0-2",
        "✓ 0✗ crashed 1✓ 2",
        "- refused 1",
        "sequence 1 crashed alone too",
        "expected in 1 case, and not met",
        "over its deadline of 20 s",
        "the cat sat",
        "not gathered",
    ):
        assert part in said, part


def test_a_case_that_is_fixed_is_named() -> None:
    fixed = [Fixed("", "hang", ["m decode 1x1"])]
    said = Parsed(page.render(RunRecord("2026-11-21", 1, fixed=fixed), [])).said
    assert "fixed hang" in said
    assert "m decode 1x1" in said


def test_the_map_has_a_row_per_shape_and_a_column_per_model_and_path() -> None:
    shown = page.render(run(), [])
    table = shown[shown.index('<table class="map"') :].split("</table>")[0]
    heads = re.findall(r'scope="col"><span>(\w+)</span>', table)
    assert heads == ["decode", "process", "encode", "embed", "safe"] * len(MODELS)
    rows = [re.findall(r'<td class="([\w ]+)"><a [^>]*>(\w)</a>', row) for row in table.split("</tr>")[2:-1]]
    assert [len(row) for row in rows] == [10] * 8
    assert rows[0][2] == ("crash new", "C")
    assert rows[2][1:3] == [("pass fixed", "P"), ("crash known", "C")]
    assert [letter for row in rows[4:] for _, letter in row[:2]] == ["P", "R", "M", "P", "H", "P", "P", "O"]
    assert '3x10</b><span class="quiet"> KV q8_0, flash_attn on' in table


def test_of_two_cases_in_one_place_the_worse_is_shown_and_both_are_listed() -> None:
    both = [
        CaseRecord("a", "m", Shape(), Ending.CRASH, News.NEW),
        CaseRecord("b", "m", Shape(), Ending.PASS),
    ]
    shown = page.render(RunRecord("2026-11-21", 4, both), [])
    assert re.findall(r'<td class="(\w+ \w+)"><a href="#c-(\d)"', shown) == [("crash new", "0")]
    assert 'id="c-0"' in shown
    assert 'id="c-1"' in shown
    assert "Incomplete</b>: 2 of 4 cases ended" in shown


def test_groups_are_new_first_then_by_count_with_those_removed() -> None:
    at = datetime(2026, 11, 21, 6, tzinfo=UTC)

    def row(signature: str, hours: float, n: int) -> Row:
        when = at - timedelta(hours=hours)
        return Row(
            id=f"{signature}{n}", crashed_at=when, exit=Exit.HANG, signature=signature, title=signature
        )

    rows = [row("often", n / 10, n) for n in range(9)] + [row("new", 0, 0), row("rare", 24, 0)]
    case = CaseRecord(
        "case", "m", Shape(), Ending.CRASH, News.NEW, signature=schema.Signature("new", "SIGSEGV")
    )
    removed = {"rare": Count("rare", 40, at - timedelta(days=9), at)}
    shown = page.render(RunRecord("", 1, [case]), [], rows, removed)
    counts = re.findall(
        r'<td class="count">(\d+)</td><td><div>(?:<b class="news new">new</b> )?<b>(\w+)', shown
    )
    assert counts == [("1", "new"), ("41", "rare"), ("9", "often")]
    assert "40 reports removed" in shown
    assert "2026-11-12 06:00Z" in shown
    trends = re.findall(r'class="took" d="([^"]*)"', shown)
    assert [trend.count("M") for trend in trends] == [1, 1, 1]  # the hour of "often" is one part of the day


def test_a_report_with_almost_nothing_and_one_with_lies_are_shown() -> None:
    bare = Report("x", "", Evidence(exit=Exit.SIGNAL, pid=1))
    assert "Not recorded" in page.render(None, [bare])
    huge = 1 << 200
    lies = replace(
        bare,
        evidence=replace(
            bare.evidence,
            samples=[
                Sample(float("nan"), 1, 1),
                Sample(-5, -7, 1),
                Sample(1e308, huge, 1),
                Sample(3, 3, -1e308),
            ],
            flight=[Phase("a", -huge, float("inf"), 3.0), Phase("b", huge, -3.0, -1e300), Phase("", 0, 0)],
        ),
        batch=BatchRecord(
            [1],
            [-huge, huge, 0],
            [7, -huge],
            [True],
            shared={"0": [huge], "x": [1]},
            generating=[schema.Generating(3, [1, 2], 4)],
        ),
        blamed=[huge],
        ladder=[schema.LadderStep("", schema.Outcome.OK, [huge, -huge], ms=-1e300)],
    )
    assert "damaged: its lists differ in length" in page.render(None, [lies])


def test_of_a_long_log_the_end_is_shown() -> None:
    found = report()
    long = replace(
        found.evidence, stderr_tail="first\n" + "x" * 99 + "\n" + "y\n" * 20_000 + "the last words"
    )
    shown = page.render(None, [replace(found, evidence=replace(long, log_tail=[]))])
    assert "the last words</pre>" in shown
    assert "\nfirst" not in shown


def test_a_hundred_large_reports_make_no_large_page() -> None:
    frames = [Frame("<f>" * 400, "/lib/" + "m" * 900, file="f" * 900)] * 800
    big = report(sequences=256, length=64)
    big = replace(
        big,
        evidence=replace(
            big.evidence,
            threads=[Thread(7, "t", crashed=True, native=frames, python=frames)]
            + [Thread(8, native=frames)] * 40,
            stderr_tail="<" * (1 << 20),
            registers={str(n): "&" * 2000 for n in range(400)},
            flight=[Phase(str(n % 99), n, 9999.0 - n, 0.5) for n in range(9000)],
        ),
        ladder=[schema.LadderStep("safe", schema.Outcome.OK, list(range(999)), "<" * 999)] * 999,
    )
    assert len(schema.encode(big)) > 1 << 20
    reports = [replace(big, id=f"r{n}") for n in range(100)]
    shown = page.render(None, reports).encode()
    assert len(shown) < page.MAX_BYTES + (1 << 20)
    assert len(page.render(None, reports[:1])) < 1 << 20
    assert shown.count(b'<div class="report"') + shown.count(b'<details class="report"') == 100


def test_the_latest_of_each_signature_is_picked_first() -> None:
    at = datetime(2026, 11, 21, tzinfo=UTC)
    rows = [Row(id="lost", crashed_at=at, problem="torn")]
    rows += [
        Row(id=f"a{n}", crashed_at=at, exit=Exit.HANG, signature="a", same_as="a9" if n < 9 else "")
        for n in range(400)
    ]
    rows += [Row(id=f"b{n}", crashed_at=at, exit=Exit.HANG, signature="b") for n in range(9)]
    picked = page.pick(rows)
    assert set(picked[:2]) == {"a9", "b0"}  # a0 to a8 are of a storm, and hold nothing
    assert picked[2:4] == ["a0", "a1"]
    assert len(picked) == page.MAX_REPORTS


def test_triage_html_writes_the_reports_of_a_store(record: Record, store: Store, tiny: Path) -> None:
    [real] = record(tiny, lambda decoder: decoder.encode(Batch.of([[5, 6], [7]])))
    other = replace(report(1), id="20261121T000000Z-000000")
    store.write(other, as_text(other))
    (store.directory / "20261121T000001Z-torn").mkdir()
    done = crumplezone("triage", "html", "--out", "page.html", cwd=store.directory.parent)
    assert (done.returncode, done.stdout) == (0, "")
    shown = Parsed((store.directory.parent / "page.html").read_text()).said
    for part in (
        "3 crash reports",
        "build_input_k_idxs",
        "it has no report.json",
        "3 tokens",
        "✓ 0-1",
        "rip",
    ):
        assert part in shown, part
    done = crumplezone("triage", "html", real.id, cwd=store.directory.parent)
    assert "1 crash report" in Parsed(done.stdout).said
    assert ENCODE.title + " 1" not in done.stdout
    assert f'id="r-{real.id}" open' in done.stdout or f'open id="r-{real.id}"' in done.stdout


def test_triage_html_of_nothing_and_of_an_unknown_id(tmp_path: Path) -> None:
    done = crumplezone("triage", "html", cwd=tmp_path)
    assert done.returncode == 0
    assert "No crash reports in" in done.stderr
    assert "Nothing has crashed." in Parsed(done.stdout).said
    done = crumplezone("triage", "html", "nope", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    done = crumplezone("triage", "html", "--out", "no/such/page.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
