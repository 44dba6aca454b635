"""Child side: the generation loop. Prompts join free sequences, all sequences share each native call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from operator import attrgetter

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.engine.context import Context
from crumplezone.workers.native.engine.logprobs import logprob
from crumplezone.workers.native.engine.prefix import TILE, PrefixCache
from crumplezone.workers.native.engine.sampler import END, Sampler, Vocabulary
from crumplezone.workers.native.engine.sequence import RunningSequence, StopStrings
from crumplezone.workers.native.grammar import GrammarError
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.generate.messages import (
    BESIDE,
    OUTPUTS,
    PROBLEM_MAX,
    Generated,
    Join,
    Progress,
)

_GROUP_S = 0.25  # after so long, what has been drawn is told
_PIECE_MAX = 4096
_NUMBERS_MAX = 6800  # probabilities in a reply, of 15 bytes each: with those of 256 sequences it fits a frame

_Part = tuple[RunningSequence, int, int]  # of a batch: tokens of a sequence, and how many of them with logits


class NonFiniteError(Exception):
    """The likeliest token of a sequence has NaN or infinity for a logit: none can be drawn."""


class Engine:
    """Running sequences over one context.

    Args:
        cell: The model and context to run on.
        nudged: Whether the supervisor would like to be answered.
    """

    def __init__(self, cell: Context, nudged: Callable[[], bool]) -> None:
        self._cell, self._nudged = cell, nudged
        self._vocabulary = Vocabulary(cell.vocab, cell.logs)
        self._n_vocab = self._vocabulary.n_tokens
        self._logits = self._beside = 0
        self._n_ubatch = int(C.llama_n_ubatch(cell.context))
        self._running: dict[int, RunningSequence] = {}  # in the order in which they came
        self._refused: list[Progress] = []
        self._places = PrefixCache(cell)
        self._room = ctypes.create_string_buffer(_PIECE_MAX)
        self._pieces: dict[int, tuple[bytes, bool]] = {}

    def close(self) -> None:
        """Free what is native. Idempotent."""
        self.reset()
        self._vocabulary.close()

    def reset(self) -> None:
        """Forget every sequence, and what the memory holds."""
        for seq_id in list(self._running):
            self.leave(seq_id)
        self._places.clear()
        self._refused = []

    def join(self, join: Join, tokens: npt.NDArray[np.int32]) -> None:
        """Let a prompt take a sequence, or tell with the next reply why not.

        Args:
            join: Which, and how to draw.
            tokens: int32, shape (n,), n >= 1; the engine's own.
        """
        self.leave(join.seq_id)
        drawn = tokens[join.n_prompt :].tolist()
        try:
            sampler = self._sampler(join, drawn)
        except GrammarError as error:
            problem = str(error)[:PROBLEM_MAX]
            self._refused.append(Progress(join.seq_id, [], b"", "refused", problem=problem))
            return
        text = b"".join(self._piece(token)[0] for token in drawn) if join.stops else b""
        self._running[join.seq_id] = RunningSequence(
            join.seq_id,
            tokens,
            len(tokens),
            join.n_prompt,
            join.wanted,
            join=join,
            sampler=sampler,
            left=join.sampling.max_tokens - join.drawn,
            stops=StopStrings(join.stops, text),
        )

    def _sampler(self, join: Join, drawn: list[int]) -> Sampler | None:
        if join.sampling.plain:
            return None
        with self._cell.recorder.phase("grammar" if join.sampling.grammar else "sampler", len(drawn)):
            return Sampler(join.sampling, self._vocabulary, drawn, join.stop_tokens)

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
        progress = [*self._refused, *(sequence.told() for sequence in running)]
        self._refused = []
        for sequence in running:
            if sequence.finished:
                self.leave(sequence.seq_id)
        if rc:  # nobody knows what it left in memory
            self.reset()
        return Generated(rc, progress, calls)

    def _step(self, batch: BatchArrays, running: list[RunningSequence]) -> tuple[int, bool]:
        """Two native calls at most: one for whole tiles of prompts, one for all else.

        Returns:
            The return code, and whether a sequence got its first token or its last.
        """
        urgent = False
        self._logits, self._beside = OUTPUTS, BESIDE  # that prompts may take in this step
        for build in (self._tiles, self._rest):
            with self._cell.recorder.phase("build", len(running)):
                parts = build(batch, running)
            if parts:
                rc, news = self._call(batch, running, parts)
                if rc:
                    return rc, False
                urgent |= news
        return 0, urgent

    def _call(
        self, batch: BatchArrays, running: list[RunningSequence], parts: list[_Part]
    ) -> tuple[int, bool]:
        """One native call; what it returns is that of `_step`."""
        recorder = self._cell.recorder
        used = sum(n for _, n, _ in parts)
        if rc := self._cell.run(batch.part(0, used), 0, used):
            return rc, False
        n_rows = sum(n_logits for _, _, n_logits in parts)
        for sequence, n, _ in parts:
            sequence.position += n
        if not n_rows:
            return 0, False
        with recorder.phase("sample", n_rows):
            urgent = self._look(parts, n_rows)
        return 0, urgent or self._full(running)

    def _full(self, running: list[RunningSequence]) -> bool:
        """Whether one call more might give more probabilities than a reply has room for."""
        most = max(sequence.numbers for sequence in running)
        if not most:
            return False
        told = sum(s.numbers * (len(s.logprobs) + len(s.prompt_logprobs)) for s in running)
        return told + most * (len(running) + OUTPUTS) > _NUMBERS_MAX

    def _tiles(self, batch: BatchArrays, running: list[RunningSequence]) -> list[_Part]:
        """Fill the batch with whole tiles of prompts. What it has of each."""
        batch.n_seq_id[:] = 0  # 1 for what is sent: after a crash, this says how much that was
        beside = any(map(_generates, running))
        # One compute pass: between two, llama.cpp cuts where there is room (llama_batch_allocr::split_equal).
        room = min(len(batch.tokens), self._n_ubatch, self._beside if beside else self._n_ubatch)
        parts: list[_Part] = []
        used = 0
        for s in running:
            if used + TILE > room:
                break
            if s.finished or _generates(s) or not self._places.place(s):
                continue
            n, n_logits = _portion(s, _whole(min(s.n_prompt - s.position, room - used)), self._logits)
            n, n_logits = _whole(n), n_logits - n % TILE
            if n <= 0:
                continue
            self._put(batch, parts, used, s, n, max(n_logits, 0))
            used += n
        batch.n_seq_id[:used] = 1
        return parts

    def _put(
        self, batch: BatchArrays, parts: list[_Part], used: int, s: RunningSequence, n: int, n_logits: int
    ) -> None:
        """Add the next tokens of a prompt, of the last of which the logits are wanted."""
        end = used + n
        batch.tokens[used:end] = s.tokens[s.position : s.position + n]
        batch.positions[used:end] = np.arange(s.position, s.position + n)
        batch.seq_ids[used:end] = s.seq_id
        batch.outputs[used:end] = 0
        batch.outputs[end - n_logits : end] = 1
        parts.append((s, n, n_logits))
        self._beside -= n
        self._logits -= n_logits if s.wanted < s.n_tokens - 1 else 0

    def _rest(self, batch: BatchArrays, running: list[RunningSequence]) -> list[_Part]:
        """Fill the batch: sequences that generate, one token each, then less than a tile of prompts."""
        tokens, positions, seq_ids, outputs, sent, _ = batch
        sent[:] = 0
        chunk = len(tokens)
        # In order: llama.cpp computes only neighbouring sequences together (llama_batch_allocr::split_equal).
        ready = sorted(filter(_generates, running), key=attrgetter("seq_id"))[:chunk]
        used = len(ready)
        tokens[:used] = [s.tokens[s.position] for s in ready]
        positions[:used] = [s.position for s in ready]
        seq_ids[:used] = [s.seq_id for s in ready]
        outputs[:used] = 1
        parts = [(s, 1, 1) for s in ready]
        room = min(chunk, used + self._beside) if used else chunk
        for s in running:
            if used == room:
                break
            if s.finished or _generates(s) or not self._places.place(s):
                continue
            if s.position < s.tiled and chunk >= TILE:  # its turn comes in the next step
                continue
            n, n_logits = _portion(s, min(room - used, TILE - 1), self._logits)
            if n:
                self._put(batch, parts, used, s, n, n_logits)
                used += n
        sent[:used] = 1
        return parts

    def _look(self, parts: list[_Part], n_rows: int) -> bool:
        """Use the logits that are there; whether a sequence got its first token or its last."""
        # One row for each output, in the order of the batch (llama_get_logits, include/llama.h).
        rows = np.ctypeslib.as_array(C.llama_get_logits(self._cell.context), (n_rows, self._n_vocab))
        best = rows.argmax(axis=1)  # the first NaN, if there is one
        finite = np.isfinite(rows[np.arange(n_rows), best])
        urgent, row, end = False, 0, 0
        for sequence, n, n_logits in parts:
            end += n
            for position in range(sequence.position - n_logits, sequence.position):
                if not finite[row]:
                    raise NonFiniteError(f"NaN or infinity in the logits after position {position}")
                if position < sequence.n_tokens - 1:
                    self._look_back(sequence, position, rows[row])
                else:
                    urgent |= self._draw(sequence, end - 1, rows[row], int(best[row]))
                row += 1
        return urgent

    def _look_back(self, sequence: RunningSequence, position: int, row: npt.NDArray[np.float32]) -> None:
        """What is wanted of a token whose successor is known."""
        join, token = sequence.join, int(sequence.tokens[position + 1])
        if position + 1 < join.n_prompt:
            if join.prompt_logprobs:
                sequence.prompt_logprobs.append(logprob(row, token, join.logprobs))
        elif join.sampling.looks_back and sequence.sampler:
            sequence.sampler.again(row, token)

    def _draw(self, sequence: RunningSequence, index: int, row: npt.NDArray[np.float32], best: int) -> bool:
        """The next token of a sequence; whether it is its first, or its last.

        Args:
            sequence: It.
            index: Of its output in the batch.
            row: Its logits.
            best: The likeliest token.
        """
        token = best
        if sequence.sampler:
            token = sequence.sampler.draw(self._cell.context, index, row, best)
        piece, ends = (b"", True) if token == END else self._piece(token)
        if ends or token in sequence.join.stop_tokens:
            sequence.finished = "stop" if ends else "word"
            return True
        sequence.append(token)
        sequence.drawn.append(token)
        sequence.text += piece
        if sequence.join.logprobs >= 0:
            sequence.logprobs.append(logprob(row, token, sequence.join.logprobs))
        sequence.left -= 1
        if sequence.stops.found(piece):
            sequence.finished = "word"
        elif not sequence.left:
            sequence.finished = "length"
        urgent = not sequence.begun or bool(sequence.finished)
        sequence.begun = True
        return urgent

    def _piece(self, token: int) -> tuple[bytes, bool]:
        """The text of a token, and whether it ends a generation."""
        if token not in self._pieces:
            vocab = self._cell.vocab
            n = C.llama_token_to_piece(vocab, token, self._room, _PIECE_MAX, 0, False)
            self._pieces[token] = self._room.raw[: max(n, 0)], bool(C.llama_vocab_is_eog(vocab, token))
        return self._pieces[token]


def _generates(sequence: RunningSequence) -> bool:
    """Whether all of it but its last token is in memory."""
    return sequence.placed and sequence.pending == 1 and not sequence.finished


def _whole(n: int) -> int:
    """So many tokens, in whole tiles."""
    return n - n % TILE


def _portion(sequence: RunningSequence, room: int, logits: int) -> tuple[int, int]:
    """How many tokens of a prompt are read next, and of how many of these the logits are wanted.

    Args:
        sequence: The prompt.
        room: Most tokens.
        logits: Most of them with logits, where others than the last are.
    """
    if sequence.wanted >= sequence.n_tokens - 1:
        n = min(sequence.pending, room)
        return n, int(n == sequence.pending)
    without = max(sequence.wanted - sequence.position, 0)
    n = min(sequence.pending, room, without + logits)
    return n, max(n - without, 0)
