"""What is kept, what is removed, and that all of it is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError, ReportError
from crumplezone.reports.analysis.same import CUT
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.formats import text
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Report, Signature, Verdict, VerdictKind
from crumplezone.reports.store import retention
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import Ledger, Retention, plan
from crumplezone.reports.store.store import Store
from crumplezone.reports.store.storm import FULL_PER_HOUR, Storm, slim
from tests.support.decoders import fork
from tests.support.records.reports import full, put

NOW = datetime(2026, 11, 21, tzinfo=UTC)
NOTHING = Retention(count=0)


def report(number: int, signature: str, days: int = 0) -> Report:
    """A report, `days` old, of any signature."""
    return msgspec.structs.replace(
        full(f"r{number:03}"),
        crashed_at=(NOW - timedelta(days=days)).isoformat(),
        signature=Signature(signature, "SIGSEGV", title=signature),
    )


def total(reports: Store) -> Counter[str]:
    """Crashes by signature, removed or not."""
    found = Counter(row.signature for row in reports.rows())
    return found + Counter({name: count.removed for name, count in reports.counts().items()})


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".tmp")]


# --- the plan


def row(number: int, signature: str, days: int, size: int, slim: bool) -> Row:
    same_as = "another" if slim and signature else ""
    when = NOW - timedelta(days=days)
    corrupt = not signature and slim
    name = f"r{number}"
    return Row(id=name, signature=signature, crashed_at=when, bytes=size, same_as=same_as, corrupt=corrupt)


some_rows = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 9), st.integers(0, 50), st.booleans()),
    max_size=25,
).map(lambda parts: [row(i, *part) for i, part in enumerate(parts)])
some_limits = st.builds(
    Retention,
    count=st.none() | st.integers(0, 25),
    age=st.none() | st.integers(0, 9).map(lambda days: timedelta(days=days)),
    bytes=st.none() | st.integers(0, 800),
)


def exceeded(rows: list[Row], limits: Retention) -> list[bool]:
    return [
        limits.count is not None and len(rows) > limits.count,
        limits.bytes is not None and sum(one.bytes for one in rows) > limits.bytes,
        limits.age is not None and any(NOW - one.crashed_at > limits.age for one in rows),
    ]


@given(some_rows, some_limits)
def test_the_plan(rows: list[Row], limits: Retention) -> None:
    doomed, unmet = plan(rows, limits, NOW)
    gone = {one.id for one in doomed}
    kept = [one for one in rows if one.id not in gone]

    def age(one: Row) -> tuple[datetime, str]:
        return one.crashed_at, one.id

    for signature in {one.signature for one in rows} - {""}:
        of_it = [one for one in rows if one.signature == signature]
        first = min(of_it, key=lambda one: (bool(one.same_as), age(one)))
        assert first in kept
    old_and_corrupt = [one for one in rows if one.corrupt and exceeded([one], Retention(age=limits.age))[2]]
    assert [one for one in doomed if not one.signature] == sorted(old_and_corrupt, key=age)
    assert doomed == sorted(doomed, key=age)
    # A limit is exceeded only by firsts and by what cannot be read.
    firsts = {one.signature for one in kept} - {""}
    spare = [one for one in kept if one.signature]
    over = exceeded(kept, limits)
    assert sum(over) == len(unmet)
    assert len(spare) == len(firsts) or not (over[0] or over[1])
    assert sum(exceeded([one], Retention(age=limits.age))[2] for one in spare) <= len(firsts)
    # No more is removed than must be, and nothing younger than a duplicate that stays.
    if doomed:
        assert any(exceeded([*kept, doomed[-1]], limits))
        younger = [one for one in kept if one.signature and age(one) < age(doomed[-1])]
        assert len({one.signature for one in younger}) == len(younger)


def test_limits_must_make_sense() -> None:
    for name, bad in (("count", -1), ("bytes", -1), ("age", timedelta(seconds=-1))):
        with pytest.raises(InputError, match=name):
            Retention(**{name: bad})  # type: ignore[arg-type]
    assert plan([row(0, "a", 9, 1, slim=False)], Retention(age=timedelta.max), NOW) == ([], ())


# --- the store


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=12),
    st.lists(some_limits, max_size=3),
)
def test_pruning_again_and_again_loses_no_count(
    parts: list[tuple[str, int]], limits: list[Retention]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        reports = Store(Path(directory) / "store")
        for number, (signature, days) in enumerate(parts):
            reports.write(report(number, signature, days), "")
        written = Counter(signature for signature, _ in parts)
        for limit in limits:
            before = {row.id: row for row in reports.rows()}
            expected, _ = plan(before.values(), limit, NOW)
            pruned = reports.prune(limit, NOW)
            assert pruned.removed == tuple(row.id for row in expected)
            assert pruned.freed == sum(row.bytes for row in expected)
            assert {row.id for row in reports.rows()} == before.keys() - set(pruned.removed)
            assert total(reports) == written
        for count in reports.counts().values():
            oldest = max(days for signature, days in parts if signature == count.signature)
            assert NOW - timedelta(days=oldest) <= count.first_seen <= count.last_seen


def test_what_goes_is_gone_and_what_stays_is_whole(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for number in range(6):
        reports.write(report(number, "even" if number % 2 == 0 else "odd", days=9 - number), "text")
    put(tmp_path, "corrupt", b"{")
    os.utime(tmp_path / "corrupt", (0, 0))
    pruned = reports.prune(Retention(count=4), NOW)
    assert pruned.removed == ("r002", "r003", "r004")
    assert pruned.unmet == ()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "corrupt",
        "r000",
        "r001",
        "r005",
    ]
    assert reports.read("r005") == report(5, "odd", days=4)
    (refused,) = reports.prune(NOTHING, NOW).unmet
    assert "3 reports are left, more than 0" in refused
    assert reports.prune(Retention(age=timedelta(days=30)), NOW).removed == ("corrupt",)
    counts = {name: (count.removed, count.first_seen) for name, count in reports.counts().items()}
    day = timedelta(days=1)
    assert counts == {
        "even": (2, NOW - 7 * day),
        "odd": (2, NOW - 6 * day),
        "": (1, datetime(1970, 1, 1, tzinfo=UTC)),
    }
    assert leftovers(tmp_path) == []


def test_links_and_reports_of_a_newer_version_are_left_alone(tmp_path: Path) -> None:
    outside = Store(tmp_path / "outside").write(report(0, "a"), "")
    reports = Store(tmp_path / "store")
    put(reports.directory, "newer", b'{"schema_version": 99}')
    (reports.directory / "link").symlink_to(outside)
    (reports.directory / ".tmp-link").symlink_to(outside)
    os.utime(reports.directory / ".tmp-link", (0, 0), follow_symlinks=False)
    os.utime(reports.directory / "newer", (0, 0))
    pruned = reports.prune(Retention(0, timedelta(0), 0), NOW + timedelta(days=9999))
    assert pruned.removed == ()
    assert len(pruned.unmet) == 3
    assert leftovers(reports.directory) == []
    assert (outside / "report.json").is_file()


def test_what_dead_writers_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(report(0, "a"), "")
    for name in ("old", "new"):
        put(tmp_path, f".tmp-{name}", b"{")
        (tmp_path / f".tmp-{name}-file").touch()
    for name in ("old", "old-file"):
        os.utime(tmp_path / f".tmp-{name}", (time.time() - 3700,) * 2)
    reports.prune(Retention(), NOW)
    assert sorted(leftovers(tmp_path)) == [".tmp-new", ".tmp-new-file"]


def test_an_empty_store_and_one_that_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").prune(NOTHING).removed == ()
    assert Store(tmp_path / "none").counts() == {}
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="writable"):
        Store(tmp_path / "file").prune(NOTHING)


def ledger(removed: int = 1, first: str = NOW.isoformat(), last: str = NOW.isoformat()) -> bytes:
    count = {"signature": "a", "removed": removed, "first_seen": first, "last_seen": last}
    return msgspec.json.encode({"counts": [count]})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b'{"counts": [{"removed": 1}]}',
        b"\xff",
        ledger(-1),
        ledger(1 << 60),
        ledger(first="2026-01-01T00:00:00"),
        ledger(last="9999-12-31T23:59:59-23:00"),
    ],
)
def test_a_damaged_ledger_harms_nothing(tmp_path: Path, data: bytes) -> None:
    reports = Store(tmp_path)
    for number in range(3):
        reports.write(report(number, "a"), "")
    (tmp_path / ".pruned.json").write_bytes(data)
    assert reports.counts() == {}
    assert len(reports.prune(Retention(count=1)).removed) == 2
    assert total(reports) == {"a": 3}


def test_one_pruner_at_a_time_and_writers_do_not_wait(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(report(0, "a"), "")
    with retention.exclusive(tmp_path):
        with pytest.raises(ReportError, match="another process is pruning"):
            reports.prune(NOTHING)
        reports.write(report(1, "a"), "")
        reports.update(report(1, "b"))
        assert [row.signature for row in reports.rows()] == ["b", "a"]


def test_a_fork_in_the_middle_of_a_pruning_keeps_no_later_one_out(tmp_path: Path) -> None:
    with retention.exclusive(tmp_path):
        pid = fork()
        if not pid:
            signal.pause()  # with a copy of the lock's descriptor
    try:
        with retention.exclusive(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_removal_that_was_interrupted_is_counted_once(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for number in range(4):
        reports.write(report(number, "a"), "")
    rows = {row.id: row for row in reports.rows()}
    # As a kill after the ledger was written and r001 removed leaves it.
    pending = {name: retention.Count.of(rows[name]) for name in ("r001", "r002")}
    Ledger([], pending).save(tmp_path)
    (tmp_path / "r001").rename(tmp_path / ".tmp-r001-x")
    assert total(reports) == {"a": 4}
    assert reports.prune(Retention(count=2)).removed == ("r002",)
    assert total(reports) == {"a": 4}


PRUNE = """
import sys
from pathlib import Path
from crumplezone.errors import ReportError
from crumplezone.reports.store.retention import Retention
from crumplezone.reports.store.store import Store
store = Store(Path(sys.argv[1]))
while True:
    try:
        store.prune(Retention(count=1))
    except ReportError as error:
        assert "another process" in str(error), error
    print(len(store.rows()), flush=True)
