"""What supervision costs: `Decoder.decode` against the same `llama_decode` in this process.

Both sides have the same model, parameters, tokens and outputs, empty the memory before each decode, and
end with the logits rows in an array of the caller's own. The in-process batch is filled before the clock
starts, the supervised one after: a difference that is on purpose, and in favour of the in-process side.
They run alternately, in pairs whose order changes, so that a drift of the machine meets both sides alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from crumplezone import Batch, Decoder, Result, embedded_model

SEQUENCES = (1, 4, 16)
TOKENS = 128  # per sequence
CTX_PER_SEQUENCE = 256
N_BATCH, N_UBATCH = 2048, 512
WARM_UP = 1  # untimed pairs per row, which also check that both sides give the same logits
AIM = 1.02  # median of supervised / in-process

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """Seconds of each pair, for one number of sequences."""

    n_seq: int
    in_process: list[float]
    supervised: list[float]

    @property
    def ratios(self) -> list[float]:
        """Supervised over in-process, pair by pair."""
        return [ours / bare for ours, bare in zip(self.supervised, self.in_process, strict=True)]


class InProcess:
    """llama.cpp in this very process, with nothing around it.

    Args:
        model: A loaded llama.cpp model.
        sequences: Tokens of each sequence, int32, shape (n_seq, n_tokens).
        n_threads: As in the supervised cell.
    """

    def __init__(self, model: Any, sequences: npt.NDArray[np.int32], n_threads: int) -> None:
        n_seq, n_tokens = sequences.shape
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CTX_PER_SEQUENCE * n_seq, n_seq
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = False
        self._context = C.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama_init_from_model returned NULL")
        self._memory = C.llama_get_memory(self._context)
        self._n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
        self._outputs = [(seq_id + 1) * n_tokens - 1 for seq_id in range(n_seq)]
        self._batch = C.llama_batch_init(n_seq * n_tokens, 0, 1)
        self._batch.n_tokens = n_seq * n_tokens
        for i, token in enumerate(sequences.ravel().tolist()):
            self._batch.token[i], self._batch.pos[i] = token, i % n_tokens
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, i // n_tokens
            self._batch.logits[i] = i % n_tokens == n_tokens - 1

    def decode(self) -> Rows:
        """Decode from empty memory and copy the logits, float32, shape (n_seq, n_vocab)."""
        C.llama_memory_clear(self._memory, True)
        rc = C.llama_decode(self._context, self._batch)
        if rc:
            raise SystemExit(f"llama_decode returned {rc}")
        rows = np.empty((len(self._outputs), self._n_vocab), np.float32)
        for row, index in zip(rows, self._outputs, strict=True):
            row[:] = np.ctypeslib.as_array(C.llama_get_logits_ith(self._context, index), (self._n_vocab,))
        return rows

    def close(self) -> None:
        """Free the batch and the context."""
        C.llama_batch_free(self._batch)
        C.llama_free(self._context)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(path: Path, model: Any, n_seq: int, pairs: int, n_threads: int, reports: str) -> Row:
    n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    sequences = np.random.default_rng(n_seq).integers(0, n_vocab, (n_seq, TOKENS), np.int32)
    bare = InProcess(model, sequences, n_threads)
    with Decoder(
        path,
        n_ctx=CTX_PER_SEQUENCE * n_seq,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        n_seq_max=n_seq,
        n_threads=n_threads,
        safe_fallback=False,  # a fallback would be measured as if it were the native rung
        reports=reports,
    ) as decoder:

        def supervised() -> Result:
            decoder.memory.clear()
            return decoder.decode(Batch.of(sequences))

        for _ in range(WARM_UP):
            expected, got = bare.decode(), supervised()
            if not all(np.array_equal(expected[i], got.logits(i)) for i in range(n_seq)):
                raise SystemExit(f"{n_seq} sequences: the two sides gave different logits")
        row = Row(n_seq, [], [])
        for pair in range(pairs):
            sides = [(row.in_process, bare.decode), (row.supervised, supervised)]
            for seconds, work in sides if pair % 2 else sides[::-1]:
                seconds.append(timed(work))
    bare.close()
    return row


def table(rows: list[Row]) -> Table:
    shown = Table(
        "sequences x tokens", "in-process ms", "supervised ms", "ratio", "min-max", "aim", title="Overhead"
    )
    for row in rows:
        ratio = statistics.median(row.ratios)
        shown.add_row(
            f"{row.n_seq} x {TOKENS}",
            f"{statistics.median(row.in_process) * 1000:.2f}",
            f"{statistics.median(row.supervised) * 1000:.2f}",
            f"{ratio:.3f}",
            f"{min(row.ratios):.3f}-{max(row.ratios):.3f}",
            f"<= {AIM}: {'met' if ratio <= AIM else 'not met'}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what supervision costs.")
    parser.add_argument("--pairs", type=int, default=12, help="timed pairs per row (default 12)")
    threads = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=threads, help="compute threads on each side")
    options = parser.parse_args()
    console = Console()
    silence = C.llama_log_callback(lambda *_: None)  # must outlive every call
    C.llama_log_set(silence, None)
    C.llama_backend_init()
    path = embedded_model()
    model = C.llama_model_load_from_file(str(path).encode(), C.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    with tempfile.TemporaryDirectory() as reports:
        rows = []
        for n_seq in SEQUENCES:
            with console.status(f"{n_seq} x {TOKENS} tokens, {options.pairs} pairs"):
                rows.append(measure(path, model, n_seq, options.pairs, options.threads, reports))
    console.print(table(rows))
    C.llama_model_free(model)


if __name__ == "__main__":
    main()
