"""What further cells cost: the proportional share of memory (PSS) of everything below the supervisor."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from benchmarks.models import model
from benchmarks.pairing import one
from benchmarks.rows import FURTHER_CELL, Plan, Row, Yield
from benchmarks.shape import pss_mib
from crumplezone import Decoder

QUANTS = ("Q4_1", "Q4_0")
WORKERS = (1, 2, 4)
_WIDTH, _N_CTX_SEQ = 4, 512
_BUFFER = re.compile(r"(KV|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB")


class _Buffers(logging.Handler):
    """What llama.cpp says that the buffers of a context take."""

    def __init__(self) -> None:
        super().__init__()
        self.mib: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Note the latest of each kind."""
        if found := _BUFFER.search(record.getMessage()):
            self.mib[found[1]] = float(found[2])


@contextmanager
def _listening() -> Iterator[_Buffers]:
    logger, buffers = logging.getLogger("llama.cpp"), _Buffers()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(buffers)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield buffers
    finally:
        logger.removeHandler(buffers)
        logger.setLevel(level)
        logger.propagate = propagate


def rows(plan: Plan) -> Iterator[Yield]:
    """The PSS of 1, 2 and 4 cells, and what a further one adds over the buffers that it must have."""
    for quant in QUANTS:
        with _listening() as buffers:
            total = {workers: _pss(plan, quant, workers) for workers in WORKERS}
        size = model(quant, plan.cache).stat().st_size / 2**20
        for workers, mib in total.items():
            note = f"the zygote and every cell of a decoder; the model has {size:.0f} MiB"
            yield Row("memory", f"{quant}: PSS of workers={workers}", one(mib), "MiB", note=note)
        added = (total[WORKERS[-1]] - total[WORKERS[0]]) / (WORKERS[-1] - WORKERS[0])
        needed = sum(buffers.mib.values())
        parts = " + ".join(f"{name} {mib:.0f}" for name, mib in buffers.mib.items())
        note = f"{added:.0f} MiB / {parts} = {needed:.0f} MiB"
        name = f"{quant}: a further cell / its buffers"
        data = {"added": added, "needed": needed, "model": size}
        yield Row("memory", name, one(added / needed), "x", FURTHER_CELL, note, data)


def _pss(plan: Plan, quant: str, workers: int) -> float:
    """MiB of all processes below, once every cell has worked."""
    with (
        tempfile.TemporaryDirectory() as reports,
        Decoder(
            model(quant, plan.cache),
            n_ctx=_WIDTH * _N_CTX_SEQ,
            n_seq_max=_WIDTH,
            workers=workers,
            spares=0,
            start="zygote",
            reports=reports,
        ) as decoder,
    ):
        prompts = [f"Write a story about the number {number}." for number in range(workers * _WIDTH)]
        list(decoder.generate(prompts, max_tokens=8))
        return sum(pss_mib(child.pid) for child in psutil.Process().children(recursive=True))
