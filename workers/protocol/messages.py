"""What a supervisor asks of a llama.cpp cell. Arrays travel through the arena, never in the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.arrays import BatchArrays, batch_shapes
from crumplezone.workers.protocol.config import CellInfo, Position, Token
from crumplezone.workers.protocol.sampling import Sampling

BESIDE = 128  # most prompt tokens in a native call that also generates: a long prompt makes none wait longer


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What the memory holds of one sequence: its smallest and largest position, -1 if nothing."""

    seq_id: Annotated[int, msgspec.Meta(ge=0, lt=256)]
    begin: Position
    last: Position


class Decode(msgspec.Struct, tag="decode", frozen=True):
    """Decode (or encode) the batch in the arena (`batch_shapes`).

    The reply's rows lie behind the batch (`row_shapes`), one per output, in the batch's order.
    """

    n_tokens: int
    n_outputs: int
    logits: bool
    embeddings: bool
    encode: bool
    fresh: bool  # clear the memory first
    n_seq_ids: int  # entries of all seq_id arrays together
    n_embd: int  # not 0: the batch has vectors of this size instead of tokens
    nulls: list[str]  # fields to be passed as NULL, see `Columns.nulls`
    process: bool = False  # by llama_process, with a llama_batch_ext


class Decoded(msgspec.Struct, frozen=True):
    """Return code of the native call: see docs/architecture.md for what each means."""

    rc: int
    spans: list[Span] = []  # of the sequences in the batch


class MemoryOperation(msgspec.Struct, tag="memory", frozen=True):
    """One operation on the memory, as ``llama_memory_*``."""

    name: Literal["clear", "remove", "copy", "shift"]
    seq_id: int = 0
    begin: int = -1
    end: int = -1
    target: int = 0
    delta: int = 0


class Save(msgspec.Struct, tag="save", frozen=True):
    """Write the state of a sequence into the arena."""

    seq_id: int


class Saved(msgspec.Struct, frozen=True):
    """How many bytes of state lie in the arena, or how many there would be if there were ``room``."""

    size: Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Load(msgspec.Struct, tag="load", frozen=True):
    """Replace a sequence by the state of ``size`` bytes in the arena."""

    seq_id: int
    size: int


class Remembered(msgspec.Struct, frozen=True):
    """Whether it was done, and what every sequence holds now."""

    done: bool
    spans: list[Span]


class Resize(msgspec.Struct, tag="resize", frozen=True):
    """Make a new, empty context over the same model."""

    n_ctx: int
    n_seq_max: int


class Adapt(msgspec.Struct, tag="adapt", frozen=True):
    """Use these LoRA adapters, and the control vector of ``n_floats`` in the arena (none: remove it)."""

    paths: list[str]
    scales: list[float]
    n_floats: int = 0
    first_layer: int = 0
    last_layer: int = 0


class Adapted(msgspec.Struct, frozen=True):
    """Done."""


class Warm(msgspec.Struct, tag="warm", frozen=True):
    """Decode a token and forget it: with the first one, llama.cpp makes its threads and fills its caches."""


class Warmed(msgspec.Struct, frozen=True):
    """Done."""


class Tokenize(msgspec.Struct, tag="tokenize", frozen=True):
    """Tokenise the UTF-8 text of ``n_bytes`` in the arena; the tokens come back as int32 in its place."""

    n_bytes: int


class Tokenized(msgspec.Struct, frozen=True):
    """How many tokens lie in the arena."""

    n_tokens: int


class Detokenize(msgspec.Struct, tag="detokenize", frozen=True):
    """Tell the text of each of these lists of tokens, all of which are in the vocabulary."""

    tokens: list[list[Token]]


class Detokenized(msgspec.Struct, frozen=True):
    """UTF-8, which may be cut inside a character."""

    texts: list[bytes]


class Join(msgspec.Struct, frozen=True):
    """A prompt that takes a free sequence; its tokens lie in the arena (`Generate.arrays`)."""

    seq_id: int
    n_tokens: int
    sampling: Sampling  # ``max_tokens``: still to come


class Arrays(Protocol):
    """An arena; the supervisor's is that of a cell."""

    def arrays(self, shapes: Sequence[Shape]) -> list[npt.NDArray[Any]]:
        """Cut into these arrays."""


class Generate(msgspec.Struct, tag="generate", frozen=True):
    """Let sequences leave and prompts join, then run up to ``steps`` native calls over all that run.

    The reply comes earlier when a sequence has got its first token or its last, when the supervisor nudges
    (`Arena.nudge`), or when it would else take long. At least one native call is made if any sequence runs.
    """

    joins: list[Join]
    steps: int
    chunk: int  # most tokens per native call
    leaves: list[int] = []  # sequences to give up, before any joins
    reset: bool = False  # clear the memory and forget every sequence first

    def arrays(self, arena: Arrays) -> tuple[BatchArrays, list[npt.NDArray[np.int32]]]:
        """The batch of a native call, and behind it the tokens of each that joins."""
        joins: list[Shape] = [("i4", join.n_tokens) for join in self.joins]
        arrays = arena.arrays([*batch_shapes(self.chunk), *joins])
        n = len(BatchArrays._fields)
        return BatchArrays(*arrays[:n]), arrays[n:]


class Progress(msgspec.Struct, frozen=True):
    """What one sequence produced: its new tokens, their text (UTF-8, may end inside a character)."""

    seq_id: int
    tokens: list[Token]
    text: bytes
    finished: Literal["", "stop", "length"] = ""  # "", "stop" (end of generation) or "length"


class Generated(msgspec.Struct, frozen=True):
    """One entry for each sequence that was running."""

    rc: int
    progress: list[Progress]


Request = Decode | Tokenize | Detokenize | Generate | MemoryOperation | Save | Load | Resize | Adapt | Warm


def row_shapes(request: Decode, info: CellInfo) -> list[Shape]:
    """Logits and embeddings, float32, one row per output; 0 rows for what was not asked."""
    logits = request.n_outputs * info.n_vocab if request.logits else 0
    embeddings = request.n_outputs * info.n_embd if request.embeddings else 0
    return [("f4", logits), ("f4", embeddings)]
