"""The store: real processes, real directories, hostile contents."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from crumplezone.errors import InputError, ReportError
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.formats import text
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Exit, Report
from crumplezone.reports.store import index, store
from crumplezone.reports.store.shrink import fit
from crumplezone.reports.store.store import Store
from tests.support.decoders import descriptors, opened_since
from tests.support.records.reports import ID, full, put


def reports_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def problems(reports: Store) -> dict[str, str]:
    return {row.id: row.problem for row in reports.rows()}


def python(code: str, *arguments: Path | str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# --- writing and reading


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    reports = Store(tmp_path / "a" / "b")
    path = reports.write(full(), "for people \udc80")
    assert path == reports.path(ID) == tmp_path / "a" / "b" / ID
    assert reports.read(ID) == full()
    assert (path / "report.txt").read_text() == "for people \\udc80"
    assert reports.directory.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o700
    assert reports_in(reports.directory) == [ID]


def test_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CRUMPLEZONE_REPORTS", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert store.default_directory() == tmp_path / ".local/state/crumplezone/reports"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert store.default_directory() == Path("/state/crumplezone/reports")
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", "~/mine")
    assert store.default_directory() == tmp_path / "mine"


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/reports", "file:///tmp/x", Path("s3://bucket")])
def test_a_url_is_no_store(url: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=rf"^reports is '{url}': must be a directory on this machine"):
        store.directory_of(url)
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", str(url))
    with pytest.raises(InputError, match=rf"^\$CRUMPLEZONE_REPORTS is '{url}'"):
        store.directory_of(None)


@pytest.mark.parametrize("path", ["s3", "a:b", "./s3:/x", "/s3://x", "C:/x", ""])
def test_a_path_is_a_store_whatever_its_name(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", str(tmp_path))
    assert store.directory_of(path) == (Path(path).absolute() if path else tmp_path)


@pytest.mark.parametrize("path", ["~/mine", "~//mine", Path("~/mine"), "mine"])
def test_a_store_is_where_it_was_named_wherever_the_process_goes(
    path: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    reports = Store(store.directory_of(path))
    monkeypatch.chdir("/")
    assert reports.write(full(), "") == tmp_path / "mine" / ID


def test_a_store_that_is_nowhere_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no place for crash reports"):
        store.directory_of("~nobody-of-this-name/mine")
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ReportError, match="working directory is gone: give an absolute one"):
        store.directory_of("mine")
    assert store.directory_of(tmp_path) == tmp_path


def test_new_ids_are_in_utc_differ_and_are_valid(tmp_path: Path) -> None:
    now = datetime(2026, 11, 21, 7, 4, 11, tzinfo=timezone(timedelta(hours=1)))
    ids = {store.new_id(now) for _ in range(20)}
    assert len(ids) == 20
    for report_id in ids:
        assert report_id.startswith("20261121T060411Z-")
        Store(tmp_path).path(report_id)


def test_what_is_no_report_is_invisible(tmp_path: Path) -> None:
    put(tmp_path, f".tmp-{ID}-1", schema.encode(full()))
    (tmp_path / "notes.txt").write_text("not a report")
    (tmp_path / "no id").mkdir()
    (tmp_path / "\x1b[31m").mkdir()
    assert Store(tmp_path).rows() == []
    with pytest.raises(ReportError, match="no report 2026"):
        Store(tmp_path).read("2026")


def test_a_taken_id_is_refused_and_leaves_the_first_report(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "first")
    with pytest.raises(ReportError, match="cannot be written"):
        reports.write(msgspec.structs.replace(full(), result="second"), "second")
    assert reports.read(ID) == full()
    assert [row.result for row in reports.rows()] == ["cured by safe"]
    assert reports_in(tmp_path) == [ID]


def test_a_store_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports = Store(tmp_path / "file")
    with pytest.raises(ReportError, match="CRUMPLEZONE_REPORTS"):
        reports.write(full(), "")
    with pytest.raises(ReportError, match="--reports"):
        reports.rows()


def test_a_report_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    bad = msgspec.structs.replace(full(), result=object())
    with pytest.raises(ReportError, match="cannot be encoded"):
        reports.write(bad, "")
    assert list(tmp_path.iterdir()) == []
    reports.write(full(), "")
    with pytest.raises(ReportError, match="cannot be encoded"):
        reports.update(bad)
    assert reports.read(ID) == full()


def test_what_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    reports, odd = Store(tmp_path), full(hostile="\udcff\ud800")
    path = reports.write(odd, text.render(odd))
    assert reports.read(ID) == full(hostile=r"\udcff\ud800")
    (row,) = reports.rows()
    (tmp_path / index.NAME).unlink()
    assert reports.rows() == [row]
    assert sign(reports.read(ID)) == sign(odd)
    reports.update(odd)
    assert "\nsecond\\udcff" in (path / "report.txt").read_text()


BIG = 1 << 20  # tokens


def huge(n: int) -> Report:
    batch = schema.BatchRecord([50_000] * n, list(range(n)), [0] * n, [False] * n)
    return msgspec.structs.replace(full(), batch=batch)


def test_a_batch_of_half_a_million_tokens_is_kept(tmp_path: Path) -> None:
    reports, report = Store(tmp_path), huge(BIG // 2)
    reports.write(report, "")
    assert reports.read(ID) == report


def test_what_is_too_large_is_cut_and_says_so(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(huge(BIG), "")
    found = reports.read(ID)
    assert found.batch is not None
    assert found.batch.tokens == [50_000] * 8192
    assert found.batch.positions == [*range(4096), *range(BIG - 4096, BIG)]
    assert found.batch.cut == BIG - 8192
    (said,) = [step for step in found.evidence.steps if step.name == "size"]
    assert said.detail.startswith("left out the middle of the batch: ")
    assert "1040384 of its tokens are left out" in text.render(found)
    assert sign(found) == sign(full())


def test_what_is_dispensable_goes_first() -> None:
    maps = [schema.Mapping("0x1", "0x2", "r-xp", path="/x" * 50)] * 1000
    threads = [*full().evidence.threads, *[schema.Thread(9, "idle" * 100)] * 1000]
    evidence = msgspec.structs.replace(
        full().evidence, stderr_tail="x" * 100_000, log_tail=["y" * 100] * 1000, maps=maps, threads=threads
    )
    report = msgspec.structs.replace(huge(20_000), evidence=evidence)
    sizes, left_out = [len(schema.encode(report))], list[str]()
    while len(left_out) < 4:
        report, data = fit(report, sizes[-1] - 1)
        sizes.append(len(data))
        left_out.append(report.evidence.steps[-1].detail.partition(":")[0])
        assert schema.decode(data) == report
    assert left_out == [
        "left out all but the end of the logs",
        "left out the mappings",
        "left out the middle of the batch",
        "left out the other threads and most of the ladder",
    ]
    assert [thread.crashed for thread in report.evidence.threads] == [True]
    assert sign(report) == sign(full())


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "/etc", "a/b", ".tmp-x-1", "a\0b", "a\n", "\x1b[31m"])
def test_ids_that_could_lead_elsewhere_are_refused(tmp_path: Path, bad: str) -> None:
    reports = Store(tmp_path)
    uses: list[Callable[[str], object]] = [reports.path, reports.read]
    uses += [lambda name: reports.write(full(name), ""), lambda name: reports.update(full(name))]
    for use in uses:
        with pytest.raises(ReportError, match="not a report id") as caught:
            use(bad)
        assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_unique_prefix_is_enough(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for report_id in ("abc", "abcd", "xyz"):
        reports.write(full(report_id), "")
    assert reports.read("x").id == "xyz"
    assert reports.read("abc").id == "abc"  # an id is not ambiguous with what it begins
    with pytest.raises(ReportError, match=r"begins 2 report ids \(abc, abcd"):
        reports.read("ab")
    with pytest.raises(ReportError, match=str(tmp_path)):
        reports.read("q")


def test_the_newest_crash_comes_first_whatever_the_time_zone(tmp_path: Path) -> None:
    times = {
        "d": "2026-11-21T08:00:00+02:00",
        "c": "2026-11-21T06:00:00.000001Z",
        "b": "2026-11-21T06:00:01",  # no zone: UTC
        "a": "2026-11-21T05:59:00-00:30",
    }
    reports = Store(tmp_path)
    for report_id, time in times.items():
        reports.write(msgspec.structs.replace(full(report_id), crashed_at=time), "")
    assert [row.id for row in reports.rows()] == ["a", "b", "c", "d"]


# --- what cannot be read

NEWER = b'{"schema_version": 99, "evidence": "of another shape"}'
CORRUPT = {
    "empty": b"",
    "half": schema.encode(full("half"))[:200],
    "no-object": b"[]",
    "shape": b'{"id": "shape", "crashed_at": "", "evidence": {"exit": "\\u001b[31m", "pid": 1}}',
    "not-utf8": b'{"id": "not-utf8", "crashed_at": "\xff", "evidence": {"exit": "signal", "pid": 1}}',
    "deep": b'{"x": ' + b"[" * 100_000,
    "other-id": schema.encode(full("../../etc\x1b")),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_report_is_listed_and_harms_no_other(tmp_path: Path, name: str) -> None:
    reports = Store(tmp_path)
    reports.write(full("good"), "")
    put(tmp_path, name, CORRUPT[name])
    for _ in range(2):  # the second time from the index
        found = {row.id: row for row in reports.rows()}
        assert (found["good"].problem, found["good"].exit) == ("", Exit.SIGNAL)
        assert (found[name].exit, found[name].corrupt) == (None, True)
        assert "corrupt" in found[name].problem
        assert found[name].problem.isprintable()
    with pytest.raises(ReportError, match="corrupt"):
        reports.read(name)


def test_a_report_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    put(tmp_path, "marked", b"\xef\xbb\xbf" + schema.encode(full("marked")))
    assert Store(tmp_path).read("marked") == full("marked")


def test_a_newer_report_asks_for_an_upgrade(tmp_path: Path) -> None:
    put(tmp_path, "newer", NEWER)
    (row,) = Store(tmp_path).rows()
    assert "upgrade" in row.problem
    assert not row.corrupt
    with pytest.raises(ReportError, match="upgrade"):
        Store(tmp_path).read("newer")


def test_what_is_no_regular_file_of_a_sane_size_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "huge", b"")
    os.truncate(tmp_path / "huge" / "report.json", store.MAX_BYTES + 1)
    (tmp_path / "missing").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    before = descriptors()
    found = problems(Store(tmp_path))
    assert opened_since(before) == []
    assert "larger" in found["huge"]
    assert "no report.json" in found["missing"]
    assert "not a regular file" in found["pipe"]
    assert "not a regular file" in found["folder"]


def test_links_out_of_the_store_are_not_followed(tmp_path: Path) -> None:
    outside = Store(tmp_path / "outside")
    path = outside.write(full(), "")
    inside = tmp_path / "inside"
    put(inside, "x", b"")  # so that there is an index
    (inside / "file").mkdir()
    (inside / "file" / "report.json").symlink_to(path / "report.json")
    (inside / ID).symlink_to(path)
    # Not even if the index vouches for what the link leads to.
    (row,) = outside.rows()
    index.Index(inside).add([row, msgspec.structs.replace(row, stamp=index.NO_STAMP)])
    assert problems(Store(inside)).keys() == {"x", "file", ID}
    for name in ("file", ID):
        with pytest.raises(ReportError, match="links are not followed"):
            Store(inside).read(name)
        assert "links are not followed" in problems(Store(inside))[name]
    with pytest.raises(ReportError, match="cannot be updated"):
        Store(inside).update(msgspec.structs.replace(full(), result="changed"))
    assert outside.read(ID) == full()


def test_a_time_that_no_calendar_has_is_no_problem(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for report_id, time in {"a": "", "b": "0001-01-01T00:00:00+14:00", "c": "\x1b"}.items():
        reports.write(msgspec.structs.replace(full(report_id), crashed_at=time), "")
    day = datetime.now(UTC) - timedelta(days=1)
    assert all(row.crashed_at > day for row in reports.rows())


# --- several processes

WRITE = """
import sys
from pathlib import Path
import msgspec
from crumplezone.reports.records import report as schema
from crumplezone.reports.store import store
data, directory, name, count = sys.argv[1:]
report = schema.decode(Path(data).read_bytes())
reports = store.Store(Path(directory))
for i in range(int(count)):
    one = msgspec.structs.replace(report, id=f"{name}-{i}" if int(count) > 1 else name)
    reports.write(one, "text")
    if i % 2:
        reports.update(msgspec.structs.replace(one, result="updated"))