"""


def test_pruners_killed_at_work_and_writers_at_once_lose_no_count(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for number in range(50):
        reports.write(report(number, "a"), "")
    written = 50
    command = [sys.executable, "-c", PRUNE, str(tmp_path)]
    for _ in range(2):
        pruners = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        for pruner in pruners:
            assert pruner.stdout
            pruner.stdout.readline()  # it is at work
        for _ in range(50):
            reports.write(report(written, "a"), "")
            written += 1
        for pruner in pruners:
            assert pruner.poll() is None
            pruner.kill()
            pruner.communicate()
        assert total(reports) == {"a": written}
    reports.prune(Retention(count=1))
    assert len(reports.rows()) == 1
    assert total(reports) == {"a": written}


# --- a storm


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_storm_keeps_few_in_full_and_the_rest_counts(tmp_path: Path) -> None:
    reports, clock = Store(tmp_path), Clock()
    storm = Storm(reports.has, clock)
    for number in range(20):
        admitted = storm.admit(report(number, "a"))
        reports.write(admitted, "")
        storm.count(admitted)
        clock.now += 1
    rows = sorted(reports.rows(), key=lambda row: row.id)
    assert [row.same_as for row in rows] == [""] * FULL_PER_HOUR + ["r000"] * (20 - FULL_PER_HOUR)
    assert total(reports) == {"a": 20}
    assert storm.admit(report(20, "b")) == report(20, "b")  # another signature is no part of it


def admits(storm: Storm, each: Report) -> bool:
    """Whether a report is kept in full, and written."""
    admitted = storm.admit(each)
    storm.count(admitted)
    return not admitted.same_as


def test_full_reports_come_back_as_the_hour_passes() -> None:
    clock = Clock()
    storm = Storm(lambda _: True, clock)
    share = [True] * FULL_PER_HOUR + [False]
    assert [admits(storm, report(0, "a")) for _ in share] == share
    clock.now += 3599
    assert not admits(storm, report(0, "a"))
    clock.now += 1
    assert [admits(storm, report(0, "a")) for _ in share] == share


def test_what_was_not_written_or_is_gone_is_not_referred_to() -> None:
    present: set[str] = set()
    storm = Storm(present.__contains__)
    for number in range(20):
        assert not storm.admit(report(number, "a")).same_as  # not one of them is written
    for number in range(20, 20 + FULL_PER_HOUR):
        assert admits(storm, report(number, "a"))
        present.add(f"r{number:03}")
    assert storm.admit(report(40, "a")).same_as == "r020"
    present.clear()
    assert admits(storm, report(41, "a"))
    present.add("r041")
    assert [admits(storm, report(42, "a")) for _ in range(FULL_PER_HOUR)] == [True] * 7 + [False]
    assert storm.admit(report(43, "a")).same_as == "r041"


def test_a_storm_of_signatures_is_bounded() -> None:
    storm = Storm(lambda _: True)
    for number in range(3000):
        storm.count(report(0, f"s{number}"))
    assert len(storm._seen) <= 1024
    unsigned = full()
    for _ in range(20):
        assert admits(storm, unsigned)


def test_slim_keeps_what_counts() -> None:
    verdict = Verdict(VerdictKind.BATCH_ONLY, "because")
    whole = msgspec.structs.replace(full(), signature=sign(full()), verdict=verdict)
    thin = slim(whole, "the-first")
    for field in ("id", "crashed_at", "rung", "ladder", "result", "blamed", "signature", "verdict", "model"):
        assert getattr(thin, field) == getattr(whole, field)
    assert (thin.same_as, thin.evidence.exit, thin.evidence.fault) == (
        "the-first",
        whole.evidence.exit,
        whole.evidence.fault,
    )
    assert thin.environment.versions == whole.environment.versions
    assert thin.batch is None
    for dropped in ("threads", "registers", "stderr_tail", "log_tail", "steps"):
        assert not getattr(thin.evidence, dropped)
    assert len(schema.encode(thin)) < len(schema.encode(whole)) / 2
    assert "SIGSEGV" in text.summary(thin)


# --- one crash, of which more or less is known


def signed(number: int, key: list[str], days: int = 0, place: str = "") -> Report:
    name = " ".join(key)
    signature = Signature(name, "SIGSEGV", key, f"SIGSEGV in {key[0]}", place=place)
    return msgspec.structs.replace(report(number, "", days), signature=signature)


WHOLE, CUT_SHORT = ["f", "g", "h"], ["f", CUT]


def test_what_is_cut_short_takes_part_in_the_storm() -> None:
    storm = Storm(lambda _: True, Clock())
    assert [admits(storm, signed(number, WHOLE)) for number in range(FULL_PER_HOUR - 1)] == [True] * 7
    assert admits(storm, signed(8, CUT_SHORT))
    assert not admits(storm, signed(9, CUT_SHORT))
    assert not admits(storm, signed(10, WHOLE))
    assert admits(storm, signed(11, ["x", "g", "h"]))


def test_a_storm_of_what_was_cut_short_goes_on_when_more_is_known() -> None:
    storm = Storm(lambda _: True, Clock())
    assert [admits(storm, signed(number, CUT_SHORT)) for number in range(FULL_PER_HOUR)] == [True] * 8
    assert not admits(storm, signed(9, WHOLE))
    assert admits(storm, signed(10, ["f", "g", "i"]))  # not what the storm is known by, by now


def test_what_is_cut_short_is_counted_by_the_whole_and_removed_with_it(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for number in range(6):
        reports.write(signed(number, CUT_SHORT if number % 2 else WHOLE, days=number), "")
    rows = reports.rows()
    assert {(each.signature, each.own) for each in rows} == {("f g h", "f g h"), ("f g h", f"f {CUT}")}
    reports.prune(NOTHING)
    left = reports.rows()
    assert [each.id for each in left] == ["r004", "r005"]  # the first of each as it was signed
    gone = retention.removed(left, reports.counts())
    assert gone is not None
    assert gone.removed == 4
    assert gone.first_seen < gone.last_seen


def test_a_crash_that_may_be_one_or_another_stays_by_itself(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    for number, key in enumerate((WHOLE, ["f", "g", "i"], CUT_SHORT)):
        reports.write(signed(number, key), "")
    assert {each.signature for each in reports.rows()} == {"f g h", "f g i", f"f {CUT}"}


def test_a_place_without_a_name_is_found_again_in_its_build(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(signed(0, ["libllama.so+0x10"], place="libllama.so+0x10 build"), "")
    reports.write(signed(1, WHOLE, place="libllama.so+0x10 build"), "")
    reports.write(signed(2, ["x", "g", "h"], place="libllama.so+0x10 another"), "")
    assert [each.signature for each in reports.rows() if each.id == "r000"] == ["f g h"]
