"""What a supervisor asks of a llama.cpp cell. Arrays travel through the arena, never in the frames."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from crumplezone.reports.runs import CacheType, FlashAttention
from crumplezone.sandbox.arena import Shape
from crumplezone.workers.results import Sampling

BESIDE = 128  # most prompt tokens in a native call that also generates: a long prompt makes none wait longer
# enum ggml_type (ggml.h): of BF16, llama-cpp-python has no constant
CACHE_TYPES: dict[CacheType, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
QUANTIZED = CACHE_TYPES.keys() - {"f32", "f16", "bf16"}
FLASH_ATTENTION: dict[FlashAttention, int] = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type

Size = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Position = Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]


class CellConfig(msgspec.Struct, frozen=True):
    """Model and context parameters; names and meanings are those of ``llama_context_params``."""

    model: str
    n_ctx: int  # per cell: n_ctx_seq * n_seq_max
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_threads: int
    n_gpu_layers: int = 0
    kv_unified: bool = False  # True: one stream of keys and values, through which sequences affect rounding
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    flash_attn: FlashAttention = "auto"


class ModelFile(msgspec.Struct, frozen=True):
    """What a zygote loads: of any cell's configuration, the fields that a model depends on."""

    model: str
    n_gpu_layers: int = 0


class CellInfo(msgspec.Struct, frozen=True):
    """What the loaded model and context are."""

    n_vocab: Size
    n_embd: Size
    n_ctx_seq: Size
    n_ctx_train: Size
    n_batch: Size
    has_encoder: bool
    has_decoder: bool
    n_embd_inp: Size
    causal: bool  # attention; BERT-like models see the whole batch in one pass
    recurrent: bool  # a state in the place of positions
    learned_positions: bool  # no more than n_ctx_train of them
    n_pos_per_embd: Annotated[int, msgspec.Meta(ge=1, le=4)]
    description: str
    system_info: str
    llama_cpp: str


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
    """A prompt that takes a free sequence; its tokens lie in the arena (`Generate.shapes`)."""

    seq_id: int
    n_tokens: int
    sampling: Sampling  # ``max_tokens``: still to come


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

    def shapes(self) -> list[Shape]:
        """The batch of a native call (`batch_shapes`), and behind it the tokens of each that joins."""
        return [*batch_shapes(self.chunk), *(("i4", join.n_tokens) for join in self.joins)]


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


def batch_shapes(n_tokens: int, n_seq_ids: int = -1, n_embd: int = 0) -> list[Shape]:
    """Tokens (or vectors), positions, seq_ids, outputs, n_seq_id and seq_id pointers (child only)."""
    first = ("f4", n_tokens * n_embd) if n_embd else ("i4", n_tokens)
    flat = n_tokens if n_seq_ids < 0 else n_seq_ids
    return [first, ("i4", n_tokens), ("i4", flat), ("i1", n_tokens), ("i4", n_tokens), ("u8", n_tokens)]


def row_shapes(request: Decode, info: CellInfo) -> list[Shape]:
    """Logits and embeddings, float32, one row per output; 0 rows for what was not asked."""
    logits = request.n_outputs * info.n_vocab if request.logits else 0
    embeddings = request.n_outputs * info.n_embd if request.embeddings else 0
    return [("f4", logits), ("f4", embeddings)]
