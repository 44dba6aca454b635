"""Recorded crashes, reduced to the least that still crashes so."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from crumplezone import Batch, Decoder
from crumplezone.diagnostics.replay.minimise import Minimised, minimise
from crumplezone.diagnostics.replay.replay import replay
from crumplezone.reports.records.report import BatchRecord, Generating, Held
from crumplezone.workers.native.memory import spans
from crumplezone.workers.protocol.arrays import BatchArrays
from tests.support.decoders import CONTEXT, Dose, Record, batch_of, columns, report_of
from tests.support.native import decode_poison as poison
from tests.support.native.decode_poison import Poison


class EverySecondCell(poison.PoisonCell):
    """Dies in every second call: of a file that each death makes and the next call takes away."""

    def _dies(self, poison: Poison, _: BatchArrays) -> bool:
        marker = Path(poison.once)
        if marker.exists():
            marker.unlink()
            return False
        marker.touch()
        return True


class FullMemoryCell(poison.PoisonCell):
    """Dies only if there is something in its memory."""

    def _dies(self, poison: Poison, sent: BatchArrays) -> bool:
        (span,) = spans(self.memory, [0])
        return span.last >= 0 and super()._dies(poison, sent)


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


def test_what_was_held_goes_in_front_of_the_batch(tiny: Path, record: Record) -> None:
    def crash(decoder: Decoder) -> None:
        decoder.decode(Batch.of([[4, 5]]))
        decoder.decode(Batch.of([[9] * 3]))

    (report,) = record(tiny, crash, n_batch=2, n_seq=1)
    assert report.batch is not None
    assert report.batch.held == [Held(0, [4, 5], [0, 1])]
    assert report.batch.positions == [2, 3, 4]
    least = minimise(report)
    assert least.report.batch is not None
    assert least.report.batch.held == []
    tokens, positions, seq_ids, outputs = columns(least.report)
    assert (len(tokens), positions, seq_ids, any(outputs)) == (2, [0, 1], [0, 0], False)
    assert "held tokens: 2 to 0" in least.steps
    assert replay(least.report, 1).replay.same == 1


def test_what_must_be_held_stays(tiny: Path, record: Record, dose: Dose) -> None:
    dose(Poison(token=99), "tests.diagnostics.replay.test_minimise:FullMemoryCell")

    def crash(decoder: Decoder) -> None:
        decoder.decode(Batch.of([[4, 5]]))
        decoder.decode(Batch.of([[99, 9]]))

    written = record(tiny, crash, n_seq=1)
    least = minimise(written[0])
    assert least.report.batch is not None
    assert columns(least.report) == ([99], [2], [0], [False])
    assert least.report.batch.held == [Held(0, [4, 5], [0, 1])]
    assert replay(least.report, 1).replay.same == 1


def test_null_and_shared_tokens(tiny: Path) -> None:
    """Of several NULLs the first one is enough, and none need be shared."""
    batch = replace(batch_of([4, 5], [6]), shared={"1": [1]}, nulls=["logits", "seq_id[1]", "seq_id[2]"])
    report = report_of(batch, str(tiny))
    crash = replay(report, 1).runs[0].evidence
    assert crash is not None
    least = minimise(replace(report, evidence=crash))
    assert least.report.batch is not None
    assert least.report.batch.shared == {}
    assert least.report.batch.nulls == ["seq_id[0]"]
    assert len(least.report.batch.tokens) == 1


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
    dose(Poison(once=str(marker)), "tests.diagnostics.replay.test_minimise:EverySecondCell")
    (report,) = record(tiny, lambda decoder: decoder.decode(Batch.of([[4, 5]])), n_seq=1, spares=0)
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
