"""What a `Llama` asks of its cell, and what the cell asks back. Large values cross the arena as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.config import (
    CACHE_TYPES,
    INT32_MAX,
    ROPE_SCALING,
    SPLIT_MODES,
    CellConfig,
    CellInfo,
    Size,
    Token,
)
from crumplezone.workers.protocol.messages import Save, Warm

INLINE_MAX = 64 * 1024  # bytes of a value that fit into a frame beside its note
NOTE_MAX = 8192  # tokens in one entry of a note
VALUE_MAX = 2**28  # bytes of a decoded value: embeddings of some 40,000 texts
STATE_MAX = 2**33  # bytes of a saved state or of scores

_CACHE_TYPES = {number: name for name, number in CACHE_TYPES.items()}
_ROPE_SCALING = {number: name for name, number in ROPE_SCALING.items()}
_SPLIT_MODES = {number: name for name, number in SPLIT_MODES.items()}
_ALIKE = (
    *("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_orig_ctx", "n_threads_batch", "offload_kqv", "main_gpu"),
    *("use_mmap", "use_mlock", "op_offload", "swa_full"),
)

Int32 = Annotated[int, msgspec.Meta(ge=-INT32_MAX - 1, le=INT32_MAX)]
Place = Annotated[int, msgspec.Meta(ge=0, lt=4096)]  # of a generation in its call
Stage = Literal["", "grammar"]


class LlamaConfig(msgspec.Struct, frozen=True):
    """How to build the ``llama_cpp.Llama`` of a cell."""

    model: str  # of the model, absolute: the next cell may start in another directory
    parameters: dict[str, Any]  # of its constructor; what cannot be sent is not among them
    lookup: tuple[int, int] | None = (
        None  # draft model: LlamaPromptLookupDecoding(max_ngram_size, num_pred_tokens)
    )

    @property
    def n_gpu_layers(self) -> int:
        """Layers to offload."""
        layers: int = self.parameters["n_gpu_layers"]
        return layers

    @property
    def restorable(self) -> bool:
        """Whether a saved state is all that a cell needs to go on: not where earlier rows are asked for."""
        return not (self.lookup or self.parameters["logits_all"] or self.parameters["embedding"])

    def careful(self) -> LlamaConfig:
        """One thread, token by token. Embeddings need their text in one batch, and a draft its tokens."""
        changed: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}
        if not self.parameters["embedding"]:
            changed |= {"n_batch": 1, "n_ubatch": 1}
        if self.lookup:
            changed["logits_all"] = True  # as the original has it with a draft model
        return LlamaConfig(self.model, self.parameters | changed)

    def context(self, info: LlamaInfo | None = None) -> CellConfig:
        """As reports have it."""
        given = self.parameters
        return CellConfig(
            model=self.model,
            n_ctx=info.n_ctx if info else given["n_ctx"],
            n_batch=given["n_batch"],
            n_ubatch=min(given["n_ubatch"], given["n_batch"]),
            n_seq_max=info.n_seq_max if info else 1,
            n_threads=given["n_threads"],
            n_gpu_layers=given["n_gpu_layers"],
            type_k=_CACHE_TYPES.get(given["type_k"], "f16"),
            type_v=_CACHE_TYPES.get(given["type_v"], "f16"),
            flash_attn="on" if given["flash_attn"] else "off",
            rope_scaling_type=_ROPE_SCALING.get(given["rope_scaling_type"], "unspecified"),
            split_mode=_SPLIT_MODES.get(given["split_mode"], "layer"),
            tensor_split=tuple(given["tensor_split"] or ()),
            **{name: given[name] for name in _ALIKE if given[name] is not None},
        )


class LlamaInfo(msgspec.Struct, frozen=True):
    """What the loaded model and the context are."""

    cell: CellInfo
    n_embd: Size
    n_ctx: Size
    n_rows: Size  # of scores
    n_seq_max: Size
    pooling_type: Int32
    token_eos: Int32
    token_bos: Int32
    token_nl: Int32
    chat_format: str | None
    chat_formats: list[str]  # by name, for ``chat_format``


class Grammar(msgspec.Struct, frozen=True):
    """A GBNF text and its root symbol, or a JSON schema to make one of."""

    text: str
    root: str = "root"
    schema: bool = False


class LlamaCall(msgspec.Struct, frozen=True):
    """One call of a method of ``Llama``, and everything that its result depends on.

    Attributes:
        method: Its name.
        args: Keyword arguments.
        seed: Of the ``Llama``, as it stood before the call.
        n_tokens: Evaluated so far, likewise.
        chat_format: Likewise.
        identity: From which the ids and times of the result are made.
        created: Seconds since the epoch.
        history: The tokens evaluated so far, for a cell that does not hold them; None: it does.
        forced: What the call's generations produced before its cell was lost.
        saved: The tokens of the state that came before (`Restore`); empty: none did.
        grammar: Instead of an object.
        processors: Whether the caller has logits processors.
        criteria: Whether the caller has stopping criteria.
        cache: Bytes of a ``LlamaRAMCache``, or None.
    """

    method: str
    args: dict[str, Any]
    seed: int
    n_tokens: int
    chat_format: str | None
    identity: int
    created: int
    history: list[int] | None = None
    forced: list[list[int]] = []
    saved: list[int] = []
    grammar: Grammar | None = None
    processors: bool = False
    criteria: bool = False
    cache: int | None = None


class Invoke(msgspec.Struct, tag="invoke", frozen=True):
    """Run the `LlamaCall` of so many bytes in the arena. Ends what ran before."""

    n_bytes: int


class Query(msgspec.Struct, tag="query", frozen=True):
    """Run a `LlamaCall` that changes nothing (tokenising, ...), even while another is suspended or asks."""

    n_bytes: int


class Next(msgspec.Struct, tag="next", frozen=True):
    """The next item of the running job's iterator. ``sent`` goes into the generator."""

    sent: list[int] | None = None


