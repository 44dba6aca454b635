"""The text of a report, and `crumplezone triage`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from crumplezone.cli.triage.verbs import app
from crumplezone.errors import ReportError
from crumplezone.reports.analysis.stack import top_frame
from crumplezone.reports.formats import text
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Evidence, Exit, Fault, Frame, Report, Thread
from crumplezone.reports.store.store import Store
from tests.support.records.reports import ESCAPE, ID, TOP, full, put


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
    assert top_frame(bare) is None
    lies = msgspec.structs.replace(bare, batch=schema.BatchRecord([1, 2], [0], [], [True] * 9))
    assert "damaged" in text.render(lies)


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
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
    assert top_frame(report) == TOP


def test_list_and_show(tmp_path: Path) -> None:
    reports = Store(tmp_path)
    reports.write(full(hostile=ESCAPE), "not shown")
    put(tmp_path, "broken", b"{")
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
    code = "from crumplezone.cli.triage.verbs import app; app()"
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
