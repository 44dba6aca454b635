"""What a replay adds to the verdict of the ladder."""

from __future__ import annotations

import pytest

from crumplezone.reports.analysis.verdict import from_ladder, verdict_after
from crumplezone.reports.records.report import Evidence, Exit, LadderStep, Outcome, Replay, VerdictKind
from tests.support.decoders import report_of

CURED = [LadderStep("native", Outcome.CRASHED, [0]), LadderStep("safe", Outcome.OK, [0])]
ALONE = [LadderStep("native", Outcome.CRASHED, [0]), LadderStep("safe", Outcome.CRASHED, [0])]


@pytest.mark.parametrize(
    ("steps", "exit_kind", "crashed", "refused", "kind"),
    [
        (CURED, Exit.SIGNAL, 0, 0, VerdictKind.FLAKY),
        (CURED, Exit.SIGNAL, 1, 0, VerdictKind.FLAKY),
        (CURED, Exit.SIGNAL, 1, 3, VerdictKind.FLAKY),
        (CURED, Exit.SIGNAL, 5, 0, VerdictKind.BATCH_ONLY),
        (CURED, Exit.SIGNAL, 2, 3, VerdictKind.BATCH_ONLY),  # none passed
        (CURED, Exit.SIGNAL, 0, 1, VerdictKind.BATCH_ONLY),  # a refusal is no pass
        ([], Exit.SIGNAL, 4, 0, VerdictKind.FLAKY),
        ([], Exit.SIGNAL, 5, 0, None),
        (ALONE, Exit.SIGNAL, 2, 0, VerdictKind.INPUT),
        (CURED, Exit.OOM, 2, 0, VerdictKind.ENVIRONMENT),
    ],
)
def test_a_crash_that_comes_now_and_then_is_flaky(
    steps: list[LadderStep], exit_kind: Exit, crashed: int, refused: int, kind: VerdictKind | None
) -> None:
    report = report_of(None, ladder=steps, blamed=[0], evidence=Evidence(exit_kind, 1))
    verdict = verdict_after(report, Replay("", 5, crashed, crashed, refused=refused))
    assert (verdict and verdict.kind) == kind
    if verdict and crashed and kind == VerdictKind.FLAKY:
        assert verdict.because == f"crashed {crashed} of 5 when repeated"


def crashed(*sequences: int, rung: str = "native") -> LadderStep:
    return LadderStep(rung, Outcome.CRASHED, list(sequences))


def done(*sequences: int, rung: str = "native") -> LadderStep:
    return LadderStep(rung, Outcome.OK, list(sequences))


@pytest.mark.parametrize(
    ("steps", "kind", "because"),
    [
        (
            [crashed(0, 1), done(0, 1)],
            VerdictKind.FLAKY,
            "all sequences together got past it in another cell",
        ),
        ([crashed(0, 1), crashed(0, 1), done(0, 1, 2)], VerdictKind.FLAKY, "all sequences together"),
        ([done(0, 1), crashed(0, 1), done(0), done(1)], VerdictKind.BATCH_ONLY, "in a smaller batch"),
        ([crashed(0, 1, 2), crashed(0, 1, 2), done(0, 1), done(2)], VerdictKind.BATCH_ONLY, "smaller batch"),
        (
            [crashed(0, 0), done(0), done(0)],
            VerdictKind.BATCH_ONLY,
            "got its result in a smaller",
        ),
        (
            [crashed(0, 1, 2), done(0, 1), crashed(2, rung="safe"), done(2, rung="token")],
            VerdictKind.BATCH_ONLY,
            "every sequence got its result on the rung token or in a smaller batch",
        ),
        ([crashed(0, 1), done(0)], None, ""),
        ([crashed(0, 1, 2), done(0, 1), crashed(2, rung="safe"), crashed(2, rung="token")], None, ""),
    ],
)
def test_what_prompts_that_went_on_have_shown(
    steps: list[LadderStep], kind: VerdictKind | None, because: str
) -> None:
    verdict = from_ladder(report_of(None, ladder=steps))
    assert (verdict and verdict.kind) == kind
    if verdict:
        assert because in verdict.because
