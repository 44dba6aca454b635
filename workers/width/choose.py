"""How many sequences to decode together, and with how many threads: measured once for each model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from crumplezone.errors import CellDied, CellRefused
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.sandbox.process.cgroup import available_memory
from crumplezone.workers.cells.client import CellClient
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.incidents.deaths import retried
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.file import check_file
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.messages import Resize
from crumplezone.workers.protocol.width import Fill, Filled, Step, Stepped, Weigh, Weighed
from crumplezone.workers.width import cache as width_cache
from crumplezone.workers.width.cache import Found, Rate
from crumplezone.workers.width.race import Width, pick, race

_WIDTHS = (1, 2, 4, 8, 16)
_WIDEST = 32  # tried from so many threads on: two cores gain 2 to 6% from it, and it takes twice the memory
_MANY_THREADS = 8
_VISIT = 0.03  # seconds; of steps that last longer there is one
_DEPTH = 64  # most tokens that a sequence holds when it is measured, and most steps of a visit
_FILLING = 0.1  # seconds for these tokens
_N_CTX_SEQ = (
    256  # llama.cpp makes no smaller context (it pads to this). A larger one costs nothing until it is used
)
_SHORTEST = 1000  # nanoseconds: no native call returns sooner
_SLOW = 1.0  # seconds for a token: then a race would take many
_DISTURBED = 0.05  # of the time, the cell waited for a processor: the result is not kept
_DEADLINE = 30.0  # seconds for a call. None is made that is expected to take more than 3

_log = BesideLog(logging.getLogger("crumplezone"))
_known: dict[str, Found | None] = {}  # by this process; None: it failed, and is not tried again


def choose(
    config: CellConfig,
    limits: Limits,
    reporter: Reporter,
    *,
    zygote: Zygote | None = None,
    n_seq: int = 0,
    n_threads: int = 0,
    most_threads: int,
    contexts: int = 2,
) -> Width:
    """The fastest width for this model on this machine, never a slower one than one sequence at a time.

    The first time this takes a second or two, in a cell of its own. If that fails, it is one sequence with
    all threads: no other width is sure not to be slower than that.

    Args:
        config: The context of a sequence has ``n_ctx / n_seq_max`` tokens.
        limits: Of the cell. Its calls have a deadline of their own.
        reporter: Of its crash.
        zygote: What forks it; None: it is spawned.
        n_seq: A width to keep, so that only the threads are measured; 0: both.
        n_threads: Threads to keep; 0: ``most_threads`` or half of them.
        most_threads: Threads that there are for one context.
        contexts: How many contexts (of lanes and spares) have to fit into the memory.

    Raises:
        ModelError, CrumplezoneError: No cell can be had for the model, as `CellSource.start`.
    """
    widths = (n_seq,) if n_seq else _widths(config, n_threads or most_threads)
    threads = (n_threads,) if n_threads else tuple(dict.fromkeys((most_threads, most_threads // 2 or 1)))
    default = Width(n_seq or 1, threads[0])
    if len(widths) == len(threads) == 1:
        return default
    # Of a larger width that is to be kept, the widest one that is measured tells which threads are best.
    widths = tuple(min(width, _WIDEST) for width in widths)
    check_file(Path(config.model))
    shape = _shape(config, threads[-1])
    asked = _Question(width_cache.key(shape, widths, threads), shape, limits, widths, threads)
    found = _found(asked, reporter, zygote)
    if found is None:
        return default
    fits = _fitting(found.weighed, config.n_ctx // config.n_seq_max, asked, contexts)
    best = pick(
        {
            Width(rate.n_seq, rate.n_threads): rate.tokens_per_second
            for rate in found.rates
            if n_seq or rate.n_seq <= fits
        }
    )
    return Width(n_seq or best.n_seq, best.n_threads)


def _shape(config: CellConfig, n_threads: int) -> CellConfig:
    """The context to begin with: as small as llama.cpp makes them."""
    return msgspec.structs.replace(
        config,
        n_ctx=_N_CTX_SEQ,
        n_batch=_DEPTH,
        n_ubatch=min(config.n_ubatch, _DEPTH),
        n_seq_max=1,
        n_threads=n_threads,
    )


def _widths(config: CellConfig, n_threads: int) -> tuple[int, ...]:
    widths = (*_WIDTHS, _WIDEST) if n_threads >= _MANY_THREADS else _WIDTHS
    return tuple(width for width in widths if width <= config.n_batch)  # a step is one native call


@dataclass(frozen=True)
class _Question:
    key: str
    config: CellConfig
    limits: Limits
    widths: tuple[int, ...]
    threads: tuple[int, ...]


def _found(asked: _Question, reporter: Reporter, zygote: Zygote | None) -> Found | None:
    """The measurement: of this process, else from the cache, else made now; None if it failed."""
    if asked.key not in _known:
        found = width_cache.recall(asked.key, asked.widths, asked.threads)
        _known[asked.key] = found or _measured(asked, reporter, zygote)
    return _known[asked.key]


def _measured(asked: _Question, reporter: Reporter, zygote: Zygote | None) -> Found | None:
    client = WidthClient(asked, reporter, zygote)

    def measured() -> Found:
        client.start()
        return _measure(client, asked)

    def tell(died: CellDied, again: bool) -> None:
        unknown = "the width was not measured; where none is given, sequences are decoded one at a time"
        result = "it was measured again" if again else unknown
        doing = "while measuring the width"
        reporter.file_lone(Incident.of(died), doing, result, asked.config, client.known)

    try:
        return retried(measured, tell)
    except CellRefused as refused:
        _log.warning("the width was not measured: %s", refused)
    except CellDied:  # told of
        pass
    finally:
        client.close()
    return None


class WidthClient(CellClient[CellInfo]):
    """The cell that measures. What its methods raise is `CellRefused` or `CellDied`."""

    def __init__(self, asked: _Question, reporter: Reporter, zygote: Zygote | None) -> None:
        source = CellSource("width", asked.config, asked.limits, reporter, zygote)
        super().__init__(source, CellInfo, _DEADLINE)

    def weigh(self) -> Weighed:
        """What a sequence takes, and how long a token."""
        return self._call(Weigh(), Weighed)

    def fill(self, n_seq: int, n_tokens: int) -> None:
        """A context of so many sequences, each of which holds so many tokens."""
        self._call(Resize(_N_CTX_SEQ * n_seq, n_seq), CellInfo)
        self._call(Fill(n_tokens), Filled)

    def step(self, step: Step) -> Stepped:
        """Some steps, timed by the cell; it is not believed what cannot be."""
        begin = time.perf_counter_ns()
        stepped = self._call(step, Stepped)
        longest = time.perf_counter_ns() - begin
        if stepped.steps > step.most or not stepped.steps * _SHORTEST <= stepped.nanoseconds <= longest:
            told = f"{stepped.steps} steps in {stepped.nanoseconds} ns"
            raise self._lie(f"told of {told}, {longest} ns after it was asked")
        return stepped


def _measure(client: WidthClient, asked: _Question) -> Found:
    """Ask a cell that has a context of one sequence.

    Raises:
        CellRefused: The model does not generate, or there is no memory for its contexts.
        CellDied: It crashed, hung or lied.
    """
    weighed = client.weigh()
    token = weighed.nanoseconds / 1e9
    if token > _SLOW:
        return Found([Rate(asked.widths[0], asked.threads[0], 1 / token)], weighed)
    fits = _fitting(weighed, _N_CTX_SEQ, asked, 1)
    widths = tuple(dict.fromkeys(min(width, fits) for width in asked.widths))
    most = min(_DEPTH, client.info.n_ctx_train // 4 or 1)  # where positions are learned, there are no more
    client.fill(widths[-1], max(1, min(most, int(_FILLING / token))))
    took, waited = list[int](), list[int]()

    def visit(width: Width) -> tuple[int, float]:
        stepped = client.step(Step(width.n_seq, width.n_threads, most, int(_VISIT * 1e9)))
        took.append(stepped.nanoseconds)
        waited.append(stepped.waited)
        return stepped.steps, stepped.nanoseconds / 1e9

    rates = race(widths, asked.threads, visit)
    found = Found([Rate(width.n_seq, width.n_threads, rate) for width, rate in rates.items()], weighed)
    if widths == asked.widths and sum(waited) < _DISTURBED * sum(took):
        width_cache.keep(asked.key, found)
    return found


def _fitting(weighed: Weighed, n_ctx_seq: int, asked: _Question, contexts: int) -> int:
    """How many sequences fit into half of the memory that is available; the other half is for the rest.

    llama.cpp allocates, and zeroes, the keys and values of n_ctx_seq tokens for each sequence when a context
    is made. What else it allocates depends on n_ubatch, not on the number of sequences.
    """
    per_sequence = weighed.first + weighed.more * n_ctx_seq
    free = available_memory() // contexts
    if asked.limits.memory is not None:  # resident memory, and the weights are in it
        free = min(free, max(0, asked.limits.memory - Path(asked.config.model).stat().st_size))
    return max(1, free // 2 // max(1, per_sequence))
