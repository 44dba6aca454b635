"""What a native call takes and gives, on the supervisor's side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, check_integer, check_number

if TYPE_CHECKING:
    from crumplezone.workers.protocol import Span

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
class Ask:
    """What is wanted of a decode."""

    logits: bool = True
    embeddings: bool = False
    encode: bool = False
    process: bool = False  # decode by llama_process


@dataclass(frozen=True)
class Adapters:
    """What changes the model of a context.

    Attributes:
        lora: Paths of LoRA adapters and their scales.
        vector: A control vector, float32, n_embd values for each layer from 1; empty for none.
        layers: The first and the last layer that the vector is added to.
    """

    lora: tuple[tuple[str, float], ...] = ()
    vector: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    layers: tuple[int, int] = (0, 0)

    @classmethod
    def checked(
        cls,
        lora: Mapping[str | Path, float],
        control: npt.ArrayLike | None,
        layers: tuple[int, int],
        n_embd: int,
    ) -> Adapters:
        """Make it of what a caller gave.

        Raises:
            InputError: A file cannot be read, or a value is out of range.
        """
        if not isinstance(lora, Mapping):
            raise InputError("lora", lora, "must be a mapping of paths to scales")
        found = []
        for path, scale in lora.items():
            check_number(f"scale of {path}", scale, -1e6, 1e6)
            if not Path(path).is_file():
                raise InputError("lora", str(path), "must be the path of a LoRA adapter (GGUF)")
            found.append((str(Path(path).absolute()), float(scale)))
        try:
            vector = np.empty(0, np.float32) if control is None else np.asarray(control, np.float32).ravel()
        except (TypeError, ValueError) as error:
            raise InputError("control", control, f"must be numbers ({error})") from error
        if len(vector) % n_embd or not np.isfinite(vector).all():
            limit = f"must be finite, and n_embd = {n_embd} values for each layer"
            raise InputError("control", vector.shape, limit)
        check_integer("layers[0]", layers[0], 0, 2**16)
        check_integer("layers[1]", layers[1], -1, 2**16)
        n_layers = len(vector) // n_embd
        return cls(tuple(found), vector, (int(layers[0]), n_layers if layers[1] < 0 else int(layers[1])))


@dataclass(frozen=True)
class Limits:
    """Seconds for one native call, and bytes of resident memory for one cell; None: no limit.

    Raises:
        InputError: One is out of range.
    """

    deadline: float | None
    memory: int | None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            check_number("deadline", self.deadline, 1e-3, 1e7)
            object.__setattr__(self, "deadline", float(self.deadline))  # numpy's numbers are welcome
        if self.memory is not None:
            check_integer("memory_limit", self.memory, 1, 2**63 - 1)
