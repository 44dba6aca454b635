"""A shape in a cell: the native calls that it stands for, what they gave, and how that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from crumplezone.errors import InputError, check_integer
from crumplezone.reports.records.report import BatchRecord
from crumplezone.reports.records.run import Shape
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ, Columns, Float32, Int32
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.embed.client import EmbedClient
from crumplezone.workers.ladder.record import batch_record
from crumplezone.workers.memory.journal import Appended, Journal
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CTX_PAD, CellConfig, CellInfo
from crumplezone.workers.protocol.embed import EmbedConfig

STEPS = 4  # tokens that each sequence is continued by
# Measured over batch shapes, threads and types of keys and values on SmolLM2 Q4_1 (llama.cpp 0c1e57098, CPU).
# With kv_unified=False there was no difference at all. With True, up to 0.10 between logits that changed
# places, and 0.14 between vectors. Answers to other sequences are off by 2.4 and 1.05 (medians).
ROUNDING = 0.5  # what rounding may part two logits by, in standard deviations of their row
ROUNDING_VECTORS = 0.25  # and two vectors, in lengths of the safe one
_SIZE_MAX = 2**20
# Lincoln at Gettysburg, 1863. What has fewer tokens than a shape is repeated.
_TEXT = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great \
civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We \
are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final \
resting place for those who here gave their lives that that nation might live. It is altogether fitting \
and proper that we should do this. But, in a larger sense, we can not dedicate, we can not consecrate, we \
can not hallow this ground. The brave men, living and dead, who struggled here, have consecrated it, far \
above our poor power to add or detract. The world will little note, nor long remember what we say here, \
but it can never forget what they did here. It is for us the living, rather, to be dedicated here to the \
unfinished work which they who fought here have thus far so nobly advanced."""


@dataclass(frozen=True, eq=False)
class Said:
    """How a sequence was continued, each token the likeliest.

    Attributes:
        tokens: `STEPS` of them.
        rows: Logits that they were chosen by, float32, shape (STEPS, n_vocab); None beside other sequences.
    """

    tokens: list[int]
    rows: Float32 | None


@dataclass(frozen=True)
class Difference:
    """What the native path and the safe one disagree on.

    Attributes:
        size: 1 is the most that rounding explains.
        what: In words.
    """

    size: float
    what: str


class Probe(Protocol):
    """One context in one cell.

    Attributes:
        sent: The batch of the latest native call.
    """

    sent: BatchRecord | None

    @property
    def client(self) -> DecodeClient | EmbedClient:
        """Its cell."""

    def tokenize(self) -> Int32:
        """The tokens of some English."""

    def ask(self, columns: Columns) -> Sequence[Said | Float32]:
        """Make the native calls; the answer to each sequence, in order.

        Raises:
            RefusedError: A return code was not 0.
            CellRefused: The cell answered with an error.
            CellDied: The cell was lost.
        """


class Texts:
    """Continues sequences by decoding: the batch in one native call, then a token of each at a time.

    Args:
        config: The context.
        limits: Of the cell.
        process: Whether to decode by ``llama_process``.
        chunk: Most tokens per native call; 0: all in one.
    """

    sent: BatchRecord | None = None

    def __init__(self, config: CellConfig, limits: Limits, *, process: bool = False, chunk: int = 0) -> None:
        self.client = DecodeClient(config, limits, None)
        self._ask, self._chunk = DecodeOptions(process=process), chunk

    def tokenize(self) -> Int32:
        """See `Probe`."""
        return self.client.tokenize(_TEXT)

    def ask(self, columns: Columns) -> list[Said]:
        """See `Probe`."""
        operation, journal = "process" if self._ask.process else "decode", Journal()
        steps, chosen = list[Float32](), list[Int32]()
        alone = len(columns.sequences) == 1
        for step in range(STEPS):
            self.sent = batch_record(columns, operation, chunk=self._chunk, journal=journal)
            rows = self.client.send(columns, self._ask, self._chunk, fresh=step == 0).logits
            assert rows is not None
            chosen.append(rows.argmax(axis=1).astype(np.int32))
            steps += [rows[0]] if alone else []
            journal.add(Appended(columns))
            columns = _continued(columns, chosen[-1])
        kept = np.array(steps) if alone else None
        return [Said(tokens, kept) for tokens in np.array(chosen).T.tolist()]


