"""The store, the text of a report, and `crumplezone triage`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from crumplezone.cli.triage import app
from crumplezone.errors import ReportError
from crumplezone.reports import schema, store, text
from crumplezone.reports.schema import Evidence, Exit, Fault, Frame, Report, Step, Thread
from crumplezone.reports.store import Store

ID = "20261121T060411Z-3f9a1c"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"
TOP = Frame("ggml_compute_forward_get_rows", "/lib/libggml-cpu.so", offset="0x1234")


def full(report_id: str = ID, hostile: str = "") -> Report:
    """A report with every part, `hostile` in every string that a child chooses."""
    native = [Frame("__pthread_kill_implementation", "/lib/libc.so.6"), Frame("raise", ""), TOP]
    python = [Frame("decode" + hostile, file="/app/run.py", line=7)]
    threads = [
        Thread(8, "worker" + hostile, native=[Frame("futex_wait", "/lib/libgomp.so.1")], python=python),
        Thread(7, "main", crashed=True, native=native, python=python),
    ]
    fault = Fault(11, "SIGSEGV" + hostile, 1, "SEGV_MAPERR", "0xdead" + hostile, "read", trap="#PF")
    evidence = Evidence(
        exit=Exit.SIGNAL,
        pid=7,
        returncode=-11,
        fault=fault,
        registers={f"r{i}" + hostile: f"0x{i:016x}" for i in range(9)},
        threads=threads,
        stderr_tail="first\nsecond" + hostile,
        log_tail=["a log line" + hostile],
        detail=hostile,
        steps=[Step("stacks", ok=True, ms=3.5), Step("pystack", ok=False, detail="timed out" + hostile)],
    )
    count = 12
    return Report(
        id=report_id,
        crashed_at="2026-11-21T06:04:11Z",
        evidence=evidence,
        batch=schema.BatchRecord(
            tokens=list(range(100, 100 + count)),
            positions=[*range(10), 0, 1],
            seq_ids=[0] * 10 + [3] * 2,
            outputs=[False] * 9 + [True, False, True],
        ),
        context={"n_ctx": 512, "type_k" + hostile: hostile},
        model=schema.ModelRecord("/models/tiny.gguf" + hostile, size=1, description=hostile),
        environment=schema.Environment(versions={"python": "3.13" + hostile}, cpu="cpu" + hostile),
        ladder=[
            schema.LadderStep("native", schema.Outcome.CRASHED, [0, 3]),
            schema.LadderStep("safe", schema.Outcome.OK, detail=hostile),
        ],
        result="cured by safe" + hostile,
        blamed=[3],
        caller=python,
    )


def plant(directory: Path, report_id: str, data: bytes) -> None:
    (directory / report_id).mkdir(parents=True)
    (directory / report_id / "report.json").write_bytes(data)


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    reports = Store(tmp_path / "a" / "b")
    path = reports.write(full(), "for people \udc80")
    assert path == reports.path(ID) == tmp_path / "a" / "b" / ID
    assert reports.read(ID) == full()
    assert (path / "report.txt").read_text() == "for people \\udc80"
    assert reports.directory.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o700
    assert names(reports.directory) == [ID]


def test_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CRUMPLEZONE_REPORTS", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert store.default_directory() == tmp_path / ".local/state/crumplezone/reports"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert store.default_directory() == Path("/state/crumplezone/reports")
    monkeypatch.setenv("CRUMPLEZONE_REPORTS", "~/mine")
    assert store.default_directory() == tmp_path / "mine"


def test_new_ids_are_in_utc_differ_and_are_valid(tmp_path: Path) -> None:
    now = datetime(2026, 11, 21, 7, 4, 11, tzinfo=timezone(timedelta(hours=1)))
    ids = {store.new_id(now) for _ in range(20)}
    assert len(ids) == 20
    for report_id in ids:
        assert report_id.startswith("20261121T060411Z-")
        Store(tmp_path).path(report_id)


def test_a_half_written_report_is_invisible(tmp_path: Path) -> None:
    plant(tmp_path, f".tmp-{ID}-1", schema.encode(full()))
    (tmp_path / "notes.txt").write_text("not a report")
    assert Store(tmp_path).list() == []
    with pytest.raises(ReportError, match="no report 2026"):
        Store(tmp_path).read("2026")


def test_a_taken_id_is_refused_and_leaves_the_first_report(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(), "first")
    with pytest.raises(ReportError, match="cannot be written"):
        reports.write(msgspec.structs.replace(full(), result="second"), "second")
    assert reports.read(ID) == full()
    assert names(tmp_path) == [ID]


def test_a_store_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports = Store(tmp_path / "file")
    with pytest.raises(ReportError, match="CRUMPLEZONE_REPORTS"):
        reports.write(full(), "")
    with pytest.raises(ReportError, match="--reports"):
        reports.list()


def test_a_report_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be encoded"):
        Store(tmp_path).write(msgspec.structs.replace(full(), result="\udc80"), "")
    assert names(tmp_path) == []


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
    plant(tmp_path, name, CORRUPT[name])
    found = {entry.id: entry for entry in reports.list()}
    assert found["good"].report == full("good")
    assert found[name].report is None
    assert "corrupt" in found[name].problem
    assert found[name].problem.isprintable()
    with pytest.raises(ReportError, match="corrupt"):
        reports.read(name)


def test_a_newer_report_asks_for_an_upgrade(tmp_path: Path) -> None:
    plant(tmp_path, "newer", NEWER)
    (entry,) = Store(tmp_path).list()
    assert entry.report is None
    assert "upgrade" in entry.problem
    with pytest.raises(ReportError, match="upgrade"):
        Store(tmp_path).read("newer")


def test_what_is_no_regular_file_of_a_sane_size_is_a_problem(tmp_path: Path) -> None:
    plant(tmp_path, "huge", b"")
    os.truncate(tmp_path / "huge" / "report.json", store.MAX_BYTES + 1)
    (tmp_path / "missing").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    problems = {entry.id: entry.problem for entry in Store(tmp_path).list()}
    assert "larger" in problems["huge"]
    assert "no report.json" in problems["missing"]
    assert "not a regular file" in problems["pipe"]
    assert problems["folder"]


def test_links_out_of_the_store_are_not_followed(tmp_path: Path) -> None:
    outside = Store(tmp_path / "outside")
    path = outside.write(full(), "")
    inside = tmp_path / "inside"
    (inside / "file").mkdir(parents=True)
    (inside / "file" / "report.json").symlink_to(path / "report.json")
    (inside / ID).symlink_to(path)
    for name in ("file", ID):
        with pytest.raises(ReportError, match="links are not followed"):
            Store(inside).read(name)
    assert [entry.report for entry in Store(inside).list()] == [None, None]


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "/etc", "a/b", ".tmp-x-1", "a\0b", "a\n", "\x1b[31m"])
def test_ids_that_could_lead_elsewhere_are_refused(tmp_path: Path, bad: str) -> None:
    reports = Store(tmp_path)
    for use in (reports.path, reports.read, lambda name: reports.write(full(name), "")):
        with pytest.raises(ReportError, match="not a report id") as caught:
            use(bad)
        assert str(caught.value).isprintable()
    assert names(tmp_path) == []


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


def test_newest_comes_first_even_within_a_second(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    second = "20261121T060411Z"
    order = [f"{second}-b", f"{second}-c", f"{second}-a", "20261121T060410Z-z"]
    for place, report_id in enumerate(order):
        path = reports.write(full(report_id), "")
        os.utime(path, ns=(0, 10 - place))
    assert [entry.id for entry in reports.list()] == order


def test_writers_at_once_and_a_reader_see_only_whole_reports(tmp_path: Path) -> None:
    reports = Store(tmp_path / "store")
    ids = [f"{i}-x" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(reports.write, full(report_id), "text") for report_id in ids]
        while not all(job.done() for job in written):
            assert all(entry.report for entry in reports.list())
    assert sorted(entry.id for entry in reports.list()) == sorted(ids)


def test_processes_that_fight_for_one_id_leave_one_whole_report(tmp_path: Path) -> None:
    reports = Store(tmp_path / "store")
    source = tmp_path / "report.json"
    source.write_bytes(schema.encode(full()))
    code = (
        "import sys; from pathlib import Path; from crumplezone.reports import schema, store;"
        "report = schema.decode(Path(sys.argv[1]).read_bytes());"
        "store.Store(Path(sys.argv[2])).write(report, 'text')"
    )
    command = [sys.executable, "-c", code, str(source), str(reports.directory)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    errors = [writer.communicate()[1] for writer in writers]
    assert sorted(writer.returncode for writer in writers) == [0, 1, 1, 1]
    assert sum(b"ReportError" in error for error in errors) == 3
    assert names(reports.directory) == [ID]
    assert reports.read(ID) == full()


def test_the_text_has_all_that_is_known() -> None:
    shown = text.render(full())
    for line in (
        "SIGSEGV (SEGV_MAPERR), read of address 0xdead in ggml_compute_forward_get_rows (",
        "get_rows (libggml-cpu.so+0x1234).",
        "It was serving a request on the native rung. Result: cured by safe.",
        "signal: SIGSEGV (11)",
        "trap: #PF",
        "decode (/app/run.py:7)",
        "8 worker: futex_wait (libgomp.so.1) < decode",
        "sequence 0: n=10, positions 0..9, outputs 1, tokens 100 101 102 103 ... 106 107 108 109",
        "sequence 3: n=2, positions 0..1, outputs 1, tokens 110 111",
        "sequences that crash alone: 3",
        "n_ctx: 512",
        "path: /models/tiny.gguf",
        "a log line",
        "timed out",
    ):
        assert line in shown
    titles = "Summary Fault Native Python Registers Batch Ladder Context Model Environment stderr Provenance"
    places = [shown.index(f"\n\n{title}") for title in titles.split()]
    assert places == sorted(places)
    assert sum(line.count("0x00000000") for line in shown.splitlines() if line.startswith("r0")) == 4


def test_no_string_of_a_report_can_write_to_a_terminal() -> None:
    shown = text.render(full(hostile=ESCAPE + "\n\r\u202e\x9b\udc80"))
    assert all(line.isprintable() for line in shown.split("\n"))
    assert r"\x1b[31m" in shown


def test_a_report_with_almost_nothing_and_one_with_lies_are_rendered() -> None:
    bare = Report("x", "", Evidence(exit=Exit.SIGNAL, pid=1))
    assert "(not recorded)" in text.render(bare)
    assert text.top_frame(bare) is None
    lies = msgspec.structs.replace(bare, batch=schema.BatchRecord([1, 2], [0], [], [True] * 9))
    assert "damaged" in text.render(lies)


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (Evidence(Exit.CLEAN, 1), "The cell stopped as asked."),
        (Evidence(Exit.SIGNAL, 1, returncode=-8), "signal 8."),
        (Evidence(Exit.ABORT, 1), "SIGABRT."),
        (
            Evidence(Exit.ABORT, 1, assertion=schema.Assertion("GGML_ASSERT(x) failed", "ggml", "ggml.c", 3)),
            "Aborted: GGML_ASSERT(x) failed at ggml.c:3.",
        ),
        (
            Evidence(Exit.HANG, 1, detail="after 5 s"),
            "did not reply within its deadline and was killed (after 5 s).",
        ),
        (Evidence(Exit.OOM, 1), "killed for memory."),
        (Evidence(Exit.KILLED, 1, fault=Fault(15, "SIGTERM")), "killed from outside by SIGTERM."),
        (Evidence(Exit.NATIVE_EXIT, 1, returncode=3), "exit() in the middle of a request with code 3."),
        (Evidence(Exit.FAILED_START, 1, phase="start"), "never became ready. It was starting"),
        (Evidence(Exit.PROTOCOL, 1, detail="short frame"), "and was killed (short frame)."),
    ],
)
def test_the_summary_names_each_exit(evidence: Evidence, expected: str) -> None:
    report = Report("x", "", evidence)
    assert expected in text.summary(report)
    assert text.summary(report) in text.render(report)


@pytest.mark.parametrize(
    "frame",
    [
        Frame("raise", "/lib/libpthread-2.31.so"),
        Frame("__pthread_kill"),
        Frame("ggml_abort", "/lib/libggml-base.so"),
        Frame("ffi_call_unix64", "/lib/libffi-1a2b.so.8.1.0"),
        Frame("_PyEval_EvalFrameDefault", "/usr/bin/python3.13"),
        Frame("cfunction_call", "/usr/bin/python3.13"),
        Frame("", "/lib/libpython3.13.so.1.0"),
        Frame("_ctypes_callproc", "/x/_ctypes.cpython-313-x86_64-linux-gnu.so"),
        Frame("memcpy@@GLIBC_2.14", "/lib/x86_64-linux-gnu/libc.so.6"),
        Frame("faulthandler_fatal_error"),
        Frame("__restore_rt"),
        Frame(offset="0x0"),
    ],
)
def test_the_top_frame_is_beyond_the_runtime(frame: Frame) -> None:
    other = Thread(2, native=[Frame("elsewhere", "libx.so")])
    report = Report(
        "x", "", Evidence(Exit.SIGNAL, 1, threads=[other, Thread(1, crashed=True, native=[frame, TOP])])
    )
    assert text.top_frame(report) == TOP


def test_list_and_show(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(hostile=ESCAPE), "not shown")
    plant(tmp_path, "broken", b"{")
    listed = CliRunner().invoke(app, ["list", "--reports", str(tmp_path)])
    assert listed.exit_code == 0
    assert all(line.replace("\t", "").isprintable() for line in listed.output.splitlines())
    cells = {line.split("\t")[0]: line.split("\t") for line in listed.output.splitlines()}
    assert cells[ID][1:3] == ["2026-11-21T06:04:11Z", "signal"]
    assert cells[ID][4] == "ggml_compute_forward_get_rows (libggml-cpu.so+0x1234)"
    assert "corrupt" in cells["broken"][-1]
    shown = CliRunner().invoke(app, ["show", ID[:10], "--reports", str(tmp_path)])
    assert shown.output == text.render(full(hostile=ESCAPE))


def test_an_empty_store_says_where_it_is(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["list"], env={"CRUMPLEZONE_REPORTS": str(tmp_path / "none")})
    assert f"No crash reports in {tmp_path / 'none'}" in listed.output


def test_an_unknown_report_is_an_error_for_main(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["show", "nothing", "--reports", str(tmp_path)])
    assert isinstance(shown.exception, ReportError)


def test_a_terminal_gets_a_table_and_markup_stays_text(tmp_path: Path) -> None:
    Store(tmp_path).write(full(hostile="[red]x[/nonsense]"), "")
    master, slave = pty.openpty()
    code = "from crumplezone.cli.triage import app; app()"
    command = [sys.executable, "-c", code, "list", "--reports", str(tmp_path)]
    env = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    child = subprocess.Popen(command, stdout=slave, env=env)
    os.close(slave)
    output = b""
    try:
        while piece := os.read(master, 65536):
            output += piece
    except OSError:  # Linux says EIO at the end of a terminal
        pass
    os.close(master)
    assert child.wait() == 0
    shown = output.decode()
    assert "top frame" in shown
    assert ID in shown
    assert "cured by safe[red]x[/nonsense]" in shown