"""


@pytest.fixture
def specimen(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_bytes(schema.encode(full()))
    return path


def test_writers_at_once_and_a_reader_see_only_whole_reports(tmp_path: Path, specimen: Path) -> None:
    reports = Store(tmp_path / "store")
    writers = [python(WRITE, specimen, reports.directory, f"w{i}", "40") for i in range(4)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        found = problems(reports)
        assert set(found.values()) <= {""}
        assert len(found) >= seen
        seen = len(found)
        if seen % 3 == 0:
            (reports.directory / index.NAME).unlink(missing_ok=True)
    assert [writer.communicate()[1] for writer in writers] == [b""] * 4
    rows = reports.rows()
    assert {row.id for row in rows} == {f"w{w}-{i}" for w in range(4) for i in range(40)}
    assert all((row.result == "updated") == (int(row.id.split("-")[1]) % 2 == 1) for row in rows)
    (reports.directory / index.NAME).unlink(missing_ok=True)
    assert reports.rows() == rows


def test_processes_that_fight_for_one_id_leave_one_whole_report(tmp_path: Path, specimen: Path) -> None:
    reports = Store(tmp_path / "store")
    writers = [python(WRITE, specimen, reports.directory, ID, "1") for _ in range(4)]
    errors = [writer.communicate()[1] for writer in writers]
    assert sorted(writer.returncode for writer in writers) == [0, 1, 1, 1]
    assert sum(b"ReportError" in error for error in errors) == 3
    assert reports_in(reports.directory) == [ID]
    assert reports.read(ID) == full()


def test_a_writer_killed_at_work_leaves_only_whole_reports(tmp_path: Path, specimen: Path) -> None:
    reports = Store(tmp_path / "store")
    with python(WRITE, specimen, reports.directory, "w", "100000") as writer:
        while len(reports.rows()) < 20:
            assert writer.poll() is None, writer.stderr and writer.stderr.read()
        writer.kill()
    found = problems(reports)
    assert len(found) >= 20
    assert set(found.values()) == {""}
