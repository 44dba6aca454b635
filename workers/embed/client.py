"""Supervisor side: one embedding cell, the context that a call needs, and typed calls on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from crumplezone.errors import CellRefused, ContextError, InputError
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.columns import Columns, Float32, Int32
from crumplezone.workers.cells.client import CellClient
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.embed.packing import Pooling, shaped
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.embed import (
    TOKENS_OVER,
    Embed,
    EmbedConfig,
    Embedded,
    EmbedInfo,
    Reshape,
    TextsTokenized,
    TokenizeTexts,
    text_shapes,
    vector_shapes,
)


class EmbedClient(CellClient[EmbedInfo]):
    """An embedding cell, replaced when it has died. Every call starts from empty memory.

    Args:
        config: Model and context of the decoder. Keys and values get no more room here than they have there.
        limits: Of every call and every cell.
        reporter: Where a crash of the loader is reported; None to raise it as it is.
        zygote: What cells are forked from; None to spawn them.
        spares: Warm cells to hold ready.

    Attributes:
        given: Of the decoder.
        config: The context of the latest call.
    """

    def __init__(
        self,
        config: CellConfig,
        limits: Limits,
        reporter: Reporter | None,
        *,
        zygote: Zygote | None = None,
        spares: int = 0,
    ) -> None:
        self.given = config
        self._base = self.config = shaped(config, 1, cached=True)
        source = CellSource("embed", self._base, limits, reporter, zygote, spares)
        super().__init__(source, EmbedInfo, limits.deadline)
        self._own: Pooling | Literal["rank"] = "mean"

    @property
    def longest(self) -> int:
        """Most tokens of one text: it has to fit into one native call."""
        most = min(self.given.n_batch, self.given.n_ctx)
        # An encoder has learned its positions, or was trained on no more: llama.cpp would abort, or be wrong.
        trained = self.info.learned_positions or not self.info.cached
        return min(most, self.info.n_ctx_train) if trained else most

    def start(self) -> Cell:
        """The running cell; a new one if there is none.

        Raises:
            ModelError, CrumplezoneError, CellDied, UsageError: As `CellSource.start`.
            InputError: This kind of model has no pooled embeddings.
        """
        cell = super().start()
        if self.info.has_encoder:
            limit = "has an encoder apart (T5), which is not pooled: Decoder.encode gives a row per token"
            raise InputError("model", self.config.model, limit)
        return cell

    def _began(self) -> None:
        self._own, self.config = self.info.pooling, self._base
        if self._own != "rank":
            self.config = msgspec.structs.replace(self._base, pooling=self._own)

    def pooling(self, asked: str | None) -> Pooling:
        """The pooling that was asked for, or the model's own.

        Raises:
            InputError: There is none such, or the model's own gives no vectors.
        """
        match self._own if asked is None else asked:
            case "mean" | "cls" | "last" as pooling:
                return pooling
            case "rank":
                limit = "scores pairs of texts and gives no vectors; ask for 'mean', 'cls' or 'last'"
                raise InputError("pooling", "rank", limit)
        raise InputError("pooling", asked, "must be 'mean', 'cls', 'last', or None for the model's own")

    def tokenize(self, texts: Sequence[bytes]) -> list[Int32]:
        """Token ids of each text (UTF-8), with those that the model puts around a text.

        Raises:
            CellDied: The cell was lost.
        """
        cell, n_bytes = self.start(), sum(map(len, texts))
        sizes, counts, raw, tokens = cell.arrays(text_shapes(len(texts), n_bytes))
        sizes[:] = [len(text) for text in texts]
        raw[:] = np.frombuffer(b"".join(texts), np.uint8)
        self._call(TokenizeTexts(len(texts), n_bytes), TextsTokenized)
        counts = counts.copy()  # whatever the cell still writes
        if (counts < 0).any() or (counts > [len(text) + TOKENS_OVER for text in texts]).any():
            raise self._lie("made more tokens of a text than it can have")
        found = tokens[: counts.sum()].copy()
        if len(found) and not 0 <= found.min() <= found.max() < self.info.n_vocab:
            raise self._lie("made tokens that are not in the vocabulary")
        return np.split(found, np.cumsum(counts)[:-1])

    def embed(self, config: EmbedConfig, columns: Columns, vectors: Float32, rows: Sequence[int]) -> None:
        """One native call over whole texts.

        Args:
            config: The context that it takes, see `plan`.
            columns: Text ``i`` as sequence ``i``.
            vectors: float32, shape (n, n_embd), for the results.
            rows: Where in it each text's vector belongs.

        Raises:
            RefusedError: The return code was not 0.
            ContextError: No such context can be made.
            CellDied: The cell was lost.
        """
        cell = self._reshaped(config)
        request = Embed(len(columns), len(rows))
        *batch, found = cell.arrays(vector_shapes(len(columns), len(rows), self.info.n_embd))
        columns.fill(BatchArrays(*batch))
        self._check(self._call(request, Embedded).rc)
        vectors[rows] = found.reshape(len(rows), -1)
        self._finite(vectors[rows], "vector of sequence")

    def _reshaped(self, config: EmbedConfig) -> Cell:
        """The running cell, with this context."""
        cell = self.start()
        if self.config != config:
            self.config = config
            try:
                self._info = self._call(Reshape(config), EmbedInfo)
            except CellRefused as refused:
                self.discard_cell()  # it has no context at all
                raise ContextError(config.model, f"no such context can be made: {refused}") from refused
        return cell
