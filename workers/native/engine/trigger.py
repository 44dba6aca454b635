"""Child side: from where on a lazy grammar holds.

llama.cpp has this too (llama_sampler_init_grammar_lazy_patterns), but aborts at a pattern that ``std::regex``
does not know, and at a trigger whose text the grammar does not accept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Trigger:
    """Waits for a text to match.

    Args:
        patterns: Regular expressions, in UTF-8.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = [re.compile(pattern.encode()) for pattern in patterns]
        self._text = bytearray()
        self._tokens: list[tuple[int, int]] = []  # and where each begins

    def fires(self, token: int, piece: bytes) -> tuple[bytes, list[int]] | None:
        """Add a token; None if nothing matches.

        Returns:
            The tokens that the grammar has to accept, and what the text of the first has before it begins.
        """
        self._tokens.append((token, len(self._text)))
        self._text += piece
        for pattern in self._patterns:
            if found := pattern.search(self._text):
                groups = range(1, pattern.groups + 1)
                start = next((found.start(i) for i in groups if found.group(i)), found.start())
                return self._from(start)
        return None

    def _from(self, start: int) -> tuple[bytes, list[int]]:
        ends = [*(begin for _, begin in self._tokens[1:]), len(self._text)]
        first = next((i for i, end in enumerate(ends) if end > start), len(ends))
        if first == len(ends):
            return b"", []
        begin = self._tokens[first][1]
        return bytes(self._text[begin:start]), [token for token, _ in self._tokens[first:]]
