"""Which place a prompt is given, so that what was computed once is of use again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from crumplezone.workers.generate.flight.places import Places, common_prefix

WIDTH = 4
some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def tokens(*ids: int) -> npt.NDArray[np.int32]:
    return np.array(ids, np.int32)


def test_a_chat_finds_its_place_again() -> None:
    places = Places(3)
    taken = [places.take(tokens(1, n, 7, 8)) for n in range(3)]
    for n, place in enumerate(taken):
        places.give(place, tokens(1, n, 7, 8, 5, 5))
    assert [places.take(tokens(1, n, 7, 8, 5, 5, 9)) for n in (2, 0, 1)] == [taken[2], taken[0], taken[1]]


def test_a_common_beginning_takes_nobody_s_place() -> None:
    places = Places(2)
    first = places.take(tokens(1, 2, 3, 4, 5, 6))
    places.give(first, tokens(1, 2, 3, 4, 5, 6))
    assert places.take(tokens(1, 2, 9, 9)) != first  # there is an empty one
    assert places.take(tokens(1, 2, 8, 8)) == first  # there is no other


def test_of_several_the_one_that_holds_most_and_else_the_one_free_for_longest() -> None:
    places = Places(3)
    a, b, c = (places.take(tokens(9)) for _ in range(3))
    places.give(b, tokens(1, 2, 3))
    places.give(a, tokens(1, 2, 3, 4))
    places.give(c, tokens(5, 6, 7))
    assert places.take(tokens(1, 2, 3, 4, 5)) == a
    assert places.take(tokens(8, 8)) == b
    assert places.take(tokens(8, 8)) == c


def test_what_is_forgotten_draws_nobody() -> None:
    places = Places(2)
    first = places.take(tokens(1, 2))
    places.take(tokens(3))
    places.give(first, tokens(1, 2))
    places.forget()
    places.give(1 - first, tokens(1, 2, 3))
    assert places.take(tokens(1, 2, 3)) == 1 - first


@given(some_tokens, some_tokens)
def test_common_prefix(held: list[int], new: list[int]) -> None:
    n = common_prefix(tokens(*held), tokens(*new))
    assert held[:n] == new[:n]
    assert n == min(len(held), len(new)) or held[n] != new[n]


class Taken(RuleBasedStateMachine):
    """No place is ever given twice, and none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.taken = Places(WIDTH), dict[int, list[int]]()

    @precondition(lambda self: len(self.taken) < WIDTH)
    @rule(new=some_tokens)
    def take(self, new: list[int]) -> None:
        place = self.places.take(tokens(*new))
        assert place not in self.taken
        assert place in range(WIDTH)
        self.taken[place] = new

    @precondition(lambda self: self.taken)
    @rule(more=some_tokens, data=st.data())
    def give(self, more: list[int], data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.taken)))
        self.places.give(place, tokens(*self.taken.pop(place), *more))

    @rule()
    def forget(self) -> None:
        self.places.forget()

    @invariant()
    def none_is_lost(self) -> None:
        assert len(self.places) + len(self.taken) == WIDTH


TestTaken = Taken.TestCase
