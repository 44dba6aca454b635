"""A completion service: JSON lines in, JSON lines out. A crash of llama.cpp costs time, not an answer.

    python examples/service.py [model.gguf]

A line ``{"id": 1, "prompt": "The sea is", "max_tokens": 16}`` is answered with ``{"id": 1, "delta": "..."}``
for each piece of text, and at last with ``{"id": 1, "text": "...", "recovered": 0, "reports": []}``. A line
that cannot be answered gets ``{"id": ..., "error": "..."}``, and the service goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from crumplezone import Llama, embedded_model
from crumplezone.errors import CrumplezoneError


def answer(llama: Llama, line: str) -> Iterator[dict[str, Any]]:
    """The replies to one line."""
    number = None
    try:
        request = json.loads(line)
        number = request.get("id")
        text, crashes = "", {"recovered": 0, "reports": []}
        stream: Any = llama.create_completion(
            request["prompt"], max_tokens=request.get("max_tokens", 64), temperature=0.0, stream=True
        )
        for chunk in stream:
            crashes = chunk.get("crumplezone", crashes)  # in the first chunk after a crash
            delta = chunk["choices"][0]["text"]
            text += delta
            yield {"id": number, "delta": delta}
        yield {"id": number, "text": text, **crashes}
    except (CrumplezoneError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield {"id": number, "error": f"{type(error).__name__}: {error}"}


def main(model: str) -> None:
    """Serve until standard input ends."""
    llama = Llama(model, n_ctx=1024, verbose=False)
    try:
        for line in sys.stdin:
            for reply in answer(llama, line):
                print(json.dumps(reply), flush=True)
    finally:
        llama.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
