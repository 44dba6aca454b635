"""What a replay adds to the verdict of the ladder."""

from __future__ import annotations

import pytest

from crumplezone.reports.analysis.verdict import verdict_after
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
