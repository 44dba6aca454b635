"""A request on its way: a job for each of its choices, and one completion of them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container

from crumplezone.workers.generate.requests.completion import Completion, best, chosen
from crumplezone.workers.generate.requests.jobs import PromptJob
from crumplezone.workers.generate.requests.made import Made
from crumplezone.workers.generate.requests.request import SEEDS, Request, seed_of

Told = Completion | Exception


class Order:
    """A request on its way.

    Args:
        index: Its number for the caller.
        request: What is asked.

    Attributes:
        jobs: One for each completion that is made of it.
        shown: What is made of each of the ``n`` choices; known in the end, where they are chosen from more.
        tell: Called once, on a thread of this package, when all have ended.
    """

    def __init__(self, index: int, request: Request) -> None:
        self.request = request
        seed = seed_of(request)
        self.jobs = [
            PromptJob(index, request, (seed + number) % SEEDS, self._one_less)
            for number in range(request.made)
        ]
        self._left = len(self.jobs)
        self._lock = threading.Lock()  # of threads of this package
        chosen_of_all = request.made > request.n
        self.shown = (
            [Made(()) for _ in range(request.n)] if chosen_of_all else [job.made for job in self.jobs]
        )
        self.tell: Callable[[Told], None] = _nobody

    @property
    def servers(self) -> Container[int]:
        """The threads that may do it."""
        return self.jobs[0].servers

    def completion(self) -> Completion:
        """What there is of it."""
        made = [(job.completion(), job.made.logprobs) for job in self.jobs]
        if self.request.made > self.request.n:
            return chosen(best(made, self.request.n))
        return chosen([completion for completion, _ in made])

    def drop(self) -> None:
        """Nobody wants it any more. Also for finalizers: it takes no lock."""
        for job in self.jobs:
            job.drop()

    def cancel(self) -> None:
        """Nobody wants it any more; who reads it is told at once."""
        self.drop()
        for made in (*self.shown, *(job.made for job in self.jobs)):
            made.end("cancelled")

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        completion = self.completion()
        failures = [job.failure for job in self.jobs if job.failure]
        for made, choice in zip(self.shown, completion.choices, strict=True):
            made.show(choice.text, choice.finish_reason, failures[0] if failures else choice.error)
        tell, self.tell = self.tell, _nobody
        tell(failures[0] if failures else completion)


def _nobody(_: Told) -> None:
    """Tell nobody."""
