"""What a native call takes and gives, on the supervisor's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.workers.protocol.messages import Span

RC_MEANING = {
    1: "no memory slot for the batch (rc 1)",
    2: "aborted by its callback (rc 2)",
    -1: "llama.cpp calls the batch invalid (rc -1)",
    -2: "allocation failed (rc -2)",
    -3: "computation failed (rc -3)",
}


class RefusedError(Exception):
    """The native call returned a code other than 0; the cell lives."""

    def __init__(self, rc: int, spans: Sequence[Span] = ()) -> None:
        super().__init__(RC_MEANING.get(rc, f"rc {rc}"))
        self.rc, self.spans = rc, spans


class Rows(msgspec.Struct, frozen=True):
    """What a call gave back: float32, one row per requested output, or None where not asked.

    Attributes:
        logits: Shape (n_outputs, n_vocab).
        embeddings: Shape (n_outputs, n_embd).
        spans: What the memory holds now of the sequences in the batch.
    """

    logits: npt.NDArray[np.float32] | None
    embeddings: npt.NDArray[np.float32] | None
    spans: Sequence[Span] = ()

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several calls, one behind the other."""
        logits = [part.logits for part in parts if part.logits is not None]
        embeddings = [part.embeddings for part in parts if part.embeddings is not None]
        return cls(
            np.concatenate(logits) if logits else None,
            np.concatenate(embeddings) if embeddings else None,
            parts[-1].spans,
        )


@dataclass(frozen=True)
class DecodeOptions:
    """What is wanted of a decode."""

    logits: bool = True
    embeddings: bool = False
    encode: bool = False
    process: bool = False  # decode by llama_process
