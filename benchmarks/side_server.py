"""llama.cpp's own server, from the package xllamacpp. ``side_server MODEL SLOTS N_CTX_SEQ THREADS``.

The package's wheel is a build of its own, of another compiler and llama.cpp: `about` says what differs.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import xllamacpp

from benchmarks.peer import serve


def main() -> None:
    """Load, and serve HTTP on a free port until the pipe closes."""
    path, slots, n_ctx_seq, threads = sys.argv[1], *map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * n_ctx_seq, False
    params.n_batch, params.n_ubatch = 2048, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port, params.verbosity, params.ui = 0, 0, False

    def build() -> dict[str, Any]:
        server = xllamacpp.Server(params)
        return {
            "address": lambda: server.listening_address,
            "about": lambda: (version("xllamacpp"), xllamacpp.get_system_info()),
        }

    serve(build)


if __name__ == "__main__":
    main()
