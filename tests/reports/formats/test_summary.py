"""The Markdown summary of a diagnostic run, and its annotations, as GitHub reads them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.reports.formats import summary
from crumplezone.reports.records.report import Signature
from crumplezone.reports.records.run import Ending, Fixed, News, Shape, grouped
from tests.support.records.exports import NASTY, parsed
from tests.support.records.reports import ID
from tests.support.records.runs import ENCODE, MODEL, case, full_run

STEP_LIMIT = (
    1024 * 1024
)  # bytes: "$GITHUB_STEP_SUMMARY upload aborted, supports content up to a size of 1024k"


def section(text: str, title: str) -> str:
    return text.partition(f"### {title}\n")[2].partition("\n### ")[0]


def test_what_is_new_comes_first_with_its_cause() -> None:
    text = summary.render(full_run())
    assert text.startswith("## Crumplezone: 2 new failures, 1 not known, 1 fixed\n")
    assert "9 cases: 2 pass, 1 mismatch, 2 crash, 1 hang, 1 oom, 1 refused, 1 error." in text
    titles = ["New failures", "Not known", "Known failures", "Fixed", f"`{MODEL}`"]
    places = [text.index(f"### {title}\n") for title in titles]
    assert places == sorted(places)
    new = section(text, "New failures")
    for part in (
        "- **crash** `SIGSEGV in encode`",
        f"2 cases: `{MODEL} encode 1x1`, `{MODEL} encode 3x10`",
        "top frames: `llama_context::encode` < `llama_encode`",
        f"report: `reports/{ID}`",
        "- **mismatch** `mismatch it was`",
        "native: `one`",
        "safe: `two`",
    ):
        assert part in new
    assert "`hang it was`" in section(text, "Known failures")
    assert "`abort in split`" in section(text, "Fixed")
    for fact in ("model: `tiny.gguf`", "llama.cpp: `b1`", "baseline: `known.json`"):
        assert f"- {fact}" in text


def test_a_cause_is_said_once() -> None:
    detail = f"{ENCODE.title}; batch-only: x"
    crash = case("encode 1x1", Ending.CRASH, News.NEW, signature=ENCODE, detail=detail)
    text = summary.render(full_run(cases=[crash]))
    assert text.count(ENCODE.title) == 1
    assert "`batch-only: x`" in text


def test_the_table_has_a_row_for_each_shape_and_a_column_for_each_path() -> None:
    rows = [line for line in summary.render(full_run()).splitlines() if line.startswith("|")]
    assert rows == [
        "| tokens | decode | encode | process | embed | safe |",
        "|:--|:-:|:-:|:-:|:-:|:-:|",
        "| 1 in 1 sequence | pass | **crash (new)** | hang (known) |  | error |",
        "| 10 in 3 sequences | pass (fixed) | **crash (new)** | oom (known) |  |  |",
        "| 10 in 3 sequences, kv_unified, type_k=q8_0 | **mismatch (new)** |  |  |  |  |",
        "| 1 in 3 sequences |  |  |  | refused (known) |  |",
    ]


def test_a_run_as_it_should_be_and_one_that_was_interrupted() -> None:
    passed = [each for each in full_run().cases if each.news is News.EXPECTED]
    good = full_run(cases=passed, planned=len(passed), fixed=[])
    assert summary.headline(good) == "Crumplezone: as expected"
    assert "###" not in summary.render(good).partition("### `")[0]
    assert summary.annotations(good) == []
    cut = full_run(cases=passed, planned=7, fixed=[], complete=False)
    assert summary.headline(cut) == "Crumplezone: interrupted"
    assert "1 of 7 cases: 1 pass." in summary.render(cut)
    assert "**Interrupted**" in summary.render(cut)
    assert "0 of 7 cases: none ran." in summary.render(full_run(cases=[], planned=7, complete=False))


@pytest.mark.parametrize("nasty", NASTY)
def test_no_string_of_a_run_is_markup(nasty: str) -> None:
    marker = "MARK" + nasty + "MARK"
    text = summary.render(full_run(marker))
    tokens, ours = parsed(text), parsed(summary.render(full_run("harmless")))
    assert [(token.type, token.tag) for token in tokens] == [(token.type, token.tag) for token in ours]
    assert {token.type for token in tokens if "MARK" in token.content} == {"code_inline"}
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_summary_is_never_longer_than_github_takes() -> None:
    wide = "\U0001f4a5`" * 400  # four bytes a character
    cases = [
        case(
            f"{n}{wide}",
            Ending.CRASH,
            news,
            wide,
            shape=Shape("decode", n + 1, n + 1),
            signature=Signature(f"{n}{news}", "x", [wide] * 3, wide),
            report=wide,
        )
        for n in range(500)
        for news in News
    ]
    fixed = [Fixed(str(n), wide, [wide] * 100) for n in range(500)]
    text = summary.render(full_run(wide, cases=cases, fixed=fixed, planned=len(cases)))
    assert 100_000 < len(text.encode()) < STEP_LIMIT
    for left_out in ("... and 468 more", "... and 436 more shapes", "and 94 more"):
        assert left_out in text


def unescaped(text: str) -> str:
    """As the runner does it: ActionCommand.cs, UnescapeProperty and UnescapeData."""
    for escaped, plain in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(escaped, plain)
    return text


def annotation(line: str) -> tuple[str, str]:
    """Title and message of a workflow command."""
    found = re.fullmatch(r"::error title=([^:,]*)::(.*)", line)
    assert found, line
    return unescaped(found[1]), unescaped(found[2])


def test_annotations_name_each_new_failure_once() -> None:
    assert [annotation(line) for line in summary.annotations(full_run())] == [
        ("new crash: SIGSEGV in encode", f"{MODEL} encode 1x1 and 1 more: crash it was; report {ID}"),
        (f"new mismatch: {MODEL} decode 3x10 q8_0", f"{MODEL} decode 3x10 q8_0: mismatch it was"),
        (f"error: {MODEL} safe 1x1", f"{MODEL} safe 1x1: error it was"),
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(["%0A::warning::x", "a:b,c"])
)
def test_no_string_of_a_run_is_a_workflow_command(text: str) -> None:
    for line in summary.annotations(full_run(text)):
        assert line.isprintable()
        title, message = annotation(line)
        assert title.startswith(("new crash: SIGSEGV in encode", "new mismatch: tiny", "error: tiny"))
        assert message.startswith(f"{MODEL} ")


def test_no_more_annotations_than_github_shows() -> None:
    cases = [case(str(n), Ending.HANG, News.NEW) for n in range(25)]
    lines = summary.annotations(full_run(cases=cases))
    assert len(lines) == summary.MAX_ANNOTATIONS
    assert annotation(lines[-1])[1].startswith("16 more")
    ten = summary.annotations(full_run(cases=cases[:10]))
    assert annotation(ten[-1])[0] == f"new hang: {MODEL} 9"


def test_cases_of_one_signature_are_one_group() -> None:
    signed = [case(str(n), Ending.CRASH, News.NEW, signature=ENCODE) for n in range(3)]
    alone = [case("x", Ending.HANG, News.NEW), case("y", Ending.HANG, News.NEW)]
    groups = grouped([signed[0], alone[0], signed[1], alone[1], signed[2]])
    assert groups == [signed, [alone[0]], [alone[1]]]
