"""Stacks in a form in which two unwinders can be compared."""

from __future__ import annotations

from crumplezone.reports.analysis.frames import function, interrupted, is_inlined
from crumplezone.reports.records.report import Frame
from crumplezone.sandbox.autopsy import autopsy


def comparable(frames: list[Frame]) -> list[tuple[str, ...]]:
    """Function, file, build and offset of each frame that is not debug information's alone."""
    return [(function(f), f.module, f.build_id, f.offset) for f in frames if not is_inlined(f)]


def by_pystack(seen: autopsy._Seen) -> list[Frame]:
    """The crashed thread's stack, as the signal found it."""
    assert seen.frame is not None
    (native,) = [thread.native for thread in seen.stacks if thread.tid == seen.frame.tid]
    return interrupted(native)
