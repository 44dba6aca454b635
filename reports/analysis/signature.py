"""The signature of a crash: what makes two crashes the same."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from collections.abc import Iterator
from itertools import islice

import msgspec

from crumplezone.reports.analysis.frames import (
    REST_UNKNOWN,
    function,
    given,
    is_inlined,
    meaningful,
    module_name,
    name,
)
from crumplezone.reports.analysis.messages import base_name, parted
from crumplezone.reports.analysis.same import CUT
from crumplezone.reports.analysis.stack import crashed_thread
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Assertion, Evidence, Exit, Frame, Report, Signature, Thread

VERSION = 2
"""Of the algorithm. It is part of every id: raise it when the ids of most crashes change.

What changes few of them leaves it as it is, so that baselines and stores know all the others.
"""

_KEY_FRAMES = 3
_STACK_FRAMES = 64
_TEXT_MAX = 8 * 1024  # characters of faulthandler's text that are looked at
_PART_MAX = 512  # characters of one part of the key
_TITLE_MAX = 160

# Where the others ended is chance: memory runs out, and strangers kill, anywhere.
_HAVE_A_PLACE = {Exit.SIGNAL, Exit.ABORT, Exit.HANG}

_SIGNAL = re.compile(r"SIG[A-Z0-9+-]{2,12}")
# ggml.h: GGML_ASSERT(x) is GGML_ABORT("GGML_ASSERT(%s) failed", #x), so its numbers are those of the source.
_GGML_ASSERT = re.compile(r"GGML_ASSERT\(.*\) failed")
_VARYING = re.compile(
    r"(?<![A-Za-z_0-9])-?(?:0x[0-9a-fA-F]+|(?=[a-f]*[0-9])[0-9a-f]{8,}(?![A-Za-z_0-9])"
    r"|[0-9]+(?:\.[0-9]+)*(?:[eE][-+]?[0-9]+)?)"
)
_PYTHON_FRAME = re.compile(r'^  File "([^"\n]*)", line \d+ in ([^\n]+)$', re.MULTILINE)


def sign(report: Report) -> Signature:
    """Compute the signature of a report, of any content.

    Only the evidence counts. The id is the SHA-256 of the version of the algorithm, the fault class, and
    either the normalised assertion or the innermost three frames that have a name and are not part of a
    runtime. Inlined functions do not count: only debug information tells of them. A message that many places
    share ("double free or corruption", "fatal error", an exception's type) has its frames too.
    """
    evidence = report.evidence
    fault_class = _fault_class(evidence)
    asserted = _assertion(evidence.assertion)
    key, confidence = _place(report)
    if asserted.startswith("GGML_ASSERT("):
        key, confidence = [asserted], "high"
    elif asserted:
        key = [asserted, *key] if confidence == "high" else [asserted]
    encoded = json.dumps([VERSION, fault_class, *key], separators=(",", ":"))
    return Signature(
        id=hashlib.sha256(encoded.encode()).hexdigest(),
        fault_class=fault_class,
        key=key,
        title=_title(fault_class, key, asserted=bool(asserted)),
        confidence=confidence,
        version=VERSION,
        place=place(report),
    )


def signature_of(report: Report) -> Signature:
    """The signature of a report, also of one that is older than signatures or their places."""
    signed = report.signature or sign(report)
    return signed if signed.place else msgspec.structs.replace(signed, place=place(report))


def place(report: Report) -> str:
    """The innermost frame that counts, as a place in a build: "libllama.so+0x22daa0 BUILD-ID", or empty."""
    inner = next(iter(_counting(report)), None) if report.evidence.exit in _HAVE_A_PLACE else None
    if inner is None or not inner.build_id:
        return ""
    found = name(Frame(module=inner.module, offset=inner.offset))
    return _part(f"{found} {inner.build_id}") if found != module_name(inner.module) else ""


def frames(report: Report) -> list[str]:
    """The normalised stack of the thread that crashed or hangs, innermost first, at most 64 frames.

    Native frames without those of runtimes; if there are none, the Python frames.
    """
    thread = _thread(report)
    native = islice(meaningful(thread.native), _STACK_FRAMES) if thread else ()
    return [_part(name(frame)) for frame in native] or _python(report)


def _place(report: Report) -> tuple[list[str], str]:
    """The innermost frames, and how much they can be trusted."""
    if report.evidence.exit not in _HAVE_A_PLACE:
        return [], "low"
    native = list(_counting(report))
    if named := [part for frame in native if (part := function(frame))]:
        cut = [CUT] if len(named) < _KEY_FRAMES and _goes_on(report) else []
        return [_part(part) for part in named[:_KEY_FRAMES]] + cut, "high"
    if native:  # an offset differs from build to build
        return [_part(name(native[0]))], "low"
    return _python(report)[:_KEY_FRAMES], "low"


def _stack(report: Report) -> list[Frame]:
    """The native frames that a key can be made of."""
    thread = _thread(report)
    native = thread.native if thread else []
    # Which thread of a pool faults is chance. A hang is that of the thread that was called.
    return native if report.evidence.exit is Exit.HANG else list(given(native))


def _counting(report: Report) -> Iterator[Frame]:
    return (frame for frame in meaningful(_stack(report)) if not is_inlined(frame))


def _goes_on(report: Report) -> bool:
    """Whether the stack has frames that are not known, where the key would have them."""
    return any(frame.symbol == REST_UNKNOWN for frame in _stack(report)[-1:])


def _title(fault_class: str, key: list[str], *, asserted: bool) -> str:
    title = fault_class
    if key:
        title += f"{':' if asserted else ' in'} {key[0]}"
    return title if len(title) <= _TITLE_MAX else title[: _TITLE_MAX - 3] + "..."


def _fault_class(evidence: Evidence) -> str:
    if evidence.exit is not Exit.SIGNAL:
        return evidence.exit.value
    found = evidence.fault.name if evidence.fault else _signal_name(evidence.returncode)
    if found == "SIGABRT":
        return Exit.ABORT.value
    return found if _SIGNAL.fullmatch(found) else Exit.SIGNAL.value


def _signal_name(returncode: int | None) -> str:
    try:
        return signal.Signals(-(returncode or 0)).name
    except ValueError:
        return ""


def _assertion(assertion: Assertion | None) -> str:
    """The words without what differs from run to run, and their file: "GGML_ASSERT(x) failed (a.cpp)"."""
    if assertion is None:
        return ""
    text, _ = parted(assertion.text)
    asserted = _GGML_ASSERT.match(text)
    kept = asserted[0] if asserted else ""
    text = " ".join((kept + _VARYING.sub("N", text[len(kept) :])).split())
    file = base_name(assertion.file)
    return _part(f"{text} ({file})" if text and file else text)


def _python(report: Report) -> list[str]:
    thread = _thread(report)
    stack = thread.python[:_STACK_FRAMES] if thread else []
    if not stack:
        # faulthandler's block of the thread that died: "Current thread 0x... (most recent call first):".
        text = report.evidence.faulthandler[:_TEXT_MAX].partition("Current thread ")[2].partition("\n\n")[0]
        found = islice(_PYTHON_FRAME.finditer(text), _STACK_FRAMES)
        stack = [Frame(symbol=match[2], file=match[1]) for match in found]
    return [_part(f"{frame.symbol[:_PART_MAX]} ({base_name(frame.file)})") for frame in stack]


def _thread(report: Report) -> Thread | None:
    """The thread that crashed; for a hang the one stuck in native code: the main one, if it is there."""
    thread = crashed_thread(report)
    if report.evidence.exit is not Exit.HANG or (thread and any(meaningful(thread.native))):
        return thread
    # A thread without Python frames is a worker of the native code, which is idle rather than stuck.
    called = (each for each in report.evidence.threads[:_STACK_FRAMES] if each.python)
    return next((each for each in called if any(meaningful(each.native))), thread)


def _part(text: str) -> str:
    return printable(text[:_PART_MAX])[:_PART_MAX]
