"""What a cell may say of its sequences: all that an honest one says, and nothing for ever."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from crumplezone.workers.cells.progress import ProgressChecker
from crumplezone.workers.protocol.generate.messages import Generated, Join, Progress
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
        for seq_id in ended:
            del self.pending[seq_id]
        return [Progress(i, tokens, b"", ended.get(i, "")) for i, tokens in told.items()]

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
        assert flight.land(Generated(0, cell.reply()), chunk) == ""
    assert flight.land(Generated(0, []), chunk) == ""
    assert flight.land(Generated(0, [Progress(0, [], b"")]), chunk) != ""


@given(sizes, st.integers(1, 8), st.lists(replies, min_size=1, max_size=6))
def test_nothing_is_believed_for_ever(
    prompts: list[tuple[int, int, int]], chunk: int, said: list[list[Progress]]
) -> None:
    flight = flight_of(prompts)
    most = sum(-(-n_tokens // chunk) + max_tokens + 1 for n_tokens, max_tokens, _ in prompts)
    believed = 0
    while not flight.land(Generated(0, said[believed % len(said)]), chunk):
        believed += 1
        if not said[(believed - 1) % len(said)]:  # nothing, which is true when nothing is in flight any more
            break
        assert believed <= most


def silent(flight: ProgressChecker, seq_ids: list[int], chunk: int) -> int:
    """For how many replies a cell is believed that tells nothing of these sequences."""
    said = Generated(0, [Progress(seq_id, [], b"") for seq_id in seq_ids])
    return next(n for n in range(100) if flight.land(said, chunk))


def test_what_was_read_or_given_up_excuses_no_silence() -> None:
    flight = ProgressChecker(N_VOCAB)
    for seq_id in range(3):
        join(flight, seq_id, 40, 9)
    flight.leave(1)
    assert flight.land(Generated(0, [Progress(i, [], b"") for i in (0, 2)]), 10) == ""
    assert flight.land(Generated(0, [Progress(0, [4], b"", "stop"), Progress(2, [], b"")]), 10) == ""
    assert (
        silent(flight, [2], 10) == 3
    )  # at most its own 40 tokens are unread, the last of which give a token


def test_whoever_generates_is_never_silent() -> None:
    flight = flight_of([(4, 9, 9), (400, 9, 9)])
    assert flight.land(Generated(0, [Progress(0, [1], b""), Progress(1, [], b"")]), 10) == ""
    assert silent(flight, [0, 1], 10) == 0


def test_a_sequence_that_left_is_told_of_no_more() -> None:
    flight = flight_of([(4, 9, 9), (4, 9, 9)])
    flight.leave(1)
    assert "[0] are in flight" in flight.land(Generated(0, [Progress(1, [1], b"")]), 10)
    flight.leave(0)
    assert flight.land(Generated(0, [Progress(0, [1], b"")]), 10) != ""
    assert flight.land(Generated(0, []), 10) == ""
