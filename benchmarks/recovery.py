"""A crash on a loaded model: from a real SIGSEGV of llama_encode to the result of the job, tried again.

The batch is a single token, so that what remains after its decode is what the recovery itself takes.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Literal

from benchmarks import stream
from benchmarks.models import model
from benchmarks.overhead import N_CTX_SEQ
from benchmarks.pairing import alternate, figure, ratio
from benchmarks.peer import PeerError
from benchmarks.rows import NEXT_RESULT, Plan, Row, Yield
from benchmarks.server import Server
from crumplezone import Batch, Decoder

_QUANT = "Q4_1"
_PLAIN = 5  # decodes without a crash, of which the median is taken off
_CASES: tuple[tuple[str, Literal["zygote", "spawn"], int], ...] = (
    ("with a spare", "zygote", 1),
    ("without a spare, forked", "zygote", 0),
    ("without a spare, spawned", "spawn", 0),
)
_SERVER = "llama.cpp's server, restarted"


def rows(plan: Plan) -> Iterator[Yield]:
    """The time of each way to recover, less the decode; and against a restart of the server."""
    with ExitStack() as stack:
        sides = {name: _decoder(plan, stack, start, spares) for name, start, spares in _CASES}
        try:
            sides[_SERVER] = _restarts(plan, stack)
        except PeerError as error:
            yield Row("recovery", _SERVER, None, "ms", note=str(error))
        box = plan.box(60, least=3, most=30)
        found = dict(zip(sides, alternate(list(sides.values()), box), strict=True))
    data = {name: statistics.median(seconds) * 1000 for name, seconds in found.items()}
    for name, seconds in found.items():
        aim = NEXT_RESULT if name == _CASES[0][0] else None
        taken = figure([each * 1000 for each in seconds])
        yield Row("recovery", f"SIGSEGV -> first result, {name}", taken, "ms", aim, _note(name), data)
    if _SERVER in found:
        for name, _, _ in _CASES:
            note = f"{data[name]:.1f} / {data[_SERVER]:.0f} ms"
            yield Row("recovery", f"{name} / {_SERVER}", ratio(found[name], found[_SERVER]), "x", note=note)
    yield from stream.rows(plan)


def _note(name: str) -> str:
    return "with the start of its Python" if name == _SERVER else "less the decode of the token"


def _decoder(
    plan: Plan, stack: ExitStack, start: Literal["zygote", "spawn"], spares: int
) -> Callable[[], float]:
    reports = stack.enter_context(tempfile.TemporaryDirectory())
    decoder = stack.enter_context(
        Decoder(
            model(_QUANT, plan.cache),
            n_ctx=N_CTX_SEQ,
            n_seq_max=1,
            n_threads=plan.threads,
            preflight=False,
            start=start,
            spares=spares,
            reports=reports,
        )
    )

    def side() -> float:
        plain = statistics.median(_decode(decoder) for _ in range(_PLAIN))
        begin = time.perf_counter()
        result = decoder.encode(Batch.of([[1]]))
        seconds = time.perf_counter() - begin
        if not result.reports:
            raise AssertionError("llama_encode did not crash")
        decoder.flush_reports()  # what is examined now would disturb the next side
        return seconds - plain

    return side


def _decode(decoder: Decoder) -> float:
    decoder.memory.clear()
    begin = time.perf_counter()
    decoder.decode(Batch.of([[1]]))
    return time.perf_counter() - begin


def _restarts(plan: Plan, stack: ExitStack) -> Callable[[], float]:
    path = model(_QUANT, plan.cache)
    servers = [Server(stack, path, 1, N_CTX_SEQ, plan.threads)]
    servers[0].complete(["Hello"], 1)

    def side() -> float:
        begin = time.perf_counter()
        os.kill(servers[-1].peer.pid, signal.SIGSEGV)
        servers[-1].peer.close()
        servers.append(Server(stack, path, 1, N_CTX_SEQ, plan.threads))
        servers[-1].complete(["Hello"], 1)
        return time.perf_counter() - begin

    return side
