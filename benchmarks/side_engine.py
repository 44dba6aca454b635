"""The engine without supervision, in this process. ``side_engine MODEL WIDTH N_CTX_SEQ THREADS``."""

from __future__ import annotations

import heapq
import socket
import sys
import time
from collections import deque
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.peer import serve
from crumplezone.sandbox.child.loop import Room
from crumplezone.sandbox.ipc.arena import Arena
from crumplezone.workers.generate.flight.recovery import STEPS
from crumplezone.workers.model.settings import configure
from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.generate.messages import Generate, Join
from crumplezone.workers.protocol.generate.sampling import Sampling
from crumplezone.workers.protocol.messages import Tokenize

N_BATCH = 2048


class InProcessEngine:
    """`DecodeCell` as a cell has it, but called directly.

    Args:
        path: The model.
        width: Sequences at a time.
        n_ctx_seq: Tokens of context for each.
        threads: Compute threads.
    """

    def __init__(self, path: str, width: int, n_ctx_seq: int, threads: int) -> None:
        config = configure(
            path,
            n_ctx=width * n_ctx_seq,
            n_batch=N_BATCH,
            n_ubatch=512,
            n_seq_max=width,
            n_threads=threads,
            n_gpu_layers=0,
        )
        self._width, self._arena = width, Arena()
        unused, _ = socket.socketpair()
        room = Room(self._arena, unused, self._arena.recorder(), _never_asks)
        self._cell = DecodeCell(msgspec.Raw(msgspec.msgpack.encode(config)), room)

    def complete(self, prompts: list[str], max_tokens: int) -> tuple[int, float]:
        """How many tokens it made, in how many seconds."""
        start = time.perf_counter()
        queue = deque(self._tokenize(prompt) for prompt in prompts)
        free, made, first = list(range(self._width)), 0, True
        while queue or len(free) < self._width:
            joining = [queue.popleft() for _ in range(min(len(free), len(queue)))]
            # The lowest first, as `Generation` does: llama.cpp computes only neighbours together.
            sampling = Sampling(max_tokens)
            joins = [Join(heapq.heappop(free), len(tokens), len(tokens), sampling) for tokens in joining]
            request, encoded = Generate.of(joins, STEPS, N_BATCH, reset=first)
            _, room, rooms = request.arrays(self._arena)
            room[:] = np.frombuffer(encoded, np.uint8)
            for place, tokens in zip(rooms, joining, strict=True):
                place[:] = tokens
            generated: Any = self._cell.handle(request)
            if generated.rc:
                raise RuntimeError(f"llama_decode returned {generated.rc}")
            made += sum(len(progress.tokens) for progress in generated.progress)
            for progress in generated.progress:
                if progress.finished:
                    heapq.heappush(free, progress.seq_id)
            first = False
        return made, time.perf_counter() - start

    def _tokenize(self, prompt: str) -> npt.NDArray[np.int32]:
        raw = np.frombuffer(prompt.encode(), np.uint8)
        self._arena.reserve([("i4", len(raw) + 16)])
        self._arena.arrays([("u1", len(raw))])[0][:] = raw
        tokenized: Any = self._cell.handle(Tokenize(len(raw)))
        return self._arena.arrays([("i4", tokenized.n_tokens)])[0].copy()


def _never_asks(question: msgspec.Struct) -> msgspec.Raw:
    raise AssertionError(f"a llama.cpp cell asks nothing: {question}")


def main() -> None:
    """Load, and answer."""
    path, *numbers = sys.argv[1:]
    serve(lambda: {"complete": InProcessEngine(path, *map(int, numbers)).complete})


if __name__ == "__main__":
    main()