class Hidden:
    """The hidden state of every token, by encoding or decoding.

    Args:
        config: The context.
        limits: Of the cell.
        encode: Whether to encode.
        safe: Only if the model has an encoder.
    """

    sent: BatchRecord | None = None

    def __init__(self, config: CellConfig, limits: Limits, *, encode: bool, safe: bool) -> None:
        self.client = DecodeClient(config, limits, None)
        self._encode, self._safe = encode, safe

    def tokenize(self) -> Int32:
        """See `Probe`."""
        return self.client.tokenize(_TEXT)

    def ask(self, columns: Columns) -> list[Float32]:
        """See `Probe`."""
        encode = self._encode and (self.client.info.has_encoder or not self._safe)
        self.sent = batch_record(columns, "encode" if encode else "decode", embeddings=True)
        rows = self.client.send(
            columns, DecodeOptions(logits=False, embeddings=True, encode=encode)
        ).embeddings
        assert rows is not None
        return [rows[columns.rows_of(seq_id)] for seq_id in columns.sequences]


class Pooled:
    """One vector for each sequence.

    Args:
        config: The context.
        limits: Of the cell.
        pooling: As `Shape` has it.
    """

    sent: BatchRecord | None = None

    def __init__(self, config: CellConfig, limits: Limits, pooling: str) -> None:
        self.client = EmbedClient(config, limits, None)
        self._config, self._pooling = config, None if pooling == "model" else pooling

    def tokenize(self) -> Int32:
        """See `Probe`."""
        (tokens,) = self.client.tokenize([_TEXT.encode()])
        return tokens

    def ask(self, columns: Columns) -> list[Float32]:
        """See `Probe`."""
        n_embd = self.client.info.n_embd
        pooling = self.client.pooling(self._pooling)  # the model's own is known once the cell has started
        config = EmbedConfig(**msgspec.structs.asdict(self._config), pooling=pooling)
        vectors = np.empty((len(columns.sequences), n_embd), np.float32)
        self.sent = batch_record(columns, "embed", embeddings=True)
        self.client.embed(config, columns, vectors, range(len(vectors)))
        return list(vectors[:, None])


def probe(shape: Shape, config: CellConfig, limits: Limits, *, safe: bool) -> Probe:
    """What a shape stands for in a context; ``safe`` for one sequence at a time."""
    if shape.path == "embed" and shape.pooling != "none":
        return Pooled(config, limits, shape.pooling)
    if shape.path in ("encode", "embed"):
        return Hidden(config, limits, encode=shape.path == "encode", safe=safe)
    process = shape.path == "process" and not safe
    return Texts(config, limits, process=process, chunk=min(config.n_batch, config.n_ctx) if safe else 0)


