"""Where the cells of one decoder come from, and what holds for all of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, Self, get_args

from crumplezone.errors import InputError, check_integer
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.targets import SEEDS
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig

Start = Literal["auto", "zygote", "spawn"]
_SPARES_MAX = 64


@dataclass(frozen=True, eq=False)
class Cells:
    """Makes the runners of a decoder.

    Attributes:
        limits: Of every call and every cell.
        reporter: Where crashes go.
        zygote: What forks the cells; None: each loads the model by itself.
        spares: How many warm cells wait beside each running one.
    """

    limits: Limits
    reporter: Reporter
    zygote: Zygote | None
    spares: int

    @classmethod
    def of(
        cls, config: CellConfig, limits: Limits, reporter: Reporter, start: Start, spares: int | None
    ) -> Self:
        """As a caller wants it; nothing is started.

        Raises:
            InputError: A value is out of range.
        """
        if start not in get_args(Start):
            raise InputError("start", start, f"must be one of {', '.join(get_args(Start))}")
        if start == "zygote" and config.n_gpu_layers:
            limit = "must be spawn or auto with layers on a GPU: its driver does not survive a fork"
            raise InputError("start", start, limit)
        if spares is not None:
            check_integer("spares", spares, 0, _SPARES_MAX)
        zygote = None
        if start == "zygote" or (start == "auto" and not config.n_gpu_layers and sys.platform == "linux"):
            spec = CellSpec(SEEDS["context"], config, memory_limit=limits.memory)

            def report(incident: Incident) -> None:
                reporter.file_lone(incident, "zygote", "it was started again", config, None)

            zygote = Zygote(spec, report)
        return cls(limits, reporter, zygote, int(zygote is not None) if spares is None else spares)

    def runner(self, config: CellConfig) -> DecodeClient:
        """A runner with cells of its own."""
        return DecodeClient(config, self.limits, self.reporter, zygote=self.zygote, spares=self.spares)

    def close(self) -> None:
        """End what was started here. Shut the runners first."""
        if self.zygote:
            self.zygote.close()
