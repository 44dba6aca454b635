"""The crashed thread of a report, its top frame, and the names of frames and signals."""

from __future__ import annotations

from pathlib import PurePosixPath

from crumplezone.reports.analysis.frames import meaningful
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Frame, Report, Thread


def crashed_thread(report: Report) -> Thread | None:
    """The thread that crashed; for a hang or a kill, where none did, the main thread."""
    threads = report.evidence.threads
    for thread in threads:
        if thread.crashed:
            return thread
    return next((thread for thread in threads if thread.tid == report.evidence.pid), None)


def top_frame(report: Report) -> Frame | None:
    """The innermost native frame of the crashed thread that is not part of a runtime, or None."""
    thread = crashed_thread(report)
    return next(meaningful(thread.native), None) if thread else None


def frame_name(frame: Frame) -> str:
    """A frame in one line: ``ggml_add (libggml.so+0x12)``, ``run (decoder.py:7)``."""
    module = PurePosixPath(frame.module).name
    place = f"{module}+{frame.offset}" if frame.offset else module
    if frame.file:
        line = f"{frame.file}:{frame.line}" if frame.line else frame.file
        place = f"{place} {line}".strip()
    return printable(f"{frame.symbol} ({place})" if frame.symbol and place else frame.symbol or place or "??")


def signal_name(report: Report) -> str:
    """The fatal signal ("SIGSEGV"), or empty if none is known."""
    evidence = report.evidence
    if evidence.fault:
        return printable(evidence.fault.name)
    code = evidence.returncode
    return f"signal {-code}" if code is not None and code < 0 else ""
