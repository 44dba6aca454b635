"""Child side: generation steps of several widths, timed. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.batch import batch_arrays
from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.messages import Request
from crumplezone.workers.protocol.width import Fill, Filled, Step, Stepped, Weigh, Weighed


class WidthCell(DecodeCell):
    """A `DecodeCell` with a clock.

    One context serves all widths: where each sequence has a stream of its own (kv_unified=False), those that
    are not in the batch cost nothing. Seen: a step in a context of 32 takes as long as in one of just the
    width, to 1%.
    """

    request_type: Any = Request | Weigh | Fill | Step
    _depth = 0

    def handle(self, request: Any) -> msgspec.Struct:
        """Answer one request."""
        match request:
            case Weigh():
                return self._weigh()
            case Fill():
                self._fill(request.depth)
                return Filled()
            case Step():
                return self._step(request)
        return super().handle(request)

    def _weigh(self) -> Weighed:
        if self.info().has_encoder or not self.memory:
            raise ValueError("this kind of model does not generate text")
        self.clear()
        sizes = []
        for _ in range(2):
            took = self._step(Step(1, self.config.n_threads, 1, 0)).nanoseconds
            self._depth += 1  # keep it
            sizes.append(int(C.llama_state_seq_get_size(self.context, 0)))
        return Weighed(sizes[0], max(0, sizes[1] - sizes[0]), took)

    def _fill(self, depth: int) -> None:
        self.clear()
        batch = batch_arrays(depth)
        batch.tokens[:] = self._tokens(depth)
        batch.positions[:] = np.arange(depth)
        batch.outputs[-1] = 1
        self._decode_all(batch)
        self._depth = depth
        for seq_id in range(1, self.config.n_seq_max):
            C.llama_memory_seq_cp(self.memory, 0, seq_id, -1, -1)
        self._step(
            Step(1, self.config.n_threads, 1, 0)
        )  # only the next call makes the copies, and pays for them

    def _step(self, request: Step) -> Stepped:
        n_batch = self.config.n_threads_batch or request.n_threads
        C.llama_set_n_threads(self.context, request.n_threads, n_batch)
        batch = batch_arrays(request.n_seq)
        batch.positions[:] = [self._back(seq_id) for seq_id in range(request.n_seq)]
        batch.seq_ids[:] = np.arange(request.n_seq)
        batch.outputs[:] = 1
        waited, begin, steps, took = _waited(), time.perf_counter_ns(), 0, 0
        while steps == 0 or (steps < request.most and took < request.nanoseconds):
            batch.tokens[:] = self._tokens(request.n_seq, steps)
            self._decode_all(batch)
            batch.positions[:] += 1
            steps, took = steps + 1, time.perf_counter_ns() - begin
        return Stepped(steps, took, max(0, _waited() - waited))

    def _back(self, seq_id: int) -> int:
        """Go back to where `Fill` left a sequence, or to 0 if no part of it can be removed (recurrent)."""
        if not C.llama_memory_seq_rm(self.memory, seq_id, self._depth, -1):
            C.llama_memory_seq_rm(self.memory, seq_id, -1, -1)
        return int(C.llama_memory_seq_pos_max(self.memory, seq_id)) + 1

    def _tokens(self, n: int, step: int = 0) -> npt.NDArray[np.int64]:
        """Tokens that differ: a mixture of experts would be flattered by equal ones, which share theirs."""
        n_vocab = self.info().n_vocab
        return (np.arange(n) * 7919 + step * 104_729 + n_vocab // 2) % n_vocab

    def _decode_all(self, batch: BatchArrays) -> None:
        rc = self.run(batch, 0, len(batch.tokens))
        if rc:
            raise RuntimeError(f"llama_decode returned {rc}")
        C.llama_synchronize(self.context)  # a GPU may still be at it


def _waited() -> int:
    """For how long this thread was ready to run and did not, in nanoseconds; 0 if the kernel does not count.

    The second number of /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst). The threads of a call
    wait for each other, so what holds up one of them holds up all.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
