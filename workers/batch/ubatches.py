"""How llama.cpp cuts a batch into compute passes ("ubatches"): src/llama-batch.cpp of 0c1e57098.

Which of these it uses depends on the memory: `split_simple` for one stream of key-value cells, `split_equal`
(sequential) for a stream per sequence and for recurrent models, `split_seq` for recurrent models when every
token is an output. Each returns the pieces in order, as indices of tokens, each token in one piece.
"""

from __future__ import annotations

import numpy as np

from crumplezone.errors import InputError, check_integer
from crumplezone.workers.batch.columns import Columns, Indices
from crumplezone.workers.protocol.config import INT32_MAX


def split_simple(columns: Columns, n_ubatch: int) -> list[Indices]:
    """Pieces of ``n_ubatch`` tokens in the order of the batch, whatever sequences they belong to."""
    _check(n_ubatch)
    return [
        np.arange(begin, min(begin + n_ubatch, len(columns))) for begin in range(0, len(columns), n_ubatch)
    ]


def split_equal(columns: Columns, n_ubatch: int, *, sequential: bool) -> list[Indices]:
    """Pieces with the same number of tokens of each sequence in them, one sequence behind the other.

    Where more than ``n_ubatch`` sequences wait, a piece has a token of ``n_ubatch + 1`` of them: llama.cpp
    notices when it is too late. No other piece is larger than ``n_ubatch``.

    Args:
        columns: The batch. Tokens of several sequences count as tokens of that set of sequences.
        n_ubatch: Most tokens of a piece.
        sequential: The sequences of a piece have consecutive ids.

    Raises:
        InputError: Sequential, and a token belongs to several sequences: llama.cpp returns 1, always.
    """
    _check(n_ubatch)
    if sequential and columns.coupled:
        i = int(np.argmax(columns.n_seq_id > 1))
        limit = "must be 1 to split a stream per sequence: decode the tokens of each sequence alone"
        raise InputError(f"n_seq_id[{i}]", int(columns.n_seq_id[i]), limit)
    choose = _consecutive if sequential else _disjoint
    waiting: dict[int, Indices] = _by_set(columns)
    pieces = []
    while waiting:
        chosen = choose(waiting, n_ubatch + 1)
        length = min(max(1, n_ubatch // len(chosen)), *(len(waiting[mask]) for mask in chosen))
        pieces.append(np.concatenate([waiting[mask][:length] for mask in chosen]))
        for mask in chosen:
            waiting[mask] = waiting[mask][length:]
        waiting = {mask: rows for mask, rows in waiting.items() if len(rows)}
    return pieces


def split_seq(columns: Columns, n_ubatch: int) -> list[Indices]:
    """Pieces of one sequence each. With tokens of several sequences, sets may only shrink within a piece."""
    _check(n_ubatch)
    masks = columns.sets()
    pieces, left = [], list(range(len(columns)))
    while left:
        mask = masks[left[0]]
        piece: list[int] = []
        rest: list[int] = []
        for i in left:
            if len(piece) < n_ubatch and masks[i] | mask == mask:
                piece.append(i)
                mask = masks[i]
            else:
                rest.append(i)
        pieces.append(np.array(piece))
        left = rest
    return pieces


def _check(n_ubatch: int) -> None:
    check_integer("n_ubatch", n_ubatch, 1, INT32_MAX)


def _by_set(columns: Columns) -> dict[int, Indices]:
    """The tokens of each set of sequences (a bit mask), sets in the order of their first tokens."""
    rows: dict[int, list[int]] = {}
    for i, mask in enumerate(columns.sets()):
        rows.setdefault(mask, []).append(i)
    return {mask: np.array(indices) for mask, indices in rows.items()}


def _disjoint(waiting: dict[int, Indices], most: int) -> list[int]:
    """Sets that share no sequence, those with the earliest waiting token first."""
    chosen: list[int] = []
    taken = 0
    for mask in sorted(waiting, key=lambda mask: int(waiting[mask][0])):
        if not mask & taken and len(chosen) < most:
            chosen.append(mask)
            taken |= mask
    return chosen


def _consecutive(waiting: dict[int, Indices], most: int) -> list[int]:
    """Sequences that each follow the one before by id, and have a token waiting behind its token."""
    mask = min(waiting, key=lambda mask: int(waiting[mask][0]))
    chosen, at = [mask], int(waiting[mask][0])
    while len(chosen) < most and (mask := mask << 1) in waiting:
        behind = np.searchsorted(waiting[mask], at)
        if behind == len(waiting[mask]):
            break
        chosen.append(mask)
        at = int(waiting[mask][behind])
    return chosen
