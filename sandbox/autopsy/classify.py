"""How a cell ended, and why it aborted: from the wait status and what was seen, never from one clue alone."""

from __future__ import annotations

import re
import signal

from crumplezone.reports.records.report import Assertion, Exit, Fault
from crumplezone.sandbox.process.cgroup import killed_for_memory

TAKEN = (
    "its exit status is not known: it went with the zygote, or was taken by somebody else (SIGCHLD is "
    "ignored here, or any child waited for)"
)
_BY_NATIVE_CODE = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
_WHEN = {"idle": "while it waited", "run": "called by native code"}

_GGML = re.compile(r"^(?P<file>[^\n]*?):(?P<line>\d+): (?P<text>.*)$", re.DOTALL)
_LAST_LINES = 20  # of stderr: before them, what looks like a reason was none
# ggml.c, ggml_abort: FILE:LINE: TEXT
_GGML_STDERR = re.compile(r"^\S+\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm):\d+: [^\n]+$", re.MULTILINE)
# libstdc++, vterminate.cc
_TERMINATE = re.compile(
    r"^terminate called (?:recursively|without an active exception|after throwing an instance of [^\n]+"
    r"(?:\n  what\(\):[^\n]*)?)",
    re.MULTILINE,
)
# glibc, fortify_fail.c and malloc.c
_GLIBC = re.compile(
    r"^(?:\*\*\* [^\n]{1,80} \*\*\*: terminated"
    r"|(?:double free or corruption|(?:free|malloc|malloc_consolidate|realloc|munmap_chunk)\(\):"
    r"|corrupted (?:size vs\. prev_size|double-linked list|unsorted chunks))[\w .,:!()<>/-]{0,80})$",
    re.MULTILINE,
)


def fault_of(returncode: int | None) -> Fault | None:
    """The fatal signal as the wait status has it, for a cell that was not held."""
    if returncode is None or returncode >= 0:
        return None
    try:
        return Fault(-returncode, signal.Signals(-returncode).name)
    except ValueError:
        return Fault(-returncode, f"signal {-returncode}")


def classify(
    returncode: int | None,
    fault: Fault | None,
    phase: str,
    kills: tuple[dict[str, int], dict[str, int]],
    pid: int,
) -> tuple[Exit, str]:
    """How a cell ended that nobody here ended, and what that rests on.

    Args:
        returncode: As in subprocess; None if nobody can tell it any more.
        fault: The fatal signal, if there was one.
        phase: "start", "call", "idle" or "run".
        kills: The kernel's counters of OOM kills, at the cell's start and at its end.
        pid: The cell's process id.
    """
    if fault is None and returncode is not None:
        if phase == "start":
            return Exit.FAILED_START, f"exited with status {returncode} before it was ready"
        when = _WHEN.get(phase, "in the middle of a request")
        return Exit.NATIVE_EXIT, f"exit({returncode}) {when}"
    by_kill = fault is None or fault.signal == signal.SIGKILL
    if by_kill and (counter := killed_for_memory(*kills)):
        before, after = kills[0].get(counter, 0), kills[1][counter]
        how = TAKEN if fault is None else fault.name
        return Exit.OOM, f"{how}, and the kernel's counter {counter} rose from {before} to {after}"
    if fault is None:
        return Exit.FAILED_START if phase == "start" else Exit.KILLED, TAKEN
    return _by_signal(fault, pid)


def was_sent(fault: Fault, pid: int) -> bool:
    """Whether another process is known to have sent the signal that this one met."""
    return fault.sender_pid not in {None, pid}


def _by_signal(fault: Fault, pid: int) -> tuple[Exit, str]:
    if was_sent(fault, pid):
        sender = f"process {fault.sender_pid}" if fault.sender_pid else "a process outside of this namespace"
        return Exit.KILLED, f"{fault.name} sent by {sender} of user {fault.sender_uid}"
    if fault.signal not in _BY_NATIVE_CODE:
        oom = ", and no OOM kill was counted" if fault.signal == signal.SIGKILL else ""
        return Exit.KILLED, f"{fault.name} that the supervisor did not send{oom}"
    return Exit.ABORT if fault.signal == signal.SIGABRT else Exit.SIGNAL, ""


def assertion(note: str, stderr: str) -> Assertion | None:
    """Why a process aborted: ggml's own words, else what libstdc++ or glibc wrote to stderr last.

    Args:
        note: What ggml gave to its abort callback, if there was one; else it writes that to stderr.
        stderr: The end of what the process wrote.
    """
    if note:
        return _by_ggml(note)
    last = "\n".join(stderr.split("\n")[-_LAST_LINES:])
    searches = (("ggml", _GGML_STDERR, last), ("terminate", _TERMINATE, stderr), ("glibc", _GLIBC, last))
    # The last of them is the reason: none of these lets a process go on. Counted from the end.
    found = [
        (found.start() - len(text), source, found[0])
        for source, pattern, text in searches
        for found in pattern.finditer(text)
    ]
    _, source, text = max(found, default=(0, "", ""))
    if source == "ggml":
        return _by_ggml(text)
    return Assertion(text.strip(), source) if source else None


def _by_ggml(note: str) -> Assertion:
    found = _GGML.match(note)
    if found:
        return Assertion(found["text"].strip(), "ggml", found["file"], int(found["line"]))
    return Assertion(note.strip(), "ggml")
