"""What a job gives back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import CrumplezoneError, InputError, SequenceError, check_integer, check_number
from crumplezone.workers.calls import Rows
from crumplezone.workers.columns import Columns, Int32


class Rung(StrEnum):
    """One way to run a job, fastest first."""

    NATIVE = "native"  # all sequences in one native call
    SAFE = "safe"  # one sequence at a time, split at n_batch
    TOKEN = "token"  # one token at a time  # noqa: S105 - a rung, not a secret


COLDEST = 1e-6  # a temperature below is greedy: logits divided by it might overflow, and inf - inf is NaN
_INTEGERS = {  # of `Sampling`: smallest and largest
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "penalty_last_n": (0, 2**16),
    "seed": (0, 2**63 - 1),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),  # llama.cpp divides by it
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
}


def check_sampling(values: object, prefix: str = "") -> None:
    """Raise `InputError` unless an object has the attributes of a `Sampling`, all of them in range.

    Args:
        values: The object.
        prefix: Put before the name of an attribute in the message.
    """
    for name, limits in _INTEGERS.items():
        check_integer(prefix + name, getattr(values, name), *limits)
    for name, bounds in _NUMBERS.items():
        check_number(prefix + name, getattr(values, name), *bounds)


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens, by llama.cpp's own samplers: penalties, top_k, top_p, min_p, temperature.

    Attributes:
        max_tokens: Most tokens to draw.
        temperature: 0 is greedy: of all the others, only the penalties then matter.
        top_k: Of the likeliest tokens so many are kept; 0: all.
        top_p: The likeliest are kept that have this much probability together; 1: all.
        min_p: Those are kept that have this share of the likeliest one's probability; 0: all.
        repeat_penalty: Divides the logits of tokens that came lately; 1: does not.
        frequency_penalty: Taken from their logits for each time that they came.
        presence_penalty: Taken from their logits once.
        penalty_last_n: "Lately" is so many tokens, the prompt's included.
        seed: The same seed gives the same text, crash or no crash, but for rounding (`Decoder.generate`).

    Raises:
        InputError: One of them is out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self)
        for names, kind in ((_INTEGERS, int), (_NUMBERS, float)):
            for name in names:  # numpy's numbers are welcome, but do not travel
                object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature < COLDEST

    @property
    def plain(self) -> bool:
        """Whether each token is simply the likeliest."""
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        return self.greedy and (not self.penalty_last_n or penalties == (1, 0, 0))


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_last_n: int
    seed: int


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


def failed(index: int, prompt: str, error: CrumplezoneError, reports: tuple[str, ...] = ()) -> Completion:
    """The completion of a prompt that never began."""
    return Completion(index, prompt, "", [], "error", Rung.NATIVE, error, reports)
