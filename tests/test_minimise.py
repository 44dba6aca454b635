"""Recorded crashes, reduced to the least that still crashes so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from crumplezone import Batch
from crumplezone.diagnostics.minimise import Minimised, minimise
from crumplezone.diagnostics.replay import replay
from crumplezone.reports.schema import (
    BatchRecord,
    Generating,
)
from tests import poison
from tests.poison import Poison
from tests.support import CONTEXT, Dose, Record, batch_of, columns, report_of


class EverySecondCell(poison.PoisonCell):
    """Dies in every second call: of a file that each death makes and the next call takes away."""

    def _dies(self, poison: Poison, _: list[Any]) -> bool:
        marker = Path(poison.once)
        if marker.exists():
            marker.unlink()
            return False
        marker.touch()
        return True


def test_two_sequences_that_only_crash_together(tiny: Path, record: Record, dose: Dose) -> None:
    dose(Poison(token=99, min_sequences=2))
    sequences = [[4, 5], [7, 8, 9], [11, 99, 13]]
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of(sequences)))
    least = minimise(report)
    tokens, positions, seq_ids, outputs = columns(least.report)
    assert 99 in tokens
    assert (len(tokens), positions, seq_ids, outputs) == (2, [0, 0], [0, 1], [False, False])
    assert least.report.context["n_seq_max"] == 2
    assert replay(least.report, 1).replay.same == 1


def test_a_generation_is_reduced_to_one_prompt_token(tiny: Path, dose: Dose) -> None:
    dose(Poison(token=99))
    batch = BatchRecord(
        [],
        [],
        [],
        [],
        "generate",
        64,
        generating=[Generating(0, [1, 5, 6], 20), Generating(3, [1, 99, 7], 20)],
    )
    report = report_of(batch, str(tiny), context=CONTEXT | {"n_seq_max": 4, "n_ctx": 1024})
    crash = replay(report, 1).runs[0].evidence
    assert crash is not None
    least = minimise(replace(report, evidence=crash))
    assert least.report.batch is not None
    assert least.report.batch.generating == [Generating(0, [99], 20)]
    assert least.report.context["n_seq_max"] == 1


def test_a_flaky_crash_is_measured_and_tried_often_enough(
    tiny: Path, record: Record, dose: Dose, tmp_path: Path
) -> None:
    marker = tmp_path / "every second"
    dose(Poison(once=str(marker)), "tests.test_minimise:EverySecondCell")
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of([[4, 5]])), n_seq=1)
    marker.unlink(missing_ok=True)

    def stop(_: Minimised) -> None:
        raise KeyboardInterrupt

    least = minimise(report, on_progress=stop)
    assert (least.crashed, least.measured) == (5, 10)
    assert columns(least.report)[0] == [4]
    assert least.tests <= 12


def test_a_search_ends_with_its_tests(tiny: Path, dose: Dose) -> None:
    dose(Poison(token=99))
    report = report_of(batch_of([4, 5, 6, 7], [8, 99, 9, 10]), str(tiny))
    crash = replay(report, 1).runs[0].evidence
    assert crash is not None
    least = minimise(replace(report, evidence=crash), tests_max=6)
    assert (least.complete, least.tests, least.measured) == (False, 6, 3)
    assert columns(least.report) == ([8, 99, 9, 10], [0, 1, 2, 3], [1, 1, 1, 1], [False, False, False, True])
