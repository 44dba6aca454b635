"""Child side: the generation loop. Prompts join free sequences, all sequences share each native call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.protocol import Generated, Join, Progress

if TYPE_CHECKING:
    from crumplezone.workers.native import LlamaCell

_PIECE_MAX = 4096


class NonFiniteError(Exception):
    """The logits of a sequence hold NaN or infinity: no token can be drawn from them."""


@dataclass
class _Sequence:
    join: Join
    pending: npt.NDArray[np.int32]  # not yet decoded
    position: int = 0
    left: int = 0
    tokens: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    finished: Literal["", "stop", "length"] = ""


def sample(logits: npt.NDArray[np.float32], temperature: float, seed: int, position: int) -> int:
    """Greedy, or by the Gumbel-max trick with noise that depends on seed and position alone.

    So a sequence that is continued elsewhere after a crash draws the same tokens as it would have here.
    """
    if temperature <= 0:
        return int(logits.argmax())
    random = np.random.Generator(np.random.Philox(key=seed, counter=position))
    noise = -np.log(-np.log(random.random(len(logits), dtype=np.float32) + 1e-20) + 1e-20)
    return int((logits / np.float32(temperature) + noise).argmax())


class Engine:
    """Running sequences over one context.

    Args:
        cell: The model and context to run on.
    """

    def __init__(self, cell: LlamaCell) -> None:
        self._cell = cell
        self._running: dict[int, _Sequence] = {}
        self._piece = ctypes.create_string_buffer(_PIECE_MAX)

    def reset(self) -> None:
        """Forget every sequence."""
        self._running.clear()

    def join(self, join: Join, tokens: npt.NDArray[np.int32]) -> None:
        """Let a prompt take a sequence."""
        C.llama_memory_seq_rm(self._cell.memory, join.seq_id, -1, -1)
        self._running[join.seq_id] = _Sequence(join, tokens, left=join.max_tokens)

    def generate(self, batch: list[npt.NDArray[Any]], steps: int) -> Generated:
        """Run up to ``steps`` native calls; stops early when every sequence has finished."""
        moved: dict[int, _Sequence] = {}
        rc = 0
        for _ in range(steps):
            active = [s for s in self._running.values() if not s.finished]
            if not active:
                break
            rc = self._step(batch, active)
            moved.update((s.join.seq_id, s) for s in active)
            # A finished sequence is told at once: its place may be wanted.
            if rc or any(s.finished for s in active):
                break
        progress = [Progress(i, s.tokens, bytes(s.text), s.finished) for i, s in moved.items()]
        for seq_id, sequence in moved.items():
            sequence.tokens, sequence.text = [], bytearray()
            if sequence.finished:
                del self._running[seq_id]
        return Generated(rc, progress)

    def _step(self, batch: list[npt.NDArray[Any]], active: list[_Sequence]) -> int:
        recorder = self._cell.recorder
        with recorder.phase("build", len(active)):
            used, ready = self._build(batch, active)
        batch[4][:used] = 1
        rc = self._cell.run(batch, 0, used)
        if rc == 0:
            with recorder.phase("sample", len(ready)):
                for sequence, index in ready:
                    self._take(sequence, index)
        return rc

    def _build(
        self, batch: list[npt.NDArray[Any]], active: list[_Sequence]
    ) -> tuple[int, list[tuple[_Sequence, int]]]:
        """Fill the batch; returns how much of it is used, and whose next token comes from which output."""
        tokens, positions, seq_ids, outputs, n_seq_id, _ = batch
        n_seq_id[:] = 0  # 1 for what is sent: after a crash, this says how much that was
        capacity, used = len(tokens), 0
        ready: list[tuple[_Sequence, int]] = []
        # Sequences that generate (one token) go before prompts, which fill what is left.
        for sequence in sorted(active, key=lambda s: len(s.pending)):
            n = min(len(sequence.pending), capacity - used)
            end = used + n
            tokens[used:end] = sequence.pending[:n]
            positions[used:end] = np.arange(sequence.position, sequence.position + n)
            seq_ids[used:end] = sequence.join.seq_id
            outputs[used:end] = 0
            sequence.pending = sequence.pending[n:]
            sequence.position += n
            used = end
            if n and not len(sequence.pending):
                outputs[end - 1] = 1
                ready.append((sequence, end - 1))
        return used, ready

    def _take(self, sequence: _Sequence, index: int) -> None:
        """Sample the next token of a sequence, and see whether it has finished."""
        pointer = C.llama_get_logits_ith(self._cell.context, index)
        logits = np.ctypeslib.as_array(pointer, (self._cell.info().n_vocab,))
        join = sequence.join
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"NaN or infinity in the logits after position {sequence.position - 1}")
        token = sample(logits, join.temperature, join.seed, sequence.position)
        if C.llama_vocab_is_eog(self._cell.vocab, token):
            sequence.finished = "stop"
            return
        sequence.tokens.append(token)
        n = C.llama_token_to_piece(self._cell.vocab, token, self._piece, _PIECE_MAX, 0, False)
        sequence.text += self._piece.raw[: max(n, 0)]
        sequence.left -= 1
        sequence.pending = np.array([token], np.int32)
        if sequence.left <= 0:
            sequence.finished = "length"
