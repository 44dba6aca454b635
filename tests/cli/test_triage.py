"""`crumplezone triage`, as a user runs it: real crashes of a tiny model, real processes, a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from crumplezone import Batch, Decoder
from crumplezone.cli.output import write_out
from crumplezone.errors import ReportError
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.formats.text import render
from crumplezone.reports.records.report import Evidence, Exit, Frame, ModelRecord, Report, Thread
from crumplezone.reports.store.store import Store
from tests.support.cli import COMMAND, crumplezone, read_until
from tests.support.records.reports import ESCAPE, full, put

VERBS = ["list", "show", "group", "diff", "replay", "minimise", "script", "export", "html", "prune"]
ENCODE, ENCODE_AGAIN, ABORT, REDACTED = range(4)


@pytest.fixture(scope="module")
def crashes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Two segmentation faults of one signature, a failed assertion, and a redacted segmentation fault."""
    store = Store(tmp_path_factory.mktemp("crashes"))

    def record(job: Callable[[Decoder], object], **options: Any) -> None:
        given: dict[str, Any] = {
            "n_batch": 16,
            "n_threads": 1,
            "preflight": False,
            "reports": store.directory,
        }
        with Decoder(tiny, **given, **options) as decoder:
            job(decoder)

    def crash(decoder: Decoder) -> None:
        decoder.encode(Batch.of([[5, 6], [7]]))
        decoder.encode(Batch.of([[5, 6], [7, 8]]))
        decoder.decode(Batch.of([[*range(10, 20)], [*range(20, 30)]]))

    record(crash)
    record(lambda decoder: decoder.encode(Batch.of([[5], [7]])), redact=True)
    found = [store.read(row.id) for row in reversed(store.rows())]
    assert [report.evidence.exit for report in found] == [Exit.SIGNAL, Exit.SIGNAL, Exit.ABORT, Exit.SIGNAL]
    return found


@pytest.fixture
def cwd(tmp_path: Path, crashes: list[Report]) -> Path:
    """A directory with a store of its own, in which these crashes are."""
    store = Store(tmp_path / "reports")
    for report in crashes:
        store.write(report, render(report))
    return tmp_path


