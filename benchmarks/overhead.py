"""What supervision costs: `Decoder.decode` against the same `llama_decode` in a process of its own.

Both sides have the same model, parameters and tokens; both fill the batch, decode it and end with the rows
of logits in an array of the caller's own, all of it timed. The last rows must be equal, bit for bit.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.models import model
from benchmarks.pairing import Box, alternate, ratio
from benchmarks.peer import Peer
from benchmarks.rows import OVERHEAD, OVERHEAD_FROM_MS, Plan, Row, Yield
from benchmarks.shape import Shape
from crumplezone import Batch, Decoder

SEQUENCES = (1, 4, 16)
STEPS, PROMPT = 16, 128
_LEFT_OUT = "left out of a quick run"
N_CTX_SEQ = 256


class Supervised:
    """As `side_decode.InProcess`, through a `Decoder`."""

    def __init__(self, path: Path, n_seq: int, n_ctx_seq: int, threads: int) -> None:
        self._reports = tempfile.TemporaryDirectory()
        self.decoder = Decoder(
            path,
            n_ctx=n_seq * n_ctx_seq,
            n_batch=n_seq * n_ctx_seq,
            n_seq_max=n_seq,
            n_threads=threads,
            safe_fallback=False,  # a fallback would be measured as if it were the native rung
            reports=self._reports.name,
        )

    def block(self, n_seq: int, n_tokens: int, calls: int) -> tuple[list[float], str]:
        """Seconds of each call from empty memory on, and a digest of the last logits."""
        self.decoder.memory.clear()
        seconds = []
        for tokens in Shape(n_seq, n_tokens, calls, self.decoder.info.n_vocab).calls_tokens():
            start = time.perf_counter()
            result = self.decoder.decode(Batch.of(tokens))
            rows = [result.logits(seq_id) for seq_id in range(n_seq)]
            seconds.append(time.perf_counter() - start)
        return seconds, hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()

    def close(self) -> None:
        """End the cells."""
        self.decoder.close()
        self._reports.cleanup()


class Pair:
    """Both sides over one model.

    Raises:
        PeerError: The in-process side cannot be had.
    """

    def __init__(self, stack: ExitStack, path: Path, n_seq: int, n_ctx_seq: int, threads: int) -> None:
        self.bare = stack.enter_context(Peer("side_decode", path, n_seq, n_ctx_seq, threads))
        self.supervised = Supervised(path, n_seq, n_ctx_seq, threads)
        stack.callback(self.supervised.close)

        self.compare(1, 16, 1, Box(0, least=1))  # warm up

    def compare(
        self, n_seq: int, n_tokens: int, calls: int, box: Box, *others: Callable[[], float]
    ) -> list[list[float]]:
        """Seconds of a call, median of each block: supervised, in-process, and what else takes its turn.

        Raises:
            ArithmeticError: The two sides computed something else.
        """
        shape = {"n_seq": n_seq, "n_tokens": n_tokens, "calls": calls}
        digests: set[str] = set()

        def block(side: Callable[..., tuple[list[float], str]]) -> float:
            seconds, digest = side(**shape)
            digests.add(digest)
            return statistics.median(seconds)

        sides: list[Callable[[], float]] = [
            partial(block, self.supervised.block),
            partial(block, partial(self.bare.ask, "block")),
            *others,
        ]
        found = alternate(sides, box)
        if len(digests) != 1:
            raise ArithmeticError(f"{n_seq} x {n_tokens} tokens: the two sides gave different logits")
        return found


def rows(plan: Plan) -> Iterator[Yield]:
    """A row for generation steps and one for prompts, for each number of sequences."""
    for n_seq in SEQUENCES:
        with ExitStack() as stack:
            pair = Pair(stack, model("Q4_1", plan.cache), n_seq, N_CTX_SEQ, plan.threads)
            yield _row(plan, pair, f"{n_seq} x 1 token", n_seq, 1, STEPS)
            if plan.quick and n_seq > 4:
                yield Row(
                    "overhead",
                    f"supervised / in-process, {n_seq} x {PROMPT} tokens",
                    None,
                    "x",
                    note=_LEFT_OUT,
                )
            else:
                yield _row(plan, pair, f"{n_seq} x {PROMPT} tokens", n_seq, PROMPT, 1)


def _row(plan: Plan, pair: Pair, name: str, n_seq: int, n_tokens: int, calls: int) -> Row:
    ours, theirs = pair.compare(n_seq, n_tokens, calls, plan.box(15))
    ours_ms, theirs_ms = statistics.median(ours) * 1000, statistics.median(theirs) * 1000
    note = f"{ours_ms:.2f} / {theirs_ms:.2f} ms a call, {len(ours)} rounds"
    aim = OVERHEAD if theirs_ms >= OVERHEAD_FROM_MS else None
    return Row("overhead", f"supervised / in-process, {name}", ratio(ours, theirs), "x", aim, note)
