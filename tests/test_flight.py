"""What a cell may say of its sequences: all that an honest one says, and nothing for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from crumplezone.workers.flight import Flight
from crumplezone.workers.protocol import Generated, Join, Progress

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


def flight_of(prompts: list[tuple[int, int, int]]) -> Flight:
    flight = Flight(N_VOCAB)
    for seq_id, (n_tokens, max_tokens, _) in enumerate(prompts):
        flight.join(Join(seq_id, n_tokens, max_tokens, 0.0, 0))
    return flight


def honest(prompts: list[tuple[int, int, int]], steps: int, chunk: int) -> Iterator[list[Progress]]:
    """The replies of a cell whose sequences end after their third number of tokens, or at `max_tokens`."""
    pending = {seq_id: n_tokens for seq_id, (n_tokens, _, _) in enumerate(prompts)}
    drawn = dict.fromkeys(pending, 0)
    while pending:
        told: dict[int, list[int]] = {seq_id: [] for seq_id in pending}
        ended: dict[int, Literal["stop", "length"]] = {}
        for _ in range(steps):
            room = chunk
            for seq_id in sorted(pending, key=lambda seq_id: pending[seq_id]):
                read = min(pending[seq_id], room)
                pending[seq_id] -= read
                room -= read
                if read and not pending[seq_id]:
                    _, max_tokens, stop_after = prompts[seq_id]
                    if drawn[seq_id] == stop_after:
                        ended[seq_id] = "stop"
                        continue
                    told[seq_id].append(drawn[seq_id] % N_VOCAB)
                    drawn[seq_id] += 1
                    pending[seq_id] = 1
                    if drawn[seq_id] == max_tokens:
                        ended[seq_id] = "length"
            if ended:
                break
        for seq_id in ended:
            del pending[seq_id]
        yield [Progress(i, tokens, b"", ended.get(i, "")) for i, tokens in told.items()]


@given(sizes, st.integers(1, 5), st.integers(1, 16))
def test_an_honest_cell_is_believed(prompts: list[tuple[int, int, int]], steps: int, chunk: int) -> None:
    flight = flight_of(prompts)
    for progress in honest(prompts, steps, chunk):
        assert flight.land(Generated(0, progress), steps * chunk) == ""
    assert flight.land(Generated(0, [Progress(0, [], b"")]), steps * chunk) != ""


@given(sizes, st.integers(1, 8), st.lists(replies, min_size=1, max_size=6))
def test_nothing_is_believed_for_ever(
    prompts: list[tuple[int, int, int]], capacity: int, said: list[list[Progress]]
) -> None:
    flight = flight_of(prompts)
    most = sum(-(-n_tokens // capacity) + max_tokens + 1 for n_tokens, max_tokens, _ in prompts)
    believed = 0
    while not flight.land(Generated(0, said[believed % len(said)]), capacity):
        believed += 1
        assert believed <= most
