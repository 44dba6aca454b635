"""Which of several widths is the fastest, found by visiting each in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_AS_GOOD = 0.97  # of the best: the difference is noise, and a smaller width takes less memory
_HOPELESS = (0.5, 0.7)  # of the best, after one visit and after more: not visited again
_ENOUGH = 1.2  # seconds of steps
_TOO_MUCH = 3.0  # seconds of steps, while there are widths that were not visited
_ROUNDS = 4  # of those that are left


@dataclass(frozen=True, order=True)
class Width:
    """How the engine is to run.

    Attributes:
        n_seq: Sequences in each native call.
        n_threads: Threads of the call.
    """

    n_seq: int
    n_threads: int


Visit = Callable[[Width], tuple[int, float]]
"""Makes some generation steps; returns their number, and the seconds that they took together."""


def pick(rates: Mapping[Width, float]) -> Width:
    """The fastest, or the smallest of those that are as good.

    If it has several sequences, it is faster than any that has one: of those, none is as good as the best.

    Args:
        rates: Tokens per second, of all sequences together.
    """
    best = max(rates.values())
    return min(width for width, rate in rates.items() if rate >= _AS_GOOD * best)


def race(widths: Sequence[int], threads: Sequence[int], visit: Visit) -> dict[Width, float]:
    """Tokens per second of each width with the best number of threads, of promising ones with others too.

    Round by round, so that what else the machine does meets all of them alike. What counts is the best visit,
    since other work only makes slower. Visits last about equally long: each is as likely to be left alone.

    Args:
        widths: Numbers of sequences, from the smallest.
        threads: Numbers of threads.
        visit: Makes the steps.
    """
    runs = _Race(visit, max(threads))
    # The fewest threads first: where others compute as well, threads that wait for each other can make a step
    # a hundred times slower. Fewer threads that are clearly slower for one sequence are so for several, which
    # compute more for what they read.
    runs.round([Width(widths[0], n) for n in sorted(threads)], _TOO_MUCH)
    threads = [width.n_threads for width in runs.hopeful(_HOPELESS[1])]
    fastest = max(runs.rates, key=runs.rates.__getitem__).n_threads
    runs.round([Width(n_seq, fastest) for n_seq in widths], _TOO_MUCH)
    left = sorted({width.n_seq for width in runs.hopeful(_HOPELESS[0])})
    runs.round([Width(n_seq, n) for n_seq in left for n in threads], _TOO_MUCH)
    for _ in range(_ROUNDS):
        runs.round(runs.hopeful(_HOPELESS[1]), _ENOUGH)
    return runs.rates


@dataclass
class _Race:
    visit: Visit
    most_threads: int
    rates: dict[Width, float] = field(default_factory=dict)
    took: dict[Width, float] = field(default_factory=dict)  # seconds of the latest visit
    spent: float = 0.0  # seconds

    def round(self, widths: Sequence[Width], budget: float) -> None:
        """Visit each once, but for those that would last too long."""
        for width in widths:
            if self.spent + self.expected(width) <= budget:
                steps, seconds = self.visit(width)
                self.took[width] = seconds
                self.spent += seconds
                self.rates[width] = max(self.rates.get(width, 0.0), width.n_seq * steps / seconds)

    def expected(self, width: Width) -> float:
        """How many seconds a visit lasts at most; of a width that was visited, as many as then."""
        if width in self.took:
            return self.took[width]
        bounds = [seconds * self._growth(known, width) for known, seconds in self.took.items()]
        # Some models do grow faster than in proportion: at least twice the longest visit so far.
        return max(min(bounds, default=0.0), 2 * max(self.took.values(), default=0.0))

    def _growth(self, known: Width, width: Width) -> float:
        """A visit of the second lasts at most so many times as long as one of the first.

        With all threads, steps are taken to grow at most in proportion to the sequences. With fewer, they
        last longer or shorter, at most in proportion to the threads: shorter for one sequence, where threads
        that wait for each other gain nothing, longer for several. From few threads to as few, both count.
        """
        threads = (self.most_threads / known.n_threads) * (self.most_threads / width.n_threads)
        return threads * max(1.0, width.n_seq / known.n_seq)

    def hopeful(self, share: float) -> list[Width]:
        """Those with so large a share of the best rate, from the smallest."""
        best = max(self.rates.values())
        return sorted(width for width, rate in self.rates.items() if rate >= share * best)
