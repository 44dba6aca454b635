"""What a cell may say of its sequences: all that an honest one says, and nothing for ever."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.workers.cells.progress import ProgressChecker
from crumplezone.workers.protocol.generate.messages import (
    LOGPROBS_MAX,
    PROBLEM_MAX,
    Generated,
    Join,
    Logprob,
    Progress,
)
from crumplezone.workers.protocol.generate.sampling import Sampling

N_VOCAB = 9
sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=5)
replies = st.lists(
    st.builds(
        Progress,
        st.integers(0, 5),
        st.lists(st.integers(0, N_VOCAB), max_size=3),
        st.just(b""),
        st.sampled_from(["", "", "", "stop", "length"]),
        read=st.integers(0, 40),
    ),
    max_size=5,
)


def join(flight: ProgressChecker, seq_id: int, n_tokens: int, max_tokens: int) -> None:
    flight.join(Join(seq_id, n_tokens, n_tokens, Sampling(max_tokens)))


def flight_of(prompts: list[tuple[int, int, int]]) -> ProgressChecker:
    flight = ProgressChecker(N_VOCAB)
    for seq_id, (n_tokens, max_tokens, _) in enumerate(prompts):
        join(flight, seq_id, n_tokens, max_tokens)
    return flight


class Cell:
    """An honest one. Its sequences end after their third number of tokens, or at `max_tokens`.

    It replies after any number of native calls, and finds a part of a prompt in its memory.
    """

    def __init__(self, prompts: list[tuple[int, int, int]], chunk: int, chance: Random) -> None:
        self.prompts, self.chunk, self.chance = prompts, chunk, chance
        self.pending = {
            i: n_tokens - chance.randrange(n_tokens) for i, (n_tokens, _, _) in enumerate(prompts)
        }
        self.drawn = dict.fromkeys(self.pending, 0)
        self.cached = {i: n_tokens - self.pending[i] for i, (n_tokens, _, _) in enumerate(prompts)}

    def reply(self) -> list[Progress]:
        told: dict[int, list[int]] = {seq_id: [] for seq_id in self.pending}
        ended: dict[int, Literal["stop", "length"]] = {}
        for _ in range(self.chance.randint(1, 5)):
            room = self.chunk
            for seq_id in sorted(self.pending, key=lambda seq_id: self.pending[seq_id] > 1):
                read = min(self.pending[seq_id], room)
                self.pending[seq_id] -= read
                room -= read
                if read and not self.pending[seq_id]:
                    _, max_tokens, stop_after = self.prompts[seq_id]
                    if self.drawn[seq_id] == stop_after:
                        ended[seq_id] = "stop"
                        continue
                    told[seq_id].append(self.drawn[seq_id] % N_VOCAB)
                    self.drawn[seq_id] += 1
                    self.pending[seq_id] = 1
                    if self.drawn[seq_id] == max_tokens:
                        ended[seq_id] = "length"
            if ended:
                break
        replies = [
            Progress(i, tokens, b"", ended.get(i, ""), read=self.read(i), cached=self.cached[i])
            for i, tokens in told.items()
        ]
        for seq_id in ended:
            del self.pending[seq_id]
        return replies

    def read(self, seq_id: int) -> int:
        return self.prompts[seq_id][0] + self.drawn[seq_id] - self.pending[seq_id]

    def leaves(self) -> Iterator[int]:
        """Sequences that the supervisor gives up."""
        if self.pending and self.chance.random() < 0.2:
            seq_id = self.chance.choice(sorted(self.pending))
            del self.pending[seq_id]
            yield seq_id


@given(sizes, st.integers(1, 16), st.randoms(use_true_random=False))
def test_an_honest_cell_is_believed(prompts: list[tuple[int, int, int]], chunk: int, chance: Random) -> None:
    flight, cell = flight_of(prompts), Cell(prompts, chunk, chance)
    while cell.pending:
        for seq_id in cell.leaves():
            flight.leave(seq_id)
        assert flight.land(Generated(0, cell.reply())) == ""
    assert flight.land(Generated(0, [])) == ""
    assert flight.land(Generated(0, [Progress(0, [], b"")])) != ""


@given(sizes, st.lists(replies, min_size=1, max_size=6))
def test_nothing_is_believed_for_ever(
    prompts: list[tuple[int, int, int]], said: list[list[Progress]]
) -> None:
    flight = flight_of(prompts)
    most = sum(n_tokens + 2 * max_tokens + 1 for n_tokens, max_tokens, _ in prompts)
    believed = 0
    while not flight.land(Generated(0, said[believed % len(said)])):
        believed += 1
        if not said[(believed - 1) % len(said)]:  # nothing, which is true when nothing is in flight any more
            break
        assert believed <= most


def reading(flight: ProgressChecker, read: dict[int, int]) -> str:
    """What is said to a cell that has no token to tell of, but that it has read so many."""
    return flight.land(Generated(0, [Progress(i, [], b"", read=n) for i, n in read.items()]))


def test_what_was_read_or_given_up_excuses_no_silence() -> None:
    flight = ProgressChecker(N_VOCAB)
    for seq_id in range(3):
        join(flight, seq_id, 40, 9)
    flight.leave(1)
    assert reading(flight, {0: 10, 2: 0}) == ""
    assert "nothing that was read" in reading(flight, {0: 10, 2: 0})
    assert reading(flight, {0: 10, 2: 30}) == ""
    ended = Progress(0, [4], b"", "stop", read=40)
    assert flight.land(Generated(0, [ended, Progress(2, [], b"", read=30)])) == ""
    assert reading(flight, {2: 39}) == ""
    assert "nothing that was read" in reading(flight, {2: 39})
    assert "tokens read" in reading(flight, {2: 41})
    assert "every prompt has been read" in reading(flight, {2: 40})


def test_whoever_generates_is_never_silent() -> None:
    flight = flight_of([(4, 9, 9), (400, 9, 9)])
    said = [Progress(0, [1], b"", read=4), Progress(1, [], b"", read=10)]
    assert flight.land(Generated(0, said)) == ""
    assert "every prompt has been read" in reading(flight, {0: 5, 1: 20})


def test_a_sequence_that_left_is_told_of_no_more() -> None:
    flight = flight_of([(4, 9, 9), (4, 9, 9)])
    flight.leave(1)
    assert "[0] are in flight" in flight.land(Generated(0, [Progress(1, [1], b"")]))
    flight.leave(0)
    assert flight.land(Generated(0, [Progress(0, [1], b"")])) != ""
    assert flight.land(Generated(0, [])) == ""


# --- what else is told


def likely(n: int, value: float = -1.0) -> Logprob:
    return Logprob(value, [(i, value) for i in range(n)])


def asked(n_tokens: int = 12, n_prompt: int = 10, **options: Any) -> ProgressChecker:
    """One sequence, of which two tokens were drawn before."""
    flight = ProgressChecker(N_VOCAB)
    flight.join(Join(0, n_tokens, n_prompt, Sampling(9, grammar="root ::= [a]"), **options))
    return flight


def told(**fields: Any) -> Generated:
    """An honest first reply, but for what is named."""
    honest = Progress(0, [1], b"a", logprobs=[likely(2)], prompt_logprobs=[likely(2)] * 9, read=12)
    return Generated(0, [msgspec.structs.replace(honest, **fields)])


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"logprobs": []}, "0 probabilities for 1 tokens"),
        ({"logprobs": [likely(2)] * 2}, "2 probabilities for 1 tokens"),
        ({"logprobs": [likely(1)]}, "1 likely tokens, where 2"),
        ({"logprobs": [likely(3)]}, "3 likely tokens, where 2"),
        ({"logprobs": [likely(2, 0.5)]}, "a probability that there cannot be"),
        ({"logprobs": [likely(2, float("-inf"))]}, "a probability that there cannot be"),
        ({"logprobs": [likely(2, float("nan"))]}, "a probability that there cannot be"),
        ({"logprobs": [Logprob(-1.0, [(0, -1.0), (N_VOCAB, -2.0)])]}, "a likely token that is none"),
        ({"prompt_logprobs": [likely(2)] * 10}, "10 probabilities of the prompt"),
        ({"prompt_logprobs": [likely(2)] * 8}, "8 probabilities of the prompt"),
        ({"prompt_logprobs": [likely(2, 1.0)] * 9}, "a probability that there cannot be"),
        ({"read": 14}, "14 tokens read, after 0 of 13"),
        ({"cached": 1}, "1 tokens that need not be computed"),
        ({"problem": "none"}, "a reason of 4 characters, as ''"),
        ({"finished": "refused"}, "a reason of 0 characters, as 'refused'"),
        ({"finished": "refused", "problem": "x" * (PROBLEM_MAX + 1)}, f"a reason of {PROBLEM_MAX + 1}"),
        ({"finished": "refused", "problem": "x"}, "that it has no grammar that would do"),
        ({"tokens": [1] * 8, "logprobs": [likely(2)] * 8}, "went on with sequence 0 after its last token"),
    ],
)
def test_what_cannot_be_is_a_lie(lie: dict[str, Any], found: str) -> None:
    flight = asked(logprobs=2, prompt_logprobs=True)
    assert found in flight.land(told(**lie))


def test_what_can_be_is_none() -> None:
    flight = asked(logprobs=2, prompt_logprobs=True)
    assert flight.land(told()) == ""
    more = told(read=13, prompt_logprobs=[], finished="word")
    assert flight.land(more) == ""


def test_what_was_not_asked_for_is_not_told() -> None:
    assert asked().land(told(logprobs=[], prompt_logprobs=[])) == ""
    assert "probabilities for" in asked().land(told(prompt_logprobs=[]))
    assert "of the prompt" in asked().land(told(logprobs=[]))
    top = asked(logprobs=LOGPROBS_MAX).land(told(logprobs=[likely(N_VOCAB)], prompt_logprobs=[]))
    assert top == ""  # more there are not


def test_what_is_in_memory_does_not_get_less() -> None:
    plain: dict[str, Any] = {"logprobs": [], "prompt_logprobs": []}
    flight = asked()
    assert flight.land(told(read=12, cached=11, **plain)) == ""
    assert "13 tokens read" not in flight.land(told(read=13, cached=11, **plain))
    assert "12 tokens read, after 13" in flight.land(told(read=12, cached=11, **plain))
    flight = asked()
    assert flight.land(told(read=12, cached=5, **plain)) == ""
    assert "4 tokens that need" in flight.land(told(read=13, cached=4, **plain))
    looks_back = ProgressChecker(N_VOCAB)
    looks_back.join(Join(0, 12, 10, Sampling(9, temperature=1, mirostat_mode=2)))
    assert "10 tokens that need" in looks_back.land(told(read=12, cached=10, **plain))


def test_a_refusal_is_of_a_grammar() -> None:
    refused = Progress(0, [], b"", "refused", problem="no")
    assert asked().land(Generated(0, [refused])) == ""
    flight = flight_of([(4, 9, 9)])
    assert "has no grammar" in flight.land(Generated(0, [refused]))
