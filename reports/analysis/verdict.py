"""Whose fault a crash is: decided by what the ladder and a replay saw, never guessed."""

from __future__ import annotations

from collections import Counter

from crumplezone.reports.records.report import Exit, Outcome, Replay, Report, Verdict, VerdictKind

_ENVIRONMENT = {
    Exit.OOM: "the cell was killed for memory",
    Exit.KILLED: "the cell was killed by a signal that no native code raised",
    Exit.FAILED_START: "the cell never became ready",
}


def from_exit(report: Report) -> Verdict | None:
    """The verdict of the exit alone: the environment's fault, or None."""
    because = _ENVIRONMENT.get(report.evidence.exit)
    return Verdict(VerdictKind.ENVIRONMENT, because) if because else None


def from_ladder(report: Report) -> Verdict | None:
    """The verdict of the exit and the ladder, or None where they have shown nothing."""
    if known := from_exit(report):
        return known
    crashed = _sequences(report, Outcome.CRASHED)
    # A sequence that the safe rungs merely refused has failed, but was not seen to crash alone.
    alone = sorted(set(report.blamed) & _sequences(report, Outcome.CRASHED, "safe", "token"))
    if alone:
        some = ", ".join(map(str, alone[:8])) + (", ..." if len(alone) > 8 else "")
        return Verdict(VerdictKind.INPUT, f"sequence {some} crashed alone too")
    if crashed and crashed <= _sequences(report, Outcome.OK):
        if _went_on_together(report):
            return Verdict(VerdictKind.FLAKY, "all sequences together got past it in another cell")
        rungs = {step.rung for step in report.ladder if step.outcome == Outcome.OK}
        how = sorted(f"on the rung {rung}" for rung in rungs & {"safe", "token"})
        how += ["in a smaller batch"] if "native" in rungs else []
        return Verdict(VerdictKind.BATCH_ONLY, f"every sequence got its result {' or '.join(how)}")
    return None


def verdict_after(report: Report, replay: Replay) -> Verdict | None:
    """The verdict once a replay is known.

    Args:
        report: The crash.
        replay: What its batch did when it was repeated.
    """
    known = from_ladder(report)
    if known and known.kind == VerdictKind.ENVIRONMENT:  # a repetition meets another environment
        return known
    passed = replay.runs - replay.crashed - replay.refused
    if passed == replay.runs > 0:
        return Verdict(VerdictKind.FLAKY, f"passed {passed} of {replay.runs} when repeated")
    is_input = known is not None and known.kind == VerdictKind.INPUT
    if replay.crashed > 0 and passed > 0 and not is_input:
        return Verdict(VerdictKind.FLAKY, f"crashed {replay.crashed} of {replay.runs} when repeated")
    return known


def _went_on_together(report: Report) -> bool:
    """Whether all of each batch that crashed was done together later, by the native rung."""
    done: list[Counter[int]] = []
    for step in reversed(report.ladder):
        if step.rung != "native":
            return False
        batch = Counter(step.sequences)  # prompts that were submitted one by one have one number
        if step.outcome == Outcome.OK:
            done.append(batch)
        elif not any(batch <= each for each in done):
            return False
    return True


def _sequences(report: Report, outcome: Outcome, *rungs: str) -> set[int]:
    """Every sequence with such an outcome on one of these rungs (none given: on any)."""
    steps = (step for step in report.ladder if step.outcome == outcome and (not rungs or step.rung in rungs))
    return {sequence for step in steps for sequence in step.sequences}
