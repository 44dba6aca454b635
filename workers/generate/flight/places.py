"""Which sequence of a cell a prompt is given, so that what the memory holds of it need not be computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Tokens = npt.NDArray[np.int32]
_NOTHING: _Tokens = np.empty(0, np.int32)


class Places:
    """The places of one cell. What was computed for a prompt stays until its place is taken by another.

    The cell finds by itself what the memory holds of a prompt, and copies it from another place where that is
    worth it (`PrefixCache`): here is only decided what is given up.

    Args:
        width: How many there are, numbered from 0.
    """

    def __init__(self, width: int) -> None:
        self._free = dict.fromkeys(range(width), _NOTHING)  # the one that is free for longest first

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, tokens: _Tokens) -> int:
        """A place for a prompt; there must be one.

        Args:
            tokens: Of the prompt, int32, shape (n,).
        """
        common = {place: common_prefix(held, tokens) for place, held in self._free.items()}
        # At least half of what is held goes on to be of use: so a chat finds its place again, and one that
        # begins by the same words as many others does not take theirs away.
        own = [place for place, n in common.items() if n and 2 * n >= len(self._free[place])]
        empty = (place for place, held in self._free.items() if not len(held))
        place = max(own, key=common.__getitem__) if own else next(empty, next(iter(self._free)))
        del self._free[place]
        return place

    def give(self, place: int, held: _Tokens) -> None:
        """A place is free again.

        Args:
            place: Its number.
            held: What the memory holds there, int32, shape (n,).
        """
        self._free[place] = held

    def forget(self) -> None:
        """The memory is empty, or nobody knows what it holds."""
        self._free = dict.fromkeys(self._free, _NOTHING)


def common_prefix(held: _Tokens, tokens: _Tokens) -> int:
    """How many tokens both begin with."""
    n = min(len(held), len(tokens))
    differs = held[:n] != tokens[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n
