"""Client of llama.cpp's server, which `side_server` starts."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.peer import Peer

_GREEDY = {"temperature": 0, "top_k": 1, "samplers": ["top_k"]}  # the cheapest way to the same token


class Server:
    """A running server.

    Raises:
        PeerError: xllamacpp is missing, or the model was not loaded.
    """

    def __init__(self, stack: ExitStack, path: Path, slots: int, n_ctx_seq: int, threads: int) -> None:
        arguments = (path, slots, n_ctx_seq, threads)
        self.peer = stack.enter_context(Peer("side_server", *arguments, needs=("xllamacpp",)))
        address = urlsplit(self.peer.ask("address"))
        assert address.hostname
        self._host, self._port = address.hostname, address.port

    def about(self) -> tuple[str, set[str]]:
        """The package's version, and the instruction sets that it was built for."""
        package, system_info = self.peer.ask("about")
        return package, features(system_info)

    def complete(self, prompts: list[str], max_tokens: int) -> tuple[int, float]:
        """One request with all prompts, which the server shares out over its slots; tokens and seconds."""
        body = {"prompt": prompts, "n_predict": max_tokens, "cache_prompt": True, **_GREEDY}
        start = time.perf_counter()
        # A connection each: the server drops one that was idle for five seconds.
        connection = http.client.HTTPConnection(self._host, self._port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        seconds = time.perf_counter() - start
        if "error" in answer:
            raise RuntimeError(f"the server says: {answer['error']}")
        answers = answer if isinstance(answer, list) else [answer]
        return sum(each["tokens_predicted"] for each in answers), seconds


def features(system_info: str) -> set[str]:
    """What llama.cpp says of its build: ``"CPU : AVX = 1 | ..."``."""
    parts = system_info.split(":", 1)[-1].split("|")
    return {part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1")}
