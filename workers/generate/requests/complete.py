"""Many prompts, side by side: results in order, or as they come."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future

from crumplezone.errors import InputError
from crumplezone.workers.generate.requests.completion import Completion, failed
from crumplezone.workers.generate.requests.jobs import Job, PromptJob, Stream
from crumplezone.workers.protocol.generate.sampling import Sampling


def wrong(prompt: object, field: str) -> InputError | None:
    """What is wrong with a prompt."""
    if isinstance(prompt, str) and prompt:
        return None
    return InputError(field, prompt, "must be a text of at least one character")


def complete(
    places: Callable[[], int],
    put: Callable[[Job], None],
    prompts: Iterable[tuple[int, str]],
    sampling: Sampling,
) -> Generator[Completion, None, None]:
    """Complete numbered prompts; twice as many as can be in flight are read ahead.

    The source is read in the caller's thread: while it blocks, nothing is yielded. What it raises comes after
    the completions of the prompts before it.

    Args:
        places: How many prompts can be in flight.
        put: Gives a job to the lanes.
        prompts: Numbers and texts.
        sampling: For each of them.
    """
    ahead = 2 * places()
    waiting: dict[Future[Completion], Stream] = {}
    done: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
    raised: list[Exception] = []
    unread = _kept(prompts, raised)
    more, refused = True, 0  # those since the latest completion: they count, or no end of them might be read
    try:
        while more or waiting:
            more = False
            for index, prompt in unread:
                more = True
                if problem := wrong(prompt, f"prompts[{index}]"):
                    refused += 1
                    yield failed(index, prompt, problem)
                else:
                    job = PromptJob(index, prompt, sampling)
                    job.future.add_done_callback(done.put)
                    waiting[job.future] = job.future
                    put(job)
                if len(waiting) + refused >= ahead or not done.empty():
                    break
            refused = 0
            if waiting:
                if done.empty():
                    next(iter(waiting.values())).check()
                del waiting[future := done.get()]
                yield future.result()
    finally:
        for future in waiting:
            future.cancel()
    if raised:
        raise raised[0]


def _kept(prompts: Iterable[tuple[int, str]], raised: list[Exception]) -> Iterator[tuple[int, str]]:
    """Prompts to the end of their source, or until it raises, which is kept."""
    try:
        yield from prompts
    except Exception as error:  # noqa: BLE001 - the caller's, to be raised in its turn
        raised.append(error)


def in_order(finished: Iterable[Completion]) -> Generator[Completion, None, None]:
    """Completions of prompts that are numbered from 0, each when all before it are there."""
    early: dict[int, Completion] = {}
    due = 0
    for completion in finished:
        early[completion.index] = completion
        while due in early:
            yield early.pop(due)
            due += 1
