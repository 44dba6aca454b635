"""How a cell ended, and why it aborted: from the wait status and what was seen, never from one clue alone."""

from __future__ import annotations

import re
import signal

from crumplezone.reports.schema import Assertion, Exit, Fault
from crumplezone.sandbox.pressure import killed_for_memory

_GGML = re.compile(r"^(?P<file>[^\n]*?):(?P<line>\d+): (?P<text>.*)$", re.DOTALL)
_TERMINATE = re.compile(r"terminate called[^\n]*(?:\n\s*what\(\):[^\n]*)?")
_GLIBC = re.compile(
    r"\*\*\* [^\n]* \*\*\*: terminated|(?:double free|free\(\)|malloc|realloc|corrupted|munmap_chunk)[^\n]*"
)
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def fault_of(returncode: int) -> Fault | None:
    """The fatal signal as the wait status has it, for a cell that was not held."""
    if returncode >= 0:
        return None
    try:
        return Fault(-returncode, signal.Signals(-returncode).name)
    except ValueError:
        return Fault(-returncode, f"signal {-returncode}")


def classify(
    returncode: int, fault: Fault | None, phase: str, kills: tuple[dict[str, int], dict[str, int]]
) -> tuple[Exit, str]:
    """How a cell ended that nobody here ended, and what that rests on.

    Args:
        returncode: As in subprocess.
        fault: The fatal signal, if there was one.
        phase: "start" or "call".
        kills: The kernel's counters of OOM kills, at the cell's start and at its end.
    """
    if fault is None:
        if phase == "start":
            return Exit.FAILED_START, f"exited with status {returncode} before it was ready"
        return Exit.NATIVE_EXIT, f"exit({returncode}) in the middle of a request"
    if fault.signal == signal.SIGKILL and (counter := killed_for_memory(*kills)):
        before, after = kills[0].get(counter, 0), kills[1][counter]
        return Exit.OOM, f"SIGKILL, and the kernel's counter {counter} rose from {before} to {after}"
    if fault.signal in _FROM_OUTSIDE:
        return Exit.KILLED, f"{fault.name} that the supervisor did not send, and no OOM kill was counted"
    if fault.signal == signal.SIGABRT:
        return Exit.ABORT, ""
    return Exit.SIGNAL, ""


def assertion(note: str, stderr: str) -> Assertion | None:
    """Why a process aborted: ggml's own words, else what libstdc++ or glibc wrote to stderr."""
    if note:
        found = _GGML.match(note)
        if found:
            return Assertion(found["text"].strip(), "ggml", found["file"], int(found["line"]))
        return Assertion(note.strip(), "ggml")
    searches: tuple[tuple[str, re.Pattern[str]], ...] = (("terminate", _TERMINATE), ("glibc", _GLIBC))
    for source, pattern in searches:
        matches = pattern.findall(stderr)
        if matches:
            return Assertion(matches[-1].strip(), source)
    return None
