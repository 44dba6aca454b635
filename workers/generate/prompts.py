"""The half of `Decoder` that completes prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Unpack

from crumplezone.errors import check_texts
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.generate.pools import Pools
from crumplezone.workers.generate.requests.complete import complete
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.order import Order
from crumplezone.workers.generate.requests.request import GivenPrompt, Request, RequestOptions, requested
from crumplezone.workers.generate.requests.stream import Stream


class Prompts:
    """Completes prompts in the lanes of a decoder."""

    _turn: Turn
    _native: DecodeClient
    _pools: Pools

    def submit_prompt(self, prompt: GivenPrompt | Request, **options: Unpack[RequestOptions]) -> Stream:
        """Complete a prompt, together with those that are in flight.

        Args:
            prompt: A text; or token ids, or both mixed; or a `Request`.
            options: Fields of `Request` and `Sampling`; of a `Request`, those that are to be others.

        Returns:
            A future of the `Completion`; iterate over it for the text as it comes. It can be cancelled, and
            is when nobody holds it any more.

        Raises:
            InputError: The prompt is none, or an option is out of range.
            QueueFullError: Too many wait already.
        """
        order = self._order(0, prompt, options, "prompt")
        stream = Stream(order)
        self._pools.put(order.jobs)
        return stream

    def generate(
        self,
        prompts: Iterable[GivenPrompt | Request],
        *,
        ordered: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Generator[Completion, None, None]:
        """Complete prompts, many at a time; a place that falls free is taken by the next prompt.

        Args:
            prompts: Each as for `submit_prompt`. An iterator is read on a thread of its own, as places fall
                free. What it raises comes after the completions of the prompts before.
            ordered: Yield in the order of the prompts, else as they finish.
            options: As for `submit_prompt`. A ``seed`` is that of the first prompt, the next has the next
                number; the same one gives the same text, crash or no crash, but for rounding: batches of
                other shapes may decide between two tokens that are as likely.

        Yields:
            One `Completion` per prompt. What fails alone, or is no prompt, has its ``error`` set. When the
            generator is closed, those in flight are given up.

        Raises:
            InputError: An option is out of range.
        """
        check_texts("prompts", prompts)
        return self._complete(enumerate(prompts), options, ordered=ordered)

    def complete(
        self, prompts: Iterable[tuple[int, GivenPrompt | Request]], **options: Unpack[RequestOptions]
    ) -> Generator[Completion, None, None]:
        """`generate` for prompts that have numbers of their own, each another; yields as they finish."""
        return self._complete(prompts, options, ordered=False)

    def _complete(
        self, prompts: Iterable[tuple[int, GivenPrompt | Request]], options: RequestOptions, *, ordered: bool
    ) -> Generator[Completion, None, None]:
        Request("-", **options)  # what is wrong with these is said now
        self._turn.check_open()

        def order(index: int, prompt: object) -> Order:
            return self._order(index, prompt, options, f"prompts[{index}]")

        return complete(self._pools, order, prompts, ordered=ordered)

    def _order(self, index: int, prompt: object, options: RequestOptions, field: str) -> Order:
        request = requested(prompt, options, field, index)
        request.check(self._native.info, field)
        return Order(index, request)
