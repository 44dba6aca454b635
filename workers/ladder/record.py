"""A batch as a report keeps it."""

from __future__ import annotations

import numpy as np

from crumplezone.reports.records.report import (
    BatchRecord,
)
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.memory.journal import Journal


def batch_record(
    columns: Columns,
    operation: str,
    *,
    chunk: int = 0,
    embeddings: bool = False,
    journal: Journal | None = None,
) -> BatchRecord:
    """A batch as a report keeps it, with what the memory held before, if there was any."""
    held, held_more = journal.plain() if journal else ([], False)
    counts, begins = np.maximum(columns.n_seq_id, 0).tolist(), columns.begins.tolist()
    flat = columns.seq_ids.tolist()
    several = [i for i, count in enumerate(counts) if count != 1]
    first = [flat[begin] if count else -1 for begin, count in zip(begins, counts, strict=True)]
    return BatchRecord(
        tokens=[-1] * len(columns) if columns.tokens is None else columns.tokens.tolist(),
        positions=columns.positions.tolist(),
        seq_ids=first,
        outputs=columns.outputs.astype(bool).tolist(),
        operation=operation,
        chunk=chunk,
        embeddings=embeddings,
        shared={str(i): flat[begins[i] + 1 : begins[i] + counts[i]] for i in several},
        nulls=sorted(columns.nulls),
        n_embd=0 if columns.embd is None else columns.embd.shape[1],
        held=held,
        held_more=held_more,
    )
