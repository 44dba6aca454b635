"""What a job gives back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CrumplezoneError, InputError, SequenceError
from crumplezone.workers.calls import Rows
from crumplezone.workers.columns import Columns, Int32


class Rung(StrEnum):
    """One way to run a job, fastest first."""

    NATIVE = "native"  # all sequences in one native call
    SAFE = "safe"  # one sequence at a time, split at n_batch
    TOKEN = "token"  # one token at a time  # noqa: S105 - a rung, not a secret


@dataclass(frozen=True)
class Sampling:
    """How to sample: ``temperature`` 0 is greedy."""

    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class SequenceResult:
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
    place = np.cumsum(columns.outputs) - 1  # of each output among the rows
    results = []
    for seq_id in columns.sequences:
        mine = columns.rows_of(seq_id)
        wanted = mine[columns.outputs[mine]]
        logits, embeddings = (
            None if each is None else each[place[wanted]] for each in (rows.logits, rows.embeddings)
        )
        cut = Rows(logits, embeddings)
        results.append(SequenceResult(seq_id, columns.positions[wanted], cut, Rung.NATIVE))
    return results


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
        """Logits of one output, float32, shape (n_vocab,), the caller's own.

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
        index = np.flatnonzero(outputs == pos) if pos >= 0 else np.arange(len(outputs))[-1:]
        if pos < -1 or not len(index):
            raise InputError("pos", pos, f"sequence {seq_id} has outputs at {outputs.tolist()}")
        row: npt.NDArray[np.float32] = rows[int(index[-1])].copy()
        return row


@dataclass(frozen=True)
class Completion:
    """One finished prompt.

    Attributes:
        index: Its place among the prompts.
        prompt: The prompt itself.
        text: What the model added.
        tokens: The same as token ids.
        finish_reason: ``"stop"`` (end of generation), ``"length"``, or ``"error"``.
        rung: The rung that finished it.
        error: Why it failed, or None.
        reports: Crash reports of the jobs it took part in.
    """

    index: int
    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    rung: Rung
    error: CrumplezoneError | None = None
    reports: tuple[str, ...] = ()
