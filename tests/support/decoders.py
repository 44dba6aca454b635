"""What tests that decode and tests of recorded crashes have in common, fixtures apart."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import select
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crumplezone import Batch, Completion, Decoder, Llama, Result
from crumplezone.reports.records.report import BatchRecord, Evidence, Exit, Fault, ModelRecord, Report
from crumplezone.reports.store.store import Store
from crumplezone.workers.cells.targets import Kind

Open = Callable[..., Decoder]
OpenLlama = Callable[..., Llama]
Dose = Callable[..., None]
Plant = Callable[[Kind, str], None]
Job = Callable[[Decoder], object]
Record = Callable[..., list[Report]]

PROMPTS = [f"{letter}bc and {n} more" for n, letter in enumerate("abcdefgh")]
CONTEXT: dict[str, int | float | bool | str | None] = {
    "n_ctx": 512,
    "n_batch": 64,
    "n_ubatch": 64,
    "n_seq_max": 2,
    "n_threads": 1,
    "n_gpu_layers": 0,
    "kv_unified": False,
}


_LOOKS = 10


def collect() -> None:
    """Have the collector find what nobody holds any more, and wait for the threads that release it."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("close-"):
            thread.join(30)


def descriptors(pid: int | None = None) -> list[str]:
    """What a process has open, this one by default, each by its name."""
    collect()  # what nobody holds any more is no leak
    names = []
    for each in Path(f"/proc/{pid or os.getpid()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.append(re.sub(r"\[\d+\]", "", each.readlink().name))
    return sorted(names)


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """With a lower limit of this process."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def opened_since(before: list[str]) -> list[str]:
    """What this process has open and had not before. What it had, an earlier test may be about to close.

    What is not there in every one of some looks is a sample of /proc, which a thread has open for a moment.
    """
    found = Counter(descriptors()) - Counter(before)
    for _ in range(_LOOKS if found else 0):
        os.sched_yield()
        found &= Counter(descriptors()) - Counter(before)
    return sorted(found.elements())


def read_all(store: Store) -> list[Report]:
    """Oldest first."""
    rows = store.rows()
    assert [row.problem for row in rows if row.problem] == []
    return [store.read(row.id) for row in reversed(rows)]


def reports_of(decoder: Decoder, store: Store) -> list[Report]:
    """Oldest first."""
    decoder.flush_reports()
    return read_all(store)


def crashed_stack(report: Report) -> str:
    (thread,) = [thread for thread in report.evidence.threads if thread.crashed]
    return "\n".join(f"{frame.symbol} in {frame.module}" for frame in thread.native)


def sequences(n_tokens: int, n_seq: int, n_vocab: int) -> list[list[int]]:
    tokens = np.random.default_rng(n_tokens).integers(3, n_vocab, n_tokens)
    return [part.tolist() for part in np.array_split(tokens, n_seq)]


def assert_equal_logits(one: Result, other: Result) -> None:
    assert one.seq_ids == other.seq_ids
    for seq_id in one.seq_ids:
        a, b = one.logits(seq_id), other.logits(seq_id)
        assert int(a.argmax()) == int(b.argmax())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


WARN_OF_FORKS = {"PYTHONWARNINGS": "always:This process:DeprecationWarning"}
"""Environment of a process that shall say on stderr when it forks with threads (Python 3.12+)."""


@contextlib.contextmanager
def forks_with_threads() -> Iterator[None]:
    """Where a fork must be that Python 3.12+ warns of: what the threads hold stays locked in the child."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"This process .*is multi-threaded", DeprecationWarning)
        yield


def fork() -> int:
    """Fork this process, as a user may who has a decoder or a cell, and so has threads.

    What they hold stays locked in the child: let it do little. Their objects are there, but not its own.
    """
    with forks_with_threads():
        return os.fork()


def wait_for_end(pid: int, timeout: float = 10) -> bool:
    """Whether a process ends in time; one that is gone has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


def kill(process: Decoder | int | None) -> None:
    """SIGKILL a process, or a decoder's cell, and wait for its end."""
    pid = process.pid if isinstance(process, Decoder) else process
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid)


def say(decoder: Decoder, seq_id: int, *tokens: int) -> npt.NDArray[np.float32]:
    """Append tokens to a sequence; the logits of the last one."""
    batch = Batch(len(tokens), seq_id + 1)
    batch.add_sequence(seq_id, tokens)
    return decoder.decode(batch).logits(seq_id)


def held(decoder: Decoder, n_seq: int = 4) -> list[tuple[int, int]]:
    """Of each sequence, the first and the last position in memory."""
    return [(decoder.memory.pos_min(i), decoder.memory.pos_max(i)) for i in range(n_seq)]


def outcome(completions: list[Completion]) -> list[tuple[int, str, list[int]]]:
    return [(c.index, c.text, c.tokens) for c in completions]


def batch_of(*sequences: list[int]) -> BatchRecord:
    return BatchRecord(
        tokens=[token for tokens in sequences for token in tokens],
        positions=[position for tokens in sequences for position in range(len(tokens))],
        seq_ids=[seq_id for seq_id, tokens in enumerate(sequences) for _ in tokens],
        outputs=[position == len(tokens) - 1 for tokens in sequences for position in range(len(tokens))],
    )


def report_of(batch: BatchRecord | None, model: str = "", **fields: Any) -> Report:
    """A report that nobody wrote."""
    evidence = Evidence(Exit.SIGNAL, 1, fault=Fault(11, "SIGSEGV"))
    given: dict[str, Any] = {"evidence": evidence, "context": CONTEXT, "model": ModelRecord(model)}
    return Report(id="x", crashed_at="", batch=batch, **given | fields)


def columns(report: Report) -> tuple[list[int], list[int], list[int], list[bool]]:
    assert report.batch is not None
    return report.batch.tokens, report.batch.positions, report.batch.seq_ids, report.batch.outputs