class Fetch(msgspec.Struct, tag="fetch", frozen=True):
    """Copy the value that was too large for a frame into the arena, which has room for it."""


class Restore(msgspec.Struct, tag="restore", frozen=True):
    """Begin the next call with the state of ``n_bytes`` in the arena, as far as its tokens are the same."""

    n_bytes: int


class LlamaSeedInfo(msgspec.Struct, frozen=True):
    """What a zygote of a `Llama` knows.

    Attributes:
        context_bytes: Of keys and values of a context, about.
    """

    context_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)]


class Evaluated(msgspec.Struct, array_like=True, frozen=True):
    """Tokens given to llama.cpp (or about to be) at a position; what stood there and after it is gone."""

    at: Size
    tokens: Annotated[list[Token], msgspec.Meta(max_length=NOTE_MAX)]


class Note(msgspec.Struct, tag="note", frozen=True):
    """What has happened in the running job since the last note. As a question it wants an empty answer."""

    evaluated: list[Evaluated] = []
    drawn: list[tuple[Place, Token]] = []  # number of the generation within the call, and token
    stage: Stage = ""


class Output(msgspec.Struct, frozen=True):
    """The value of a job or the next item.

    Attributes:
        value: In msgpack, or as it is for bytes and numbers.
        size: Bytes to `Fetch` instead, if not 0.
        end: It is an iterator, or (as an answer to `Next`) it is exhausted.
        note: What has happened since the last note.
        n_tokens: As the ``Llama`` stands now.
        seed: Likewise.
    """

    value: bytes
    size: Annotated[int, msgspec.Meta(ge=0)]
    end: bool
    note: Note
    n_tokens: Size
    seed: int


class Process(msgspec.Struct, tag="process", frozen=True):
    """Question: run the caller's logits processors on the arena's logits (`question_shapes`), in place."""

    n_ids: Size
    note: Note  # so that a token that a callback has seen is not drawn again


class Judge(msgspec.Struct, tag="judge", frozen=True):
    """Question: run the caller's stopping criteria on what lies in the arena."""

    n_ids: Size
    note: Note


class Judged(msgspec.Struct, frozen=True):
    """Answer to a question: whether to stop."""

    stop: bool = False


class Nothing(msgspec.Struct, frozen=True):
    """Reply without content."""


Request = Invoke | Query | Next | Fetch | Save | Restore | Warm
Question = Note | Process | Judge


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def question_shapes(n_vocab: int, n_ids: int) -> list[Shape]:
    """Logits of one position (float32) and token ids (int32)."""
    return [("f4", n_vocab), ("i4", n_ids)]
