"""Crash reports to test with."""

from __future__ import annotations

from pathlib import Path

from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Evidence, Exit, Fault, Frame, Report, Step, Thread

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


def put(directory: Path, report_id: str, data: bytes) -> None:
    """Put a report.json into a store by hand."""
    (directory / report_id).mkdir(parents=True)
    (directory / report_id / "report.json").write_bytes(data)
