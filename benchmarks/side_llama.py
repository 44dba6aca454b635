"""What people use today: ``llama_cpp.Llama``, prompt after prompt. ``side_llama MODEL N_CTX THREADS``."""

from __future__ import annotations

import sys
import time
from typing import Any

import llama_cpp

from benchmarks.peer import serve


def main() -> None:
    """Load, and answer."""
    path, n_ctx, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def build() -> dict[str, Any]:
        llama = llama_cpp.Llama(path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)

        def complete(prompts: list[str], max_tokens: int) -> tuple[int, float]:
            """How many tokens it made, in how many seconds."""
            start = time.perf_counter()
            made = [llama.create_completion(p, max_tokens=max_tokens, temperature=0.0) for p in prompts]
            seconds = time.perf_counter() - start
            return sum(each["usage"]["completion_tokens"] for each in made), seconds  # type: ignore[index, misc]

        return {"complete": complete}

    serve(build)


if __name__ == "__main__":
    main()
