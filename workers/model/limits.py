"""What holds for every call and every cell of an owner."""

from __future__ import annotations

from dataclasses import dataclass, field

from crumplezone.errors import check_integer, check_number
from crumplezone.sandbox.host.surroundings import Surroundings


@dataclass(frozen=True)
class Limits:
    """Seconds for one native call, and bytes of resident memory for one cell; None: no limit.

    Attributes:
        surroundings: Of every cell, whenever it is started: as they are when this is made.

    Raises:
        InputError: One is out of range, or no Python is found that could run a cell.
        UsageError: No cell can work in this process.
    """

    deadline: float | None
    memory: int | None
    surroundings: Surroundings = field(default_factory=Surroundings.here, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.deadline is not None:
            check_number("deadline", self.deadline, 1e-3, 1e7)
            object.__setattr__(self, "deadline", float(self.deadline))  # numpy's numbers are welcome
        if self.memory is not None:
            check_integer("memory_limit", self.memory, 1, 2**63 - 1)
