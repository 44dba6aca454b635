"""Limits of every call and every cell."""

from __future__ import annotations

from dataclasses import dataclass

from crumplezone.errors import check_integer, check_number


@dataclass(frozen=True)
class Limits:
    """Seconds for one native call, and bytes of resident memory for one cell; None: no limit.

    Raises:
        InputError: One is out of range.
    """

    deadline: float | None
    memory: int | None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            check_number("deadline", self.deadline, 1e-3, 1e7)
            object.__setattr__(self, "deadline", float(self.deadline))  # numpy's numbers are welcome
        if self.memory is not None:
            check_integer("memory_limit", self.memory, 1, 2**63 - 1)
