"""The other side of a pair: a process of its own, asked over a pipe, so that the sides never run at once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec

ROOT = Path(__file__).resolve().parents[1]
ANSWER_S = 900.0  # seconds: nothing that is measured takes so long


class PeerError(Exception):
    """The other side cannot be had, or failed."""


class _Question(msgspec.Struct):
    method: str
    arguments: dict[str, Any]


class _Answer(msgspec.Struct):
    value: Any = None
    error: str = ""


class Peer:
    """A started script ``benchmarks.NAME`` that answers with `serve`.

    Args:
        name: The module.
        arguments: Its command line.
        needs: Packages that it imports, to say plainly which one is missing.

    Raises:
        PeerError: A package is missing.
    """

    def __init__(self, name: str, *arguments: object, needs: tuple[str, ...] = ()) -> None:
        if missing := [need for need in needs if importlib.util.find_spec(need) is None]:
            raise PeerError(f"{missing[0]} is not installed: pip install '.[bench]'")
        self._name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            process_group=0,  # so that whatever it leaves can be ended with it
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, method: str, limit: float = ANSWER_S, **arguments: Any) -> Any:
        """Call one of its methods and wait, for ``limit`` seconds at most.

        Raises:
            PeerError: It raised, is gone, or hangs.
        """
        assert self._process.stdin
        assert self._process.stdout
        question = msgspec.json.encode(_Question(method, arguments))
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(question + b"\n")
            self._process.stdin.flush()
        poller = select.poll()
        poller.register(self._process.stdout, select.POLLIN)
        if not poller.poll(limit * 1000):
            raise PeerError(f"{self._name}: no answer to {method} in {limit:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended: {self._last_words()}")
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error:
            raise PeerError(f"{self._name}: {answer.error}")
        return answer.value

    def _last_words(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 300))
        return self._stderr.read().decode("utf-8", "replace").strip()[-200:]

    def kill(self) -> None:
        """End it at once, and nothing that it started."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it and all that it started. Idempotent."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(build: Callable[[], dict[str, Callable[..., Any]]]) -> None:
    """Child side: make the methods, then answer until the parent closes the pipe."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what native code prints is no answer
    methods = build()
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=_Question)
        try:
            answer = _Answer(methods[question.method](**question.arguments))
        except Exception as error:  # noqa: BLE001 - told to the parent
            answer = _Answer(error=f"{type(error).__name__}: {error}")
        os.write(answers, msgspec.json.encode(answer) + b"\n")
    os._exit(0)  # a server or a pool that is still at work must not keep the process
