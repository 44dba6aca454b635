"""Child side: the generation loop. Prompts join free sequences, all sequences share each native call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.engine.context import Context
from crumplezone.workers.native.engine.prefix import CachedSequence, PrefixCache
from crumplezone.workers.native.engine.sampler import Sampler
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.generate.messages import BESIDE, Generated, Join, Progress

_GROUP_S = 0.25  # after so long, what has been drawn is told
_PIECE_MAX = 4096


class NonFiniteError(Exception):
    """The likeliest token of a sequence has NaN or infinity for a logit: none can be drawn."""


@dataclass(eq=False, kw_only=True)
class _Sequence(CachedSequence):
    sampler: Sampler | None  # None: the likeliest token, which `Engine` finds faster
    left: int  # tokens still to draw
    begun: bool = False  # the first was drawn
    drawn: list[int] = field(default_factory=list)  # since the latest reply
    text: bytearray = field(default_factory=bytearray)
    finished: Literal["", "stop", "length"] = ""


class Engine:
    """Running sequences over one context.

    Args:
        cell: The model and context to run on.
        nudged: Whether the supervisor would like to be answered.
    """

    def __init__(self, cell: Context, nudged: Callable[[], bool]) -> None:
        self._cell, self._nudged = cell, nudged
        self._n_vocab = cell.info().n_vocab
        self._running: dict[int, _Sequence] = {}  # in the order in which they came
        self._places = PrefixCache(cell)
        self._room = ctypes.create_string_buffer(_PIECE_MAX)
        self._pieces: dict[int, bytes | None] = {}

    def reset(self) -> None:
        """Forget every sequence, and what the memory holds."""
        for seq_id in list(self._running):
            self.leave(seq_id)
        self._places.clear()

    def join(self, join: Join, tokens: npt.NDArray[np.int32]) -> None:
        """Let a prompt take a sequence.

        Args:
            join: Which, and how to draw.
            tokens: int32, shape (n,), n >= 1; the engine's own.
        """
        self.leave(join.seq_id)
        self._running[join.seq_id] = _Sequence(
            join.seq_id,
            tokens,
            len(tokens),
            sampler=None if join.sampling.plain else Sampler(join.sampling, self._n_vocab, tokens),
            left=join.sampling.max_tokens,
        )

    def leave(self, seq_id: int) -> None:
        """Give a sequence up, if it runs. What the memory holds of it may still be of use."""
        if sequence := self._running.pop(seq_id, None):
            sequence.ended = True
            if sequence.sampler:
                sequence.sampler.close()

    def generate(self, batch: BatchArrays, steps: int) -> Generated:
        """Run up to ``steps`` native calls, fewer if there is something to tell: see `Generate`."""
        running = list(self._running.values())
        began, rc, calls = time.monotonic(), 0, 0
        for _ in range(steps if running else 0):
            calls += 1
            rc, urgent = self._step(batch, running)
            if rc or urgent or self._nudged() or time.monotonic() - began > _GROUP_S:
                break
        progress = [Progress(s.seq_id, s.drawn, bytes(s.text), s.finished) for s in running]
        for sequence in running:
            sequence.drawn, sequence.text = [], bytearray()
            if sequence.finished:
                self.leave(sequence.seq_id)
        if rc:  # nobody knows what it left in memory
            self.reset()
        return Generated(rc, progress, calls)

    def _step(self, batch: BatchArrays, running: list[_Sequence]) -> tuple[int, bool]:
        """One native call; its return code, and whether a sequence got its first token or its last."""
        recorder = self._cell.recorder
        with recorder.phase("build", len(running)):
            parts = self._build(batch, running)
        used = sum(n for _, n in parts)
        if rc := self._cell.run(batch.part(0, used), 0, used):
            return rc, False
        ready, end = [], 0
        for sequence, n in parts:
            sequence.position += n
            end += n
            if not sequence.pending:
                ready.append((sequence, end - 1))
        if not ready:
            return 0, False
        with recorder.phase("sample", len(ready)):
            return 0, self._draw(ready)

    def _build(self, batch: BatchArrays, running: list[_Sequence]) -> list[tuple[_Sequence, int]]:
        """Fill the batch: sequences that generate, one token each, then prompts. How much it has of each."""
        tokens, positions, seq_ids, outputs, sent, _ = batch
        sent[:] = 0  # 1 for what is sent: after a crash, this says how much that was
        chunk = len(tokens)
        # In order: llama.cpp computes only neighbouring sequences together (llama_batch_allocr::split_equal).
        ready = sorted((s for s in running if s.placed and s.pending == 1), key=attrgetter("seq_id"))[:chunk]
        used = len(ready)
        tokens[:used] = [s.tokens[s.position] for s in ready]
        positions[:used] = [s.position for s in ready]
        seq_ids[:used] = [s.seq_id for s in ready]
        outputs[:used] = 1
        parts = [(s, 1) for s in ready]
        room = min(chunk, used + BESIDE) if used else chunk
        for s in running:
            if used == room:
                break
            if (s.placed and s.pending == 1) or not self._places.place(s):
                continue
            n = min(s.pending, room - used)
            end = used + n
            tokens[used:end] = s.tokens[s.position : s.position + n]
            positions[used:end] = np.arange(s.position, s.position + n)
            seq_ids[used:end] = s.seq_id
            outputs[used:end] = 0
            outputs[end - 1] = n == s.pending
            parts.append((s, n))
            used = end
        sent[:used] = 1
        return parts

    def _draw(self, ready: list[tuple[_Sequence, int]]) -> bool:
        """The next token of sequences whose logits are there, by their index in the batch."""
        context = self._cell.context
        # One row for each output, in the order of the batch (llama_get_logits, include/llama.h).
        rows = np.ctypeslib.as_array(C.llama_get_logits(context), (len(ready), self._n_vocab))
        best = rows.argmax(axis=1)  # the first NaN, if there is one
        finite = np.isfinite(rows[np.arange(len(ready)), best])
        if not finite.all():
            sequence, _ = ready[int(finite.argmin())]
            raise NonFiniteError(f"NaN or infinity in the logits after position {sequence.position - 1}")
        urgent = False
        for (sequence, index), token in zip(ready, best.tolist(), strict=True):
            if sequence.sampler:
                token = sequence.sampler.draw(context, index, sequence.position)
            urgent |= self._take(sequence, token)
        return urgent

    def _take(self, sequence: _Sequence, token: int) -> bool:
        """Add a token to a sequence; whether it is its first, or its last."""
        piece = self._piece(token)
        if piece is None:
            sequence.finished = "stop"
            return True
        sequence.append(token)
        sequence.drawn.append(token)
        sequence.text += piece
        sequence.left -= 1
        if not sequence.left:
            sequence.finished = "length"
        urgent = not (sequence.begun and sequence.left)
        sequence.begun = True
        return urgent

    def _piece(self, token: int) -> bytes | None:
        """The text of a token, or None if it ends a generation."""
        if token not in self._pieces:
            vocab = self._cell.vocab
            n = C.llama_token_to_piece(vocab, token, self._room, _PIECE_MAX, 0, False)
            end = C.llama_vocab_is_eog(vocab, token)
            self._pieces[token] = None if end else self._room.raw[: max(n, 0)]
        return self._pieces[token]
