"""What a supervisor asks of a llama.cpp cell. Arrays travel through the arena, never in the frames."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.config import CellInfo, Position, Token
from crumplezone.workers.protocol.generate.messages import Generate


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
    special: bool = True  # what is written like a special token becomes one
    begin: bool = True  # with the tokens that the model wants around a text (BOS)


class Tokenized(msgspec.Struct, frozen=True):
    """How many tokens lie in the arena."""

    n_tokens: int


class Detokenize(msgspec.Struct, tag="detokenize", frozen=True):
    """Tell the text of each of these lists of tokens, all of which are in the vocabulary."""

    tokens: list[list[Token]]


class Detokenized(msgspec.Struct, frozen=True):
    """UTF-8, which may be cut inside a character."""

    texts: list[bytes]


Request = Decode | Tokenize | Detokenize | Generate | MemoryOperation | Save | Load | Resize | Adapt | Warm


def row_shapes(request: Decode, info: CellInfo) -> list[Shape]:
    """Logits and embeddings, float32, one row per output; 0 rows for what was not asked."""
    logits = request.n_outputs * info.n_vocab if request.logits else 0
    embeddings = request.n_outputs * info.n_embd if request.embeddings else 0
    return [("f4", logits), ("f4", embeddings)]