def triage(cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return crumplezone("triage", *arguments, cwd=cwd)


def refused(cwd: Path, *arguments: str | Path, code: int = 2) -> str:
    """What a run that is refused says."""
    done = triage(cwd, *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("crumplezone: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document that is all of stdout."""
    assert done.stdout.isascii(), done.stdout
    return json.loads(done.stdout)


def on_terminal(cwd: Path, columns: int, *arguments: str | Path) -> tuple[int, str]:
    """Run on a terminal so wide; returns the exit code and what was printed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    env["CRUMPLEZONE_REPORTS"] = str(cwd / "reports")
    command = [*COMMAND, "triage", *map(str, arguments)]
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=slave, stderr=slave) as child:
        os.close(slave)
        shown = read_until(master, b"")
    os.close(master)
    return child.returncode, shown.decode().replace("\r\n", "\n")


def test_help_lists_the_verbs_in_the_order_of_work_and_the_exit_codes(tmp_path: Path) -> None:
    shown = triage(tmp_path, "--help").stdout
    assert re.findall(r"^  (\w+)  +[A-Z]", shown, re.MULTILINE) == VERBS
    assert shown.count("...") == 1  # that of the usage: no summary is cut
    assert "Exit codes: 0 done; 1 the crash was not shown" in " ".join(shown.split())


def test_list_filters(cwd: Path, crashes: list[Report]) -> None:
    signature = crashes[ENCODE].signature
    assert signature is not None

    def listed(*filters: str) -> set[int]:
        ids = [row["id"] for row in document(triage(cwd, "list", "--json", *filters))]
        assert ids == [report.id for report in reversed(crashes) if report.id in ids]
        return {index for index, report in enumerate(crashes) if report.id in ids}

    assert listed() == {ENCODE, ENCODE_AGAIN, ABORT, REDACTED}
    assert listed("--exit", "abort") == {ABORT}
    assert listed("--signature", signature.id[:12]) == {ENCODE, ENCODE_AGAIN, REDACTED}
    assert listed("--verdict", "batch-only", "--since", "24h") == {ENCODE, ENCODE_AGAIN, ABORT, REDACTED}
    assert listed("--verdict", "input") == set()
    assert listed("--model", "TINY.gguf", "--exit", "signal") == {ENCODE, ENCODE_AGAIN, REDACTED}
    nothing = triage(cwd, "list", "--since", "2999-01-01")
    assert (nothing.returncode, nothing.stdout) == (0, "None of 4 reports meets these filters.\n")


def test_times_are_in_utc_wherever_it_runs(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead
    Store(cwd / "reports").write(replace(full(), crashed_at="2001-02-03T04:05:06Z"), "")
    lines = triage(cwd, "list", "--since", "2001-02-03T04:05").stdout.splitlines()
    assert any("2001-02-03T04:05:06Z" in line for line in lines)
    later = triage(cwd, "list", "--since", "2001-02-03T04:06").stdout.splitlines()
    assert len(later) == len(lines) - 1


def test_an_empty_store_is_no_error_for_lists_and_says_where_it_is(tmp_path: Path) -> None:
    assert document(triage(tmp_path, "list", "--json")) == []
    assert document(triage(tmp_path, "group", "--json")) == []
    assert document(triage(tmp_path, "prune", "--json")) == {"removed": [], "freed": 0, "unmet": []}
    for verb in ("list", "group"):
        assert "reports, which does not exist yet" in triage(tmp_path, verb).stdout
    for arguments in (["show", "x", "--json"], ["diff", "x", "y"], ["replay", "x"]):
        assert "does not exist yet. --reports names another" in refused(tmp_path, *arguments)


def test_ids_and_reports_that_are_no_good_are_explained(cwd: Path, crashes: list[Report]) -> None:
    store = cwd / "reports"
    put(store, "newer", b'{"schema_version": 99}')
    put(store, "corrupt", b"{")
    assert "no report nothing in" in refused(cwd, "show", "nothing")
    assert "is not a report id" in refused(cwd, "show", "../reports")
    assert "begins 4 report ids" in refused(cwd, "show", crashes[0].id[:2])
    assert "upgrade crumplezone" in refused(cwd, "export", "newer")
    assert "report.json is corrupt" in refused(cwd, "replay", "corrupt")
    assert "report.json is corrupt" in refused(cwd, "diff", "corrupt", crashes[0].id)
    assert "begins no id and no signature" in refused(cwd, "diff", "nothing", crashes[0].id)
    assert "\\x1b" in refused(cwd, "show", "\x1b[31m")
    lines = [line.split("\t") for line in triage(cwd, "list").stdout.splitlines()]
    problems = {line[0]: line[-1] for line in lines if line[2] == "unreadable"}
    assert sorted(problems) == ["corrupt", "newer"]
    assert "upgrade" in problems["newer"]
    assert "cannot be read" in triage(cwd, "group").stdout


def test_what_cannot_be_run_again_is_explained(cwd: Path, crashes: list[Report]) -> None:
    store = Store(cwd / "reports")
    lone = replace(crashes[ENCODE], id="lone", batch=None)
    gone = replace(crashes[ENCODE], id="gone", model=ModelRecord(str(cwd / "gone.gguf")))
    wild = replace(crashes[ENCODE], id="wild", context={"n_ctx": -1})
    for report in (lone, gone, wild):
        store.write(report, "")
    for verb in ("replay", "minimise", "script"):
        redacted = refused(cwd, verb, crashes[REDACTED].id)
        assert "this report is redacted" in redacted
        assert crashes[REDACTED].id in redacted
    assert "report lone: this report holds no batch" in refused(cwd, "replay", "lone")
    assert "report wild: context.n_ctx is -1" in refused(cwd, "minimise", "wild")
    vanished = refused(cwd, "script", "gone", code=3)
    assert "gone.gguf" in vanished
    assert "--model PATH names where the model is now" in vanished


def test_a_crash_is_replayed_minimised_scripted_and_exported(
    cwd: Path, crashes: list[Report], tiny: Path
) -> None:
    store, report = Store(cwd / "reports"), crashes[ENCODE]
    store.update(replace(report, model=ModelRecord(str(cwd / "elsewhere" / "moved.gguf"))))
    again = triage(cwd, "replay", report.id, "-n", "2", "--model", tiny)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": the recorded crash: SIGSEGV in ") == 2
    assert "\nreproduced 2 of 2\n" in again.stdout

    found = document(triage(cwd, "minimise", report.id, "--model", tiny, "--json"))
    assert (found["complete"], found["interrupted"]) == (True, False)
    assert (found["minimal"]["batch"]["seq_ids"], found["minimal"]["context"]["n_batch"]) == ([0], 1)
    assert "tokens: 3 to 1" in found["steps"]

    written = triage(cwd, "script", report.id, "--out", "crash.py", "--model", tiny)
    assert written.returncode == 0, written.stderr
    assert "wrote crash.py" in written.stderr
    assert "checked in a cell: the recorded crash: SIGSEGV in" in written.stderr
    quiet = triage(cwd, "script", report.id, "--out", "crash.py", "--model", tiny, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")

    assert triage(cwd, "export", report.id, "--format", "zip", "--out", "x.zip").returncode == 0
    with zipfile.ZipFile(cwd / "x.zip") as archive:
        attached = archive.read("reproduce.py").decode()
    assert "else 'moved.gguf'" in attached  # no directory of this machine
    assert len(re.findall(r"^    \(\d+, 0, 0, 1\),$", attached, re.MULTILINE)) == 1

    kept = store.read(report.id)
    assert [(each.runs, each.same) for each in kept.replays] == [(2, 2)]
    assert kept.minimal is not None
    assert kept.signature == report.signature


def test_a_crash_that_does_not_come_again_is_exit_code_1(cwd: Path, crashes: list[Report]) -> None:
    store, report = Store(cwd / "reports"), crashes[ENCODE]
    assert report.batch is not None
    store.update(replace(report, batch=replace(report.batch, operation="decode")))
    again = triage(cwd, "replay", report.id, "-n", "1", "--json")
    assert again.returncode == 1, again.stderr
    found = document(again)
    assert [run["outcome"] for run in found["runs"]] == ["ok"]
    assert (found["replay"]["crashed"], found["replay"]["same"]) == (0, 0)
    assert found["verdict"]["kind"] == "flaky"
    written = triage(cwd, "script", report.id)
    assert (written.returncode, "import llama_cpp" in written.stdout) == (1, True)
    assert written.stderr == "checked in a cell: no crash here\n"
    other = replace(crashes[ABORT].evidence, assertion=None, threads=[])
    store.update(replace(crashes[ABORT], evidence=other, signature=None))
    again = triage(cwd, "replay", crashes[ABORT].id, "-n", "1")
    assert again.returncode == 1, again.stderr
    assert "run 1: another crash: abort: GGML_ASSERT" in again.stdout
    assert "reproduced 0 of 1; 1 crashed otherwise" in again.stdout


def test_ctrl_c_keeps_the_smallest_so_far(cwd: Path, crashes: list[Report]) -> None:
    report = crashes[ABORT]
    assert report.batch is not None
    master, slave = pty.openpty()
    env = {**os.environ, "CRUMPLEZONE_REPORTS": str(cwd / "reports")}
    command = [*COMMAND, "triage", "minimise", report.id]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=slave, text=True) as child:
        os.close(slave)
        begun = read_until(master, b" tests: ")
        child.send_signal(signal.SIGINT)
        said = (begun + read_until(master, b"")).decode()
        assert child.stdout is not None
        shown = child.stdout.read()
    os.close(master)
    assert child.returncode == 130, said
    assert "interrupted: the best so far is kept in the report" in said
    assert "Traceback" not in said
    assert "minimal: decode of " in shown
    minimal = Store(cwd / "reports").read(report.id).minimal
    assert minimal is not None
    assert 16 < len(minimal.batch.tokens) < len(report.batch.tokens)  # 17 are the fewest that crash so


def test_a_search_without_any_gain_keeps_nothing(cwd: Path, crashes: list[Report]) -> None:
    done = triage(cwd, "minimise", crashes[ABORT].id, "--tests", "3")
    assert (done.returncode, done.stdout) == (0, "measured: crashed 3 of 3\n")
    assert (
        done.stderr == "all 3 tests are used up: nothing smaller was found yet; something smaller may exist\n"
    )
    assert Store(cwd / "reports").read(crashes[ABORT].id).minimal is None


def test_diff_of_reports_and_of_groups(cwd: Path, crashes: list[Report]) -> None:
    one, two, abort, redacted = crashes
    found = document(triage(cwd, "diff", one.id, two.id, "--json"))
    assert (found["a"]["id"], found["a"]["group_size"], found["same_signature"]) == (one.id, 0, True)
    assert {"section": "batch", "name": "tokens", "a": "3", "b": "4"} in found["differences"]
    assert {line["side"] for line in found["frames"]} == {"both"}
    assert one.signature is not None
    assert abort.signature is not None
    of_groups = triage(cwd, "diff", one.signature.id[:8], abort.signature.id)
    assert of_groups.stdout.startswith(f"- {redacted.id} SIGSEGV in ")
    assert "(the latest in full of a group of 3)\n+ " in of_groups.stdout
    assert "\n  exit: signal -> abort\n" in of_groups.stdout
    assert "\n- llama_encode\n" in of_groups.stdout
    assert "\n+ llama_decode\n" in of_groups.stdout


def test_near_duplicates_come_after_their_group(tmp_path: Path) -> None:
    stacks = {"one": "abcdef", "two": "abcdef", "other": "zyxwvu", "near": "abxdef"}
    for name, letters in stacks.items():
        native = [Frame(f"frame_{letter}", "/lib/libx.so") for letter in letters]
        evidence = Evidence(Exit.ABORT, 1, threads=[Thread(1, crashed=True, native=native)])
        report = Report(name, "2026-11-21T06:04:11Z", evidence)
        Store(tmp_path / "reports").write(replace(report, signature=sign(report)), "")
    found = document(triage(tmp_path, "group", "--json"))
    frequent = found[0]["signature"]
    named = [(each["latest"], each["near_duplicate_of"]) for each in found]
    assert named == [("two", None), ("near", frequent), ("other", None)]
    lines = [line.split("\t") for line in triage(tmp_path, "group").stdout.splitlines()]
    assert [line[-1] for line in lines] == ["-", frequent[:12], "-"]
    _, table = on_terminal(tmp_path, 200, "group")
    assert f"(near-duplicate of {frequent[:12]})" in table


def test_prune_says_what_it_did(cwd: Path, crashes: list[Report]) -> None:
    done = triage(cwd, "prune", "--count", "1")
    assert done.returncode == 0
    assert done.stdout.startswith("removed 2 reports, ")
    assert "2 reports are left, more than 1: the first of a signature is never removed" in done.stderr
    counted = {each["signature"]: each["count"] for each in document(triage(cwd, "group", "--json"))}
    signature = crashes[ENCODE].signature
    assert signature is not None
    assert counted[signature.id] == 3  # those removed included
    assert "--age is 'week'" in refused(cwd, "prune", "--age", "week")


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_fit_the_terminal_and_nothing_can_act_on_it(cwd: Path, columns: int) -> None:
    hostile = full("hostile", ESCAPE)
    thread = Thread(
        7, crashed=True, native=[Frame(f"evil{ESCAPE}::\u202ename", "/lib/libx.so", offset="0x1")]
    )
    hostile = replace(hostile, evidence=replace(hostile.evidence, threads=[thread], exit=Exit.ABORT))
    Store(cwd / "reports").write(replace(hostile, signature=sign(hostile)), "")
    for verb, header in (("list", "crash and top frame"), ("group", "first, last seen")):
        code, shown = on_terminal(cwd, columns, verb)
        lines = shown.splitlines()
        assert code == 0
        assert header in lines[0]
        assert max(map(len, lines)) <= columns
        assert all(line.isprintable() for line in lines)
        assert "evil" in shown
        assert ("result" in lines[0] or "llama.cpp" in lines[0]) == (columns == 200)
    code, shown = on_terminal(cwd, columns, "show", "hostile")
    assert (code, "\x1b" in shown, "\\x1b]0;owned" in shown) == (0, False, True)


def test_a_zip_is_not_written_to_a_terminal(cwd: Path, crashes: list[Report]) -> None:
    code, shown = on_terminal(cwd, 200, "export", crashes[0].id, "--format", "zip")
    assert (code, "must name a file for a zip" in shown, "PK" in shown) == (2, True, False)


def test_a_reader_that_goes_away_is_no_error(cwd: Path, crashes: list[Report]) -> None:
    env = {**os.environ, "CRUMPLEZONE_REPORTS": str(cwd / "reports")}
    command = [*COMMAND, "triage", "show", "--json", crashes[0].id]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, bufsize=0) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(2) == b"{\n"  # the report is longer than a pipe is deep
        child.stdout.close()
        assert child.stderr.read() == b""


def test_a_narrow_encoding_is_no_error(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    Store(cwd / "reports").write(full("snow", " \u2603"), "")
    shown = triage(cwd, "show", "snow")
    assert (shown.returncode, "\\u2603" in shown.stdout, shown.stderr) == (0, True, "")


def test_export_writes_each_format_and_redacts(cwd: Path, crashes: list[Report]) -> None:
    report = crashes[ENCODE]
    assert report.model is not None
    secret = str(Path(report.model.path).parent)
    plain = triage(cwd, "export", report.id, "--format", "json")
    assert secret in plain.stdout
    redacted = triage(cwd, "export", report.id, "--format", "json", "--redact")
    assert (document(redacted)["redacted"], secret in redacted.stdout) == (True, False)
    issue = triage(cwd, "export", report.id).stdout
    assert issue.startswith("# `SIGSEGV in ")
    assert "import llama_cpp" in issue
    assert secret not in issue.partition("## Python stack")[0]
    assert document(triage(cwd, "export", report.id, "--format", "sarif"))["version"] == "2.1.0"
    assert "cannot be written: No such file" in refused(cwd, "export", report.id, "--out", "no/such/file")


def test_out_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_out(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    write_out(Path("/dev/null"), b"new")
    assert not Path("/dev/null").is_file()
    with pytest.raises(ReportError, match="cannot be written: Is a directory"):
        write_out(tmp_path, b"")
