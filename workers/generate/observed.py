"""The half of `Decoder` that tells what it does."""

from __future__ import annotations

from collections.abc import Iterator

from crumplezone.errors import check_number
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.factory import Cells
from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.embed.embedder import Embedder
from crumplezone.workers.generate.pools import Pools
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.observe import health
from crumplezone.workers.observe.events import Listener
from crumplezone.workers.observe.health import CellHealth
from crumplezone.workers.observe.stats import Stats

_SECONDS_MAX = 1e7


class Observed:
    """Tells what a decoder does."""

    _turn: Turn
    _reporter: Reporter
    _cells: Cells
    _native: DecodeClient
    _pools: Pools
    _embedder: Embedder | None

    def stats(self) -> Stats:
        """What it has done so far, as numbers. It waits for nobody, and can be asked after `close` too."""
        return self._reporter.observer.stats(self._pools.known_places)

    def add_listener(self, listener: Listener) -> None:
        """Have something called with each event from now on, in order, on a thread that nobody waits for.

        Args:
            listener: Called with a `RequestQueued`, `RequestAdmitted`, `FirstToken`, `NewTokens`,
                `RequestResumed`, `RequestFinished`, `CellLost` or `ReportWritten`; what it raises is logged.
                Of one that is slow, 16384 events wait, and those beyond are dropped (`Stats.unheard`).

        Raises:
            InputError: It cannot be called, or is a listener already.
        """
        self._reporter.observer.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Call it no more; events that wait for it still come.

        Raises:
            InputError: It is no listener.
        """
        self._reporter.observer.remove(listener)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new prompts and batches for the workers, and wait until those that were taken are done.

        A `generate` that is under way reads no more prompts: it yields those that it has read, then raises.
        Other calls go on; `close` waits for them. On a thread of the decoder it does not wait.

        Args:
            timeout: Seconds to wait at most; None: as long as it takes.

        Returns:
            Whether all are done. If not, they go on, and it can be called again.

        Raises:
            InputError: The timeout is out of range.
        """
        if timeout is not None:
            check_number("timeout", timeout, 0.0, _SECONDS_MAX)
        return self._reporter.observer.drain(timeout)

    def health(self, timeout: float = 1.0) -> list[CellHealth]:
        """Ask each cell that there is now, but for spares, whether it lives.

        Args:
            timeout: Seconds to wait for their answers, all together.

        Raises:
            InputError: The timeout is out of range.
            UsageError: The decoder is closed.
        """
        check_number("timeout", timeout, 0.0, _SECONDS_MAX)
        self._turn.check_open()
        return health.ask(self._living(), timeout)

    def _living(self) -> Iterator[tuple[str, Cell]]:
        clients = [("memory", self._native), *(("lane", client) for client in self._pools.clients)]
        found = [(role, client.cell) for role, client in clients]
        found += [("embeddings", self._embedder.cell)] if self._embedder else []
        found += [("zygote", self._cells.zygote.cell)] if self._cells.zygote else []
        return ((role, cell) for role, cell in found if cell)