def context(model: Path, shape: Shape, *, safe: bool) -> CellConfig:
    """A context that a shape fits into. As llama.cpp clamps n_batch to n_ctx, that is at least as much.

    Args:
        model: A GGUF file.
        shape: What is to be tried.
        safe: For one sequence at a time.

    Raises:
        InputError: There can be no such shape.
        ModelError: The file cannot be a model.
    """
    check_integer("sequences", shape.sequences, 1, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
    check_integer("tokens", shape.tokens, shape.sequences, _SIZE_MAX, f" (sequences is {shape.sequences})")
    check_integer("n_batch", shape.n_batch, shape.sequences, _SIZE_MAX, f" (sequences is {shape.sequences})")
    if shape.pooling != "model" and shape.path != "embed":
        raise InputError("pooling", shape.pooling, f"must be model: the path {shape.path} does not pool")
    n_seq_max = 1 if safe else shape.sequences
    streams = 1 if shape.kv_unified else n_seq_max
    n_tokens = _longest(shape) if streams == n_seq_max else shape.tokens + STEPS * shape.sequences
    n_batch, n_ubatch = shape.n_batch, shape.n_ubatch
    if safe and shape.path in ("encode", "embed"):  # what is pooled, or sees all of itself, takes one pass
        n_batch = n_ubatch = n_tokens
    n_ctx_stream = max(n_tokens, -(-n_batch // streams))
    return configure(
        model,
        n_ctx=-(-n_ctx_stream // CTX_PAD) * CTX_PAD * streams,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_seq_max=n_seq_max,
        n_threads=shape.n_threads,
        kv_unified=shape.kv_unified,
        type_k=shape.type_k,
        type_v=shape.type_v,
        flash_attn=shape.flash_attn,
    )


def batch(shape: Shape, tokens: Int32, info: CellInfo) -> Columns:
    """The batch of a shape: its sequences one behind the other, as equally long as can be.

    Args:
        shape: What is to be tried.
        tokens: int32, of some text; repeated where they are too few.
        info: Of the model.

    Raises:
        InputError: The model cannot do it.
    """
    texts = shape.path not in ("encode", "embed")
    if texts and (info.has_encoder or not info.causal):
        limit = "must be encode or embed: this model does not just go on with a text"
        raise InputError("path", shape.path, limit)
    longest = _longest(shape) if texts else -(-shape.tokens // shape.sequences)
    if not info.recurrent and longest > info.n_ctx_train:
        limit = f"makes {longest} in a sequence with those generated; the model knows {info.n_ctx_train}"
        raise InputError("tokens", shape.tokens, limit)
    parts = np.array_split(np.resize(tokens, shape.tokens), shape.sequences)
    return Batch.of(parts, "last" if texts else "all").columns()


def _longest(shape: Shape) -> int:
    """Positions that the longest sequence takes; the last token that is generated takes none."""
    return -(-shape.tokens // shape.sequences) + STEPS - 1


def _continued(columns: Columns, tokens: Int32) -> Columns:
    """The next token of each sequence."""
    last = columns.outputs
    return Columns(
        tokens=tokens,
        embd=None,
        positions=columns.positions[last] + np.int32(1),
        n_seq_id=np.ones(len(tokens), np.int32),
        seq_ids=columns.seq_ids[last],
        outputs=np.ones(len(tokens), np.bool_),
    )


def difference(native: Said | Float32, safe: Said | Float32) -> Difference | None:
    """How the answers to a sequence differ; None if they are as good as equal."""
    if isinstance(native, Said):
        assert isinstance(safe, Said)
        return _other_text(native, safe)
    assert not isinstance(safe, Said)
    lengths = np.linalg.norm(safe, axis=1)
    apart = np.linalg.norm(native - safe, axis=1) / np.where(lengths > 0, lengths, 1)
    row = int(apart.argmax())
    if apart[row] <= ROUNDING_VECTORS:
        return None
    what = f"vector {row} is off by {apart[row]:.2g} of its length; rounding makes up to {ROUNDING_VECTORS}"
    return Difference(float(apart[row] / ROUNDING_VECTORS), what)


def _other_text(native: Said, safe: Said) -> Difference | None:
    """Texts are compared up to where they part: from there on, each goes on from another beginning."""
    assert safe.rows is not None
    for step, (mine, other) in enumerate(zip(native.tokens, safe.tokens, strict=True)):
        if mine != other:
            row = safe.rows[step]
            gap = float((row[other] - row[mine]) / row.std())
            what = (
                f"token {step + 1} is another, on the safe path less likely by {gap:.2g} standard deviations "
                f"of the logits; rounding makes up to {ROUNDING}"
            )
            return Difference(gap / ROUNDING, what)
    return None
