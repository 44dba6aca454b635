"""The sequences in flight in one cell, and what a reply to `Generate` may say of them."""

from __future__ import annotations

from crumplezone.workers.protocol.generate.messages import Generated, Join, Progress

_TEXT_MAX = 4096  # bytes of a token; one that is cut inside a character comes with the next


class ProgressChecker:
    """Bookkeeping against a cell that invents progress, or claims it for ever without making any.

    Args:
        n_vocab: Token ids are below this.
    """

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._left: dict[int, int] = {}  # by sequence: tokens that it may still produce
        self._prompts: dict[int, int] = {}  # by sequence that has produced none yet: tokens of its prompt
        self._unread = 0  # no fewer of those than the cell has yet to decode

    def join(self, join: Join) -> None:
        """A prompt takes a sequence."""
        self._left[join.seq_id] = join.sampling.max_tokens
        self._prompts[join.seq_id] = join.n_tokens
        self._unread += join.n_tokens

    def leave(self, seq_id: int) -> None:
        """A sequence is given up."""
        self._left.pop(seq_id, None)
        self._read(seq_id)

    def land(self, generated: Generated, chunk: int) -> str:
        """Account for a reply.

        Args:
            generated: The reply.
            chunk: Most tokens per native call. How many calls were made is not known, but one was.

        Returns:
            What no honest cell would have said, or an empty string.
        """
        seq_ids = [progress.seq_id for progress in generated.progress]
        if not self._left and not seq_ids:  # all that were in flight have left
            return ""
        if not seq_ids or len(set(seq_ids)) < len(seq_ids) or not self._left.keys() >= set(seq_ids):
            return f"told of the sequences {seq_ids[:8]}, {sorted(self._left)[:8]} are in flight"
        for progress in generated.progress:
            if problem := self._advance(progress):
                return problem
        if not any(progress.tokens or progress.finished for progress in generated.progress):
            # A call gives a token unless it was full of prompts, and there was more of them. For among the
            # sequences in one call, those that generate come first, and prompts that wait for another's
            # prefix wait for one that is in it.
            if len(self._prompts) < len(self._left) or self._unread <= chunk:
                return "told of no token although every prompt has been read"
            self._unread -= chunk
        return ""

    def _advance(self, progress: Progress) -> str:
        left = self._left[progress.seq_id] - len(progress.tokens)
        if left < 0 or (left == 0 and not progress.finished):
            return f"went on with sequence {progress.seq_id} after its last token"
        if len(progress.text) > _TEXT_MAX * (1 + len(progress.tokens)):
            return f"made {len(progress.text)} bytes of {len(progress.tokens)} tokens"
        if max(progress.tokens, default=0) >= self._n_vocab:
            return f"made up a token for sequence {progress.seq_id}: the model has {self._n_vocab}"
        self._left[progress.seq_id] = left
        if progress.tokens or progress.finished:
            self._read(progress.seq_id)
        if progress.finished:
            del self._left[progress.seq_id]
        return ""

    def _read(self, seq_id: int) -> None:
        """The prompt of a sequence needs no more reading."""
        self._prompts.pop(seq_id, None)
        self._unread = min(self._unread, sum(self._prompts.values()))
