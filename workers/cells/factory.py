"""Where the cells of one owner come from, and what holds for all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import msgspec

from crumplezone.errors import InputError, check_integer
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.cells.targets import SEEDS, Kind, Seed
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig

Start = Literal["auto", "zygote", "spawn"]
_SPARES_MAX = 64


class Spawnable(Protocol):
    """A configuration of cells."""

    @property
    def n_gpu_layers(self) -> int:
        """Layers to offload."""

    def context(self) -> CellConfig:
        """As reports have it."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Makes the sources of cells of one owner.

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
        cls,
        config: Spawnable,
        limits: Limits,
        reporter: Reporter,
        start: Start,
        spares: int | None,
        seed: Seed = "context",
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
            assert isinstance(config, msgspec.Struct)
            spec = CellSpec(SEEDS[seed], config, memory_limit=limits.memory, surroundings=limits.surroundings)
            context = config.context()

            def report(incident: Incident) -> None:
                reporter.file_unasked(incident, "zygote", "it was started again", context)

            zygote = Zygote(spec, report)
        return cls(limits, reporter, zygote, int(zygote is not None) if spares is None else spares)

    def source(
        self, kind: Kind, config: Any, spares: int, *, owner: str, refusals: Mapping[str, type[Exception]]
    ) -> CellSource:
        """Cells of a kind; see `CellSource`."""
        return CellSource(
            kind,
            config,
            self.limits,
            self.reporter,
            self.zygote,
            spares,
            owner=owner,
            refusals=refusals,
        )

    def decode_client(self, config: CellConfig, owner: str = "decoder") -> DecodeClient:
        """A client with cells of its own; ``owner``: what its user calls it."""
        return DecodeClient(
            config, self.limits, self.reporter, zygote=self.zygote, spares=self.spares, owner=owner
        )

    def stop(self) -> None:
        """Start no more cells. Whoever waits for a zygote that is stopped goes on."""
        if self.zygote:
            self.zygote.stop()

    def close(self) -> None:
        """End what was started here. Close the clients first."""
        if self.zygote:
            self.zygote.close()
