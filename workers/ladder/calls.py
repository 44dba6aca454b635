"""What the ladder runs: a batch in one native call, or one of its sequences alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import msgspec

from crumplezone.errors import InputError
from crumplezone.reports.records.report import BatchRecord
from crumplezone.workers.batch.call import DecodeOptions, Rows
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.ubatches import split_equal, split_seq, split_simple
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.ladder.record import batch_record
from crumplezone.workers.memory.session import MemorySession


class LadderCall(Protocol):
    """A batch, and how it is run."""

    @property
    def columns(self) -> Columns:
        """The batch."""

    def run(self, chunk: int = 0) -> Rows:
        """Run it in native calls of at most ``chunk`` tokens; 0: in one, whatever its size."""

    def alone(self, seq_id: int) -> Self:
        """One of its sequences, as the safe rungs run it."""

    def record(self, chunk: int = 0) -> BatchRecord:
        """The batch as a report keeps it, after a crash of ``run(chunk)``."""


@dataclass(frozen=True)
class DecodeCall:
    """Appends a batch to the memory."""

    session: MemorySession
    columns: Columns
    options: DecodeOptions

    def run(self, chunk: int = 0) -> Rows:
        """See `LadderCall`."""
        return self.session.decode(self.columns, self.options, chunk)

    def alone(self, seq_id: int) -> Self:
        """See `LadderCall`."""
        return replace(self, columns=self.columns.alone(seq_id))

    def record(self, chunk: int = 0) -> BatchRecord:
        """See `LadderCall`."""
        embeddings, journal = self.options.embeddings, self.session.journal
        batch = batch_record(self.columns, "decode", chunk=chunk, embeddings=embeddings, journal=journal)
        return batch if chunk else msgspec.structs.replace(batch, passes=self._passes())

    def _passes(self) -> list[int]:
        """How many tokens each compute pass of the native call had."""
        columns, config, info = self.columns, self.session.client.config, self.session.client.info
        try:
            if info.recurrent and self.options.embeddings:
                pieces = split_seq(columns, config.n_ubatch)
            elif info.recurrent or config.n_seq_max > 1:
                pieces = split_equal(columns, config.n_ubatch, sequential=not info.recurrent)
            else:
                pieces = split_simple(columns, config.n_ubatch)
        except InputError:  # llama.cpp would have returned 1
            return []
        return [len(piece) for piece in pieces]


@dataclass(frozen=True)
class FreshCall:
    """Runs a batch from empty memory."""

    client: DecodeClient
    columns: Columns
    options: DecodeOptions

    def run(self, chunk: int = 0) -> Rows:
        """See `LadderCall`."""
        return self.client.send(self.columns, self.options, chunk)

    def alone(self, seq_id: int) -> Self:
        """See `LadderCall`."""
        return replace(self, columns=self.columns.alone(seq_id))

    def record(self, chunk: int = 0) -> BatchRecord:
        """See `LadderCall`."""
        operation = "encode" if self.options.encode else "decode"
        return batch_record(self.columns, operation, chunk=chunk, embeddings=self.options.embeddings)


class EncodeCall(FreshCall):
    """Encodes a batch. Without an encoder, encoding a sequence alone is decoding, with a row per token."""

    def alone(self, seq_id: int) -> Self:
        """See `LadderCall`."""
        options = replace(self.options, encode=self.client.info.has_encoder)
        return replace(super().alone(seq_id), options=options)


class SingleCall(FreshCall):
    """Decodes in a cell of one sequence, which is number 0 there."""

    def run(self, chunk: int = 0) -> Rows:
        """See `LadderCall`."""
        return self.client.send(self.columns.renamed(0), self.options, chunk)
