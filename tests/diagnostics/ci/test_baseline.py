"""What is known to fail, and what a run shows against it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.diagnostics.ci import baseline
from crumplezone.diagnostics.ci.baseline import Baseline, Known
from crumplezone.errors import InputError
from crumplezone.reports.analysis.same import CUT
from crumplezone.reports.records.report import Signature
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, Shape

KNOWN = Baseline({"s1": Known("SIGSEGV in f", ["a", "b"])}, {"c": "mismatch", "h": "hang"})


def case(name: str, ending: Ending, signature: str = "") -> CaseRecord:
    signed = Signature(signature, "SIGSEGV", title=f"SIGSEGV in {signature}") if signature else None
    return CaseRecord(name, "m.gguf", Shape(), ending, signature=signed)


@pytest.mark.parametrize(
    ("record", "news"),
    [
        (case("a", Ending.CRASH, "s1"), News.KNOWN),
        (case("z", Ending.CRASH, "s1"), News.KNOWN),  # the same bug, wherever it comes
        (case("a", Ending.CRASH, "s2"), News.NEW),
        (case("a", Ending.HANG), News.NEW),
        (case("a", Ending.PASS), News.FIXED),
        (case("a", Ending.ERROR), News.UNKNOWN),
        (case("c", Ending.MISMATCH), News.KNOWN),
        (case("c", Ending.REFUSED), News.NEW),
        (case("h", Ending.HANG, "s3"), News.KNOWN),  # wherever it was when it was killed
        (case("a", Ending.HANG, "s1"), News.NEW),
        (case("c", Ending.PASS), News.FIXED),
        (case("d", Ending.MISMATCH), News.NEW),
        (case("d", Ending.PASS), News.EXPECTED),
        (case("d", Ending.ERROR), News.UNKNOWN),
    ],
)
def test_the_news(record: CaseRecord, news: News) -> None:
    assert KNOWN.judge(record) is news


@pytest.mark.parametrize(
    ("records", "fixed"),
    [
        ([case("a", Ending.PASS), case("b", Ending.PASS)], True),
        ([case("a", Ending.PASS)], False),  # b was not run: another shard has it
        ([case("a", Ending.PASS), case("b", Ending.ERROR)], False),
        ([case("a", Ending.PASS), case("b", Ending.CRASH, "s2")], False),
        ([case("a", Ending.PASS), case("b", Ending.PASS), case("z", Ending.CRASH, "s1")], False),
    ],
)
def test_fixed_is_only_what_was_tried(records: list[CaseRecord], fixed: bool) -> None:
    assert KNOWN.fixed(records) == ([Fixed("s1", "SIGSEGV in f", ["a", "b"])] if fixed else [])


def test_a_failure_without_a_signature_is_fixed_when_its_case_passes() -> None:
    assert KNOWN.fixed([case("c", Ending.PASS), case("h", Ending.ERROR)]) == [Fixed("", "mismatch", ["c"])]


def test_an_update_leaves_what_was_not_run() -> None:
    run = [case("a", Ending.PASS), case("d", Ending.CRASH, "s2"), case("e", Ending.HANG)]
    updated = KNOWN.updated([*run, case("b", Ending.ERROR)])
    assert updated.signatures == {
        "s1": Known("SIGSEGV in f", ["b"]),
        "s2": Known("SIGSEGV in s2", ["d"], "SIGSEGV"),
    }
    assert updated.cases == {"c": "mismatch", "e": "hang", "h": "hang"}
    assert updated.updated([case("b", Ending.PASS)]).signatures.keys() == {"s2"}


records = st.builds(
    lambda names, endings: [case(name, *ending) for name, ending in zip(names, endings, strict=False)],
    st.permutations("abcdefg"),
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from([Ending.CRASH, Ending.HANG, Ending.OOM]), st.sampled_from(["s1", "s2", ""])
            ),
            st.tuples(st.sampled_from([Ending.PASS, Ending.MISMATCH, Ending.REFUSED, Ending.ERROR])),
        ),
        max_size=7,
    ),
)


@given(records, records)
def test_after_an_update_the_same_run_is_as_expected(before: list[CaseRecord], run: list[CaseRecord]) -> None:
    updated = Baseline().updated(before).updated(run)
    for record in run:
        expected = {Ending.ERROR: News.UNKNOWN, Ending.PASS: News.EXPECTED}.get(record.ending, News.KNOWN)
        assert updated.judge(record) is expected
    assert updated.updated(run) == updated


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    baseline.write(path, KNOWN)
    assert baseline.read(path) == KNOWN
    assert msgspec.json.decode(path.read_bytes())["schema_version"] == 2
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors on Windows do
    assert baseline.read(path) == KNOWN
    (tmp_path / "link.json").symlink_to(path)
    baseline.write(tmp_path / "link.json", Baseline())
    assert baseline.read(path) == Baseline()  # the file behind the link, which stays
    assert (tmp_path / "link.json").is_symlink()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no baseline"),
        ("[" * 100_000, "is no baseline"),
        ("\xff", "is no baseline"),
        ('{"signatures": {}}', "`schema_version`"),
        ('{"schema_version": 1, "sigs": {}}', "unknown field `sigs`"),
        ('{"schema_version": 1, "cases": {"a": "pass"}}', "Invalid enum value 'pass'"),
        ('{"schema_version": 3, "other": {}}', "upgrade crumplezone"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "known.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=said):
        baseline.read(tmp_path / "known.json", missing_ok=True)


def test_what_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    assert baseline.read(path, missing_ok=True) == Baseline()
    with pytest.raises(InputError, match="does not exist; --update-baseline writes it"):
        baseline.read(path)
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        baseline.read(path)
    for write in (baseline.check_writable, lambda path: baseline.write(path, KNOWN)):
        with pytest.raises(InputError, match="cannot be written"):
            write(tmp_path / "no" / "known.json")


WHOLE, CUT_SHORT, OTHER = (
    Signature(name, "SIGSEGV", list(key), "SIGSEGV in f")
    for name, key in (("whole", "fgh"), ("cut", ("f", CUT)), ("other", "xyz"))
)


def crash(name: str, signature: Signature) -> CaseRecord:
    return CaseRecord(name, "m.gguf", Shape(), Ending.CRASH, signature=signature)


@pytest.mark.parametrize(("known", "met"), [(WHOLE, CUT_SHORT), (CUT_SHORT, WHOLE)])
def test_a_known_crash_stays_known_however_little_of_its_stack_is_read(
    known: Signature, met: Signature
) -> None:
    expected = Baseline().updated([crash("a", known)])
    run = [crash("a", met)]
    assert expected.judge(run[0]) is News.KNOWN
    assert expected.judge(crash("a", OTHER)) is News.NEW
    assert expected.fixed([crash("b", met), case("a", Ending.PASS)]) == []  # it was met, elsewhere
    updated = expected.updated(run)
    assert updated.signatures == {"whole": Known(WHOLE.title, ["a"], "SIGSEGV", WHOLE.key)}
    assert updated.updated(run) == updated


def test_a_run_names_each_crash_by_the_fullest_signature_that_is_known() -> None:
    expected = Baseline().updated([crash("a", WHOLE)])
    run = [crash("a", CUT_SHORT), crash("b", OTHER), case("c", Ending.PASS)]
    assert [record.signature for record in expected.resolved(run)] == [WHOLE, OTHER, None]
    assert [record.signature for record in Baseline().resolved(run)] == [CUT_SHORT, OTHER, None]
    assert [each.signature for each in Baseline().resolved([*run, crash("d", WHOLE)])][::3] == [WHOLE, WHOLE]


def test_a_baseline_of_schema_1_is_read_and_completed() -> None:
    old = Baseline({"whole": Known("SIGSEGV in f", ["a"])}, schema_version=1)
    assert old.judge(crash("a", WHOLE)) is News.KNOWN
    updated = old.updated([crash("a", WHOLE)])
    assert updated == Baseline({"whole": Known("SIGSEGV in f", ["a"], "SIGSEGV", WHOLE.key)})
