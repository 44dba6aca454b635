"""What a job gives back."""

from __future__ import annotations

from enum import StrEnum
from itertools import accumulate

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, SequenceError
from crumplezone.workers.batch.call import Rows
from crumplezone.workers.batch.columns import Columns, Int32


class Rung(StrEnum):
    """One way to run a job, fastest first."""

    NATIVE = "native"  # all sequences in one native call
    SAFE = "safe"  # one sequence at a time, split at n_batch
    TOKEN = "token"  # one token at a time  # noqa: S105 - a rung, not a secret


class SequenceResult(msgspec.Struct, frozen=True):
    """One sequence's rows, or the error with which it failed alone.

    Attributes:
        seq_id: The sequence.
        positions: int32, shape (n_outputs,): of its outputs.
        rows: A row for each of these.
        rung: What produced it, or finally refused it.
        error: Why it failed.
    """

    seq_id: int
    positions: Int32
    rows: Rows | None
    rung: Rung
    error: SequenceError | None = None


def share_out(columns: Columns, rows: Rows) -> list[SequenceResult]:
    """Cut the rows of a whole batch into those of its sequences."""
    wanted = columns.outputs.tolist()
    places = list(accumulate(wanted, initial=0))  # of each output among the rows
    found: dict[int, list[int]] = {}
    for i, seq_id in zip(columns.owners.tolist(), columns.seq_ids.tolist(), strict=True):
        mine = found.setdefault(seq_id, [])
        if wanted[i]:
            mine.append(places[i])
    positions = columns.positions[columns.outputs]
    results = []
    for seq_id, mine in found.items():
        cut = _as_slice(mine)
        logits = None if rows.logits is None else rows.logits[cut]
        embeddings = None if rows.embeddings is None else rows.embeddings[cut]
        results.append(SequenceResult(seq_id, positions[cut], Rows(logits, embeddings), Rung.NATIVE))
    return results


def _as_slice(places: list[int]) -> list[int] | slice:
    """The same rows; as a slice, which copies nothing, where they lie side by side."""
    begin, end = (places[0], places[-1] + 1) if places else (0, 0)
    return slice(begin, end) if places == list(range(begin, end)) else places


class Result:
    """Rows of a batch, asked by sequence and position.

    Attributes:
        reports: Directories of the crash reports of this job; complete once `Decoder.close` returns.
        note: Why the native rung was not taken, or an empty string.
    """

    def __init__(self, sequences: list[SequenceResult], reports: list[str], note: str = "") -> None:
        self._sequences = {each.seq_id: each for each in sequences}
        self.reports, self.note = reports, note

    @property
    def seq_ids(self) -> list[int]:
        """The sequences of the batch."""
        return list(self._sequences)

    @property
    def errors(self) -> dict[int, SequenceError]:
        """The sequences that failed alone."""
        return {i: each.error for i, each in self._sequences.items() if each.error}

    def rung(self, seq_id: int) -> Rung:
        """The rung that produced (or finally refused) a sequence."""
        return self._sequence(seq_id).rung

    def logits(self, seq_id: int, pos: int = -1) -> npt.NDArray[np.float32]:
        """Logits of one output, float32, shape (n_vocab,); a view of what this result holds.

        Args:
            seq_id: The sequence.
            pos: Position of a token marked as output; -1 is the sequence's last output.

        Raises:
            SequenceError: This sequence failed alone.
            InputError: It is not in the batch, or the token was not an output.
        """
        return self._row(self._rows(seq_id).logits, seq_id, pos)

    def embeddings(self, seq_id: int, pos: int = -1) -> npt.NDArray[np.float32]:
        """Hidden state of one output, float32, shape (n_embd,). Arguments and errors as `logits`."""
        return self._row(self._rows(seq_id).embeddings, seq_id, pos)

    def _sequence(self, seq_id: int) -> SequenceResult:
        if seq_id not in self._sequences:
            raise InputError("seq_id", seq_id, f"the batch had the sequences {self.seq_ids}")
        return self._sequences[seq_id]

    def _rows(self, seq_id: int) -> Rows:
        sequence = self._sequence(seq_id)
        if sequence.error:
            raise sequence.error
        assert sequence.rows is not None
        return sequence.rows

    def _row(self, rows: npt.NDArray[np.float32] | None, seq_id: int, pos: int) -> npt.NDArray[np.float32]:
        if rows is None:
            raise InputError("result", "missing", "this was not asked for: pass embeddings=True to decode")
        outputs = self._sequence(seq_id).positions
        found = range(len(outputs)) if pos == -1 else np.flatnonzero(outputs == pos).tolist()
        if pos < -1 or not found:
            raise InputError("pos", pos, f"sequence {seq_id} has outputs at {outputs.tolist()}")
        row: npt.NDArray[np.float32] = rows[found[-1]]
        return row
