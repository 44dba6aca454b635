"""Child side: a prefix that several prompts share is computed once, and copied.

Facts are those of llama.cpp 0c1e57098.
"""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.engine.context import Context

# So many tokens of a sequence, and more, in one native call are rounded otherwise than fewer, with flash
# attention on a CPU (GGML_FA_TILE_Q, ggml/src/ggml-cpu/ops.cpp). So each token is always computed in the same
# of the two ways: a prompt in whole tiles from its beginning; what remains and what was drawn in less.
TILE = 64
_WORTH = 64  # a copy takes the time of computing one token of this many that a sequence has room for


@dataclass(eq=False)
class CachedSequence:
    """The tokens of a sequence, and how many of them its place in memory holds."""

    seq_id: int
    tokens: npt.NDArray[np.int32]  # the first ``n_tokens`` of it count
    n_tokens: int
    n_prompt: int  # the first of them; the others were drawn
    wanted: int  # from this one on all are computed, for their logits
    position: int = 0  # so many are in memory
    cached: int = 0  # so many were there, when it was placed
    placed: bool = False
    ended: bool = False  # what is in memory stays there until its place is taken
    waits_for: CachedSequence | None = None
    until: int = 0  # that one holds so many

    @property
    def pending(self) -> int:
        """Tokens that are not in memory yet."""
        return self.n_tokens - self.position

    @property
    def tiled(self) -> int:
        """Tokens of the prompt that are computed in whole tiles."""
        return self.n_prompt - self.n_prompt % TILE

    def append(self, token: int) -> None:
        """One more token."""
        if self.n_tokens == len(self.tokens):
            self.tokens = np.resize(self.tokens, 2 * self.n_tokens)
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1


class PrefixCache:
    """What the memory holds at each place: of the sequence that runs there, or of the last one that did.

    Args:
        cell: Model and context.
    """

    def __init__(self, cell: Context) -> None:
        info = cell.info()
        self._cell = cell
        # A recurrent state has no prefixes; with an encoder, what is held depends on more than the tokens.
        self._shared = not (info.recurrent or info.has_encoder) and info.n_pos_per_embd == 1
        self._worth = max(1, info.n_ctx_seq // _WORTH)
        self._lines: dict[int, CachedSequence] = {}

    def clear(self) -> None:
        """Trust nothing that is in memory."""
        self._lines.clear()

    def place(self, line: CachedSequence) -> bool:
        """Give a prompt its place, with what the memory holds of it already.

        Returns:
            False if it is to wait, since another prompt that is being read will hold more of it.
        """
        if line.placed:
            return True
        if not self._shared:
            return self._take(line, 0)
        other = line.waits_for
        if other and not other.ended and other.position < line.until:
            return False
        keep, donor = self._held(line)
        line.waits_for, line.until = self._coming(line)
        if line.waits_for and line.until >= keep + self._worth:
            return False
        if donor != line.seq_id:
            self._cell.copy(donor, line.seq_id)
        return self._take(line, keep)

    def _take(self, line: CachedSequence, keep: int) -> bool:
        if not C.llama_memory_seq_rm(self._cell.memory, line.seq_id, keep, -1):
            C.llama_memory_seq_rm(self._cell.memory, line.seq_id, -1, -1)
            keep = 0
        line.position, line.placed, line.waits_for = keep, True, None
        line.cached = keep
        self._lines[line.seq_id] = line
        return True

    def _held(self, line: CachedSequence) -> tuple[int, int]:
        """How many tokens of a prompt the memory holds, and in which place: its own one, if in doubt."""
        common = {
            seq_id: _usable(other, other.position, line)
            for seq_id, other in self._lines.items()
            # A sliding window forgets: what begins later than at 0 is no prefix.
            if C.llama_memory_seq_pos_min(self._cell.memory, seq_id) == 0
        }
        own = common.get(line.seq_id, 0)
        donor = max(common, key=common.__getitem__, default=line.seq_id)
        if common and common[donor] >= own + self._worth:
            return common[donor], donor
        return own, line.seq_id

    def _coming(self, line: CachedSequence) -> tuple[CachedSequence | None, int]:
        """The prompt being read that has most in common with this one, and how much that is."""
        best: CachedSequence | None = None
        most = 0
        for other in self._lines.values():
            if not other.ended and other.pending > 1 and (n := _usable(other, other.n_tokens, line)) > most:
                best, most = other, n
        return best, most


def _usable(held: CachedSequence, n_held: int, line: CachedSequence) -> int:
    """Of the tokens that both begin with, those that are computed alike in both."""
    n = _common(held, n_held, line)
    if held.n_prompt == line.n_prompt:
        return n
    n = min(n, held.tiled, line.tiled)
    return n - n % TILE


def _common(held: CachedSequence, n_held: int, line: CachedSequence) -> int:
    """Tokens that both begin with, but for those of the new one that are to be decoded, for their logits."""
    n = min(n_held, line.wanted)
    if n < 1:
        return 0
    differs = held.tokens[:n] != line.tokens[:n]
    at = int(differs.argmax())
    return at if differs[at] else n
