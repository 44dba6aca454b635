"""The arrays of the arena, by name."""

from __future__ import annotations

from crumplezone.sandbox.ipc.arena import Shape


def batch_shapes(n_tokens: int, n_seq_ids: int = -1, n_embd: int = 0) -> list[Shape]:
    """Tokens (or vectors), positions, seq_ids, outputs, n_seq_id and seq_id pointers (child only)."""
    first = ("f4", n_tokens * n_embd) if n_embd else ("i4", n_tokens)
    flat = n_tokens if n_seq_ids < 0 else n_seq_ids
    return [first, ("i4", n_tokens), ("i4", flat), ("i1", n_tokens), ("i4", n_tokens), ("u8", n_tokens)]
