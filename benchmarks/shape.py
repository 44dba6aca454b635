"""What both sides of a decode benchmark have in common: the tokens, and how memory is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Shape:
    """Calls of ``n_seq`` sequences with ``n_tokens`` each; the same random tokens on both sides."""

    n_seq: int
    n_tokens: int
    calls: int
    n_vocab: int

    def calls_tokens(self) -> Iterator[npt.NDArray[np.int32]]:
        """For each call the tokens, int32, shape (n_seq, n_tokens)."""
        random = np.random.default_rng((self.n_seq, self.n_tokens))
        for _ in range(self.calls):
            yield random.integers(0, self.n_vocab, (self.n_seq, self.n_tokens), np.int32)


def kib(pid: int, file: str, field: str) -> int:
    """A field of ``/proc/PID/FILE`` that is given in kB (proc(5))."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/{file} has no {field}")


def peak_mib(pid: int = 0) -> float:
    """The most resident memory that a process (0: this one) ever had, MiB."""
    return kib(pid or os.getpid(), "status", "VmHWM") / 1024


def pss_mib(pid: int) -> float:
    """A process's share of the memory that it has resident, MiB."""
    return kib(pid, "smaps_rollup", "Pss") / 1024
