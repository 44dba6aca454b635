"""The index: it follows the directories, whatever is done to them or to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from crumplezone.diagnostics.triage.listing import cells, groups
from crumplezone.errors import ReportError
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.formats import text
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Exit, Verdict, VerdictKind
from crumplezone.reports.store import index
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.store import Store
from tests.support.records.reports import ESCAPE, ID, full, put


def problems(reports: Store) -> dict[str, str]:
    return {row.id: row.problem for row in reports.rows()}


def row_in(reports: Store) -> Row:
    (row,) = reports.rows()
    return row


def test_a_row_says_what_the_report_says(tmp_path: Path) -> None:
    versions = {"llama.cpp": "b1", "llama-cpp-python": "0.3"}
    report = msgspec.structs.replace(
        full(),
        environment=schema.Environment(versions),
        signature=sign(full()),
        verdict=Verdict(VerdictKind.BATCH_ONLY, "because"),
        redacted=True,
        same_as="another",
    )
    reports = Store(tmp_path)
    path = reports.write(report, "12345")
    written = row_in(reports)
    (tmp_path / index.NAME).unlink()
    assert row_in(reports) == written  # made by reading it, the row is the same
    assert written == Row(
        id=ID,
        stamp=index.stamp_of((path / "report.json").stat()),
        crashed_at=datetime(2026, 11, 21, 6, 4, 11, tzinfo=UTC),
        exit=Exit.SIGNAL,
        signal="SIGSEGV",
        top="ggml_compute_forward_get_rows (libggml-cpu.so+0x1234)",
        result="cured by safe",
        signature=sign(full()).id,
        title=sign(full()).title,
        confidence="high",
        fault_class="SIGSEGV",
        key=("ggml_compute_forward_get_rows",),
        verdict=VerdictKind.BATCH_ONLY,
        model="/models/tiny.gguf",
        llama_cpp="b1",
        llama_cpp_python="0.3",
        redacted=True,
        same_as="another",
        bytes=len(schema.encode(report)) + 5,
    )


def test_reports_of_the_first_version_are_signed_when_they_are_listed(tmp_path: Path) -> None:
    Store(tmp_path).write(full(), "")
    assert row_in(Store(tmp_path)).signature == sign(full()).id


def test_what_the_index_knows_is_not_read_again(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    path = reports.write(full(), "") / "report.json"
    before, state = row_in(reports), path.stat()
    path.write_bytes(b"x" * state.st_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert row_in(reports) == before
    os.utime(path)
    assert "corrupt" in row_in(reports).problem


def test_another_file_of_the_same_time_and_size_is_read(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    path = reports.write(full(), "") / "report.json"
    state = path.stat()
    other = tmp_path / "other"
    other.write_bytes(b"x" * state.st_size)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.rename(path)
    assert "corrupt" in row_in(reports).problem


def test_what_must_be_looked_at_each_time_does_not_grow_the_index(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    size = (tmp_path / index.NAME).stat().st_size
    assert problems(reports).keys() == {ID, "link", "empty"}
    assert (tmp_path / index.NAME).stat().st_size == size


def test_an_update_is_seen_at_once_and_in_both_files(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    path = reports.write(full(), "")
    for result in ("first of them", "2nd, as long", "3rd, as long"):
        changed = msgspec.structs.replace(full(), result=result)
        reports.update(changed)
        assert row_in(reports).result == result
        assert reports.read(ID) == changed
        assert (path / "report.txt").read_text() == text.render(changed)
    (tmp_path / index.NAME).unlink()
    assert row_in(reports).result == "3rd, as long"
    assert sorted(file.name for file in path.iterdir()) == ["report.json", "report.txt"]


def test_an_update_of_a_report_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be updated"):
        Store(tmp_path).update(full())
    assert list(tmp_path.iterdir()) == []


def test_a_report_removed_or_added_by_hand_is_seen(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    path = reports.write(full("a"), "")
    reports.write(full("b"), "")
    assert len(reports.rows()) == 2
    path.rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    put(tmp_path, "c", schema.encode(full("c")))
    assert problems(reports) == {"b": "", "c": ""}


def test_the_index_stays_small(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "")
    for _ in range(120):
        reports.update(full())
    before = reports.rows()
    assert (tmp_path / index.NAME).read_bytes().count(b"\n") == 0  # one line is left
    assert reports.rows() == before


HOSTILE_LINES = [
    b"",
    b"\xff\xfe{",
    b"[" * 100_000,
    b'{"row":"0.0.0","id":"%s","crashed_at":"2026-11-21T06:04:11Z"}' % ID.encode(),
    b'{"id":"%s","stamp":[0,0,0],"crashed_at":"2026-11-21T06:04:11"}' % ID.encode(),
    b'{"id":"ghost","stamp":[1,2,3],"crashed_at":"2026-11-21T06:04:11Z","exit":"signal"}',
    b'{"id":"%s","stamp":[1,2,3],"crashed_at":"2026-11-21T06:04:11Z","bytes":-1}' % ID.encode(),
    b'{"id":"../../x","stamp":[1,2,3],"crashed_at":"2026-11-21T06:04:11Z","title":"%s"}' % (b"x" * 9999),
]


def test_foreign_and_torn_lines_are_ignored(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "")
    expected = reports.rows()
    good = (tmp_path / index.NAME).read_bytes().strip()
    (tmp_path / index.NAME).write_bytes(b"\n".join([*HOSTILE_LINES, good, good[: len(good) // 2]]))
    assert reports.rows() == expected
    reports.write(full("b"), "")  # its line comes after a torn one
    rows, _ = index.Index(tmp_path).load()
    assert "b" in rows


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crashed_at", "0001-01-01T00:00:00+14:00"),
        ("crashed_at", "9999-12-31T23:59:59-14:00"),
        ("crashed_at", "2026-11-21T06:04:11"),
        ("bytes", 1 << 63),
    ],
)
def test_a_line_of_the_right_stamp_with_a_wrong_value_is_ignored(
    tmp_path: Path, field: str, value: object
) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "")
    expected = reports.rows()
    line = json.loads((tmp_path / index.NAME).read_bytes()) | {field: value}
    (tmp_path / index.NAME).write_text(json.dumps(line))
    assert reports.rows() == expected
    assert [groups(reports.rows(), {})[0].count, cells(reports.rows()[0])[1][:4]] == [1, "2026"]


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0001-05-01"])
def test_a_report_of_an_impossible_time_has_that_of_its_directory(tmp_path: Path, when: str) -> None:
    reports = Store(tmp_path)
    reports.write(msgspec.structs.replace(full(), crashed_at=when), "")
    (tmp_path / index.NAME).unlink()
    assert row_in(reports).crashed_at.year > 2000


def fifo(path: Path) -> None:
    os.mkfifo(path)


def too_large(path: Path) -> None:
    path.touch()
    os.truncate(path, index.MAX_BYTES + 1)


def link(path: Path) -> None:
    target = path.parent / "precious.txt"
    target.write_text("precious")
    path.symlink_to(target)


@pytest.mark.parametrize("make", [fifo, too_large, link, Path.mkdir], ids=lambda make: make.__name__)
def test_something_else_in_place_of_the_index_harms_nothing(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / index.NAME)
    reports = Store(tmp_path)
    reports.write(full(), "")
    assert problems(reports) == {ID: ""}
    assert problems(reports) == {ID: ""}
    if make is link:
        assert (tmp_path / "precious.txt").read_text() == "precious"
    if make is not Path.mkdir:  # a directory is left alone
        assert (tmp_path / index.NAME).is_file()
        assert not (tmp_path / index.NAME).is_symlink()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_strings_of_a_row_are_bounded(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(hostile=ESCAPE + "x" * 100_000), "")
    row = row_in(reports)
    assert len(row.result) == len(row.model) == 512
    assert (tmp_path / index.NAME).stat().st_size < 8192
    assert index.Index(tmp_path).load()[0] == {ID: row}


# Root may write anywhere (CAP_DAC_OVERRIDE, 1) and read anything (CAP_DAC_READ_SEARCH, 2), unless the
# bounding set says that the next program may not: PR_CAPBSET_DROP is 24, see prctl(2) and capabilities(7).
UNPRIVILEGED = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
LIST = """
import sys
from pathlib import Path
from crumplezone.reports.store import Store
store = Path(sys.argv[1])
try:
    (store / "probe").touch()
    print("writable")
except PermissionError:
    print("read-only")
for row in Store(store).rows():
    print(row.id, row.problem)
"""


def unprivileged(code: str, directory: Path) -> list[str]:
    command = [sys.executable, "-c", UNPRIVILEGED, code, str(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_a_read_only_store_is_listed(tmp_path: Path) -> None:
    reports = Store(tmp_path / "store")
    reports.write(full(), "")
    (reports.directory / index.NAME).unlink()
    reports.directory.chmod(0o500)
    try:
        assert unprivileged(LIST, reports.directory) == ["read-only", f"{ID} "]
        assert list(reports.directory.iterdir()) == [reports.path(ID)]
    finally:
        reports.directory.chmod(0o700)


def test_what_one_may_not_read_another_may(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    path = reports.write(full(), "") / "report.json"
    (tmp_path / index.NAME).unlink()
    path.chmod(0)
    _, line = unprivileged(LIST, tmp_path)
    assert "Permission denied" in line
    path.chmod(0o600)
    row = row_in(reports)
    assert (row.problem, row.exit) == ("", Exit.SIGNAL)
