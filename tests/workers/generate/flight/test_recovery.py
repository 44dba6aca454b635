"""Who goes on with whom after crashes, in worlds of prompts that crash alone or together and are killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.flight.recovery import STEPS, Move, Recovery
from crumplezone.workers.incidents.deaths import KILLS_MAX

TURNS_MAX = 20_000
NEVER = 10**9


@dataclass
class World:
    """Cells in which some prompts crash, and somebody kills.

    Attributes:
        lengths: Tokens that each prompt is to get.
        culprits: The token at which a prompt crashes, whoever else runs, and whether token by token, too.
        pairs: Prompts that crash whenever they run together.
        width: From so many together on, everything crashes.
        kills: Numbers of the messages at which the cell is killed.
        place: What crashes together does so when one of them draws a token from this one on.
    """

    lengths: list[int]
    culprits: dict[int, tuple[int, bool]] = field(default_factory=dict)
    pairs: set[frozenset[int]] = field(default_factory=set)
    width: int = NEVER
    kills: frozenset[int] = frozenset()
    place: int = 0

    def __post_init__(self) -> None:
        self.recovery = Recovery()
        self.tokens = dict.fromkeys(range(len(self.lengths)), 0)
        for key in self.tokens:
            self.recovery.add(key)
        self.deaths = dict.fromkeys(self.tokens, 0)
        self.lost: set[int] = set()
        self.done: dict[int, Rung] = {}
        self.alone: list[int] = []
        self.messages = 0
        self.classified = 0

    def run(self) -> None:
        for _ in range(TURNS_MAX):
            if (turn := self.recovery.turn()) is None:
                break
            assert turn.keys
            assert set(turn.keys) <= self.tokens.keys() - self.done.keys() - self.lost
            if turn.alone:
                self.try_alone(turn)
            else:
                self.message(turn)
        assert self.recovery.turn() is None, "it goes on for ever"
        assert self.recovery.settled

    def message(self, turn: Move) -> None:
        self.messages += 1
        if self.messages in self.kills:
            self.recovery.died(turn.keys, self.told(own=False))
        elif self.crashes(turn.keys, token_by_token=turn.rung is Rung.TOKEN):
            for key in turn.keys:
                self.deaths[key] += 1
            self.recovery.died(turn.keys, self.told(own=True))
        else:
            self.advance(turn.keys)
            self.recovery.advanced({key: self.tokens[key] for key in turn.keys})
            self.end(turn.keys, turn.rung)

    def told(self, *, own: bool) -> Callable[[], bool]:
        def tell() -> bool:
            self.classified += 1
            return own

        return tell

    def try_alone(self, turn: Move) -> None:
        (key,) = turn.keys
        self.alone.append(key)
        for rung in (Rung.SAFE, Rung.TOKEN):
            goal = min(self.tokens[key] + STEPS + 1, self.lengths[key])
            while self.tokens[key] < goal and not self.crashes([key], token_by_token=rung is Rung.TOKEN):
                self.advance([key])
            if self.tokens[key] >= goal:
                self.recovery.cured(key, rung, self.tokens[key])
                self.end([key], rung)
                return
        self.lost.add(key)
        self.recovery.lost(key)

    def crashes(self, keys: Iterable[int], *, token_by_token: bool) -> bool:
        group = set(keys)
        for key in group & self.culprits.keys():
            at, always = self.culprits[key]
            if self.tokens[key] <= at < self.after(key) and (always or not token_by_token):
                return True
        late = any(self.after(key) > self.place for key in group)
        return late and (len(group) >= self.width or any(pair <= group for pair in self.pairs))

    def advance(self, keys: Iterable[int]) -> None:
        for key in keys:
            self.tokens[key] = self.after(key)

    def after(self, key: int) -> int:
        return min(self.tokens[key] + STEPS, self.lengths[key])

    def end(self, keys: Iterable[int], rung: Rung) -> None:
        for key in keys:
            if self.tokens[key] == self.lengths[key]:
                self.done[key] = rung
                self.recovery.drop(key, finished=True)


def halvings(n: int) -> int:
    return math.ceil(math.log2(n)) + 1


def test_a_first_crash_separates_nobody() -> None:
    recovery = Recovery()
    for key in range(4):
        recovery.add(key)
    recovery.died(range(4), lambda: True)
    assert recovery.turn() == Move((0, 1, 2, 3))
    assert not recovery.settled
    recovery.advanced(dict.fromkeys(range(4), STEPS + 1))
    assert recovery.settled
    assert recovery.take_passed() == [(0, 1, 2, 3)]


def test_a_second_crash_halves_and_what_has_passed_comes_back() -> None:
    world = World([100] * 8, {5: (20, True)})
    world.run()
    assert world.lost == {5}
    assert world.alone == [5, 4]
    assert world.deaths == {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 3, 7: 3}
    assert {world.done[key] for key in world.done} == {Rung.NATIVE}


def test_one_prompt_in_flight_is_tried_alone_at_once() -> None:
    world = World([100], {0: (20, False)})
    world.run()
    assert (world.alone, world.deaths, world.done) == ([0], {0: 1}, {0: Rung.TOKEN})


def test_those_who_crash_only_together_go_on_in_turns_and_come_together_again() -> None:
    world = World([100] * 4, pairs={frozenset({0, 3})}, place=50)
    world.run()
    assert world.deaths == {0: 3, 1: 3, 2: 3, 3: 3}  # the third: two halves met again, and parted at once
    assert world.alone == []
    assert set(world.done.values()) == {Rung.NATIVE}


def test_a_kill_is_not_asked_about_where_it_does_not_matter() -> None:
    world = World([100] * 4, kills=frozenset({3}))
    world.run()
    assert world.classified == 0
    assert set(world.done.values()) == {Rung.NATIVE}


def test_who_came_later_is_watched_no_less_and_no_longer() -> None:
    recovery = Recovery()
    recovery.add(0)
    recovery.add(1)
    recovery.died([0, 1], lambda: True)
    recovery.add(2)
    assert recovery.turn() == Move((0, 1, 2))
    recovery.died([0, 1, 2], lambda: True)
    assert recovery.turn() == Move((2,), Rung.SAFE, alone=True)
    recovery.cured(2, Rung.SAFE, 9)
    assert recovery.turn() == Move((0, 1))


def test_whoever_leaves_in_the_middle_of_it_keeps_nobody_waiting() -> None:
    recovery = Recovery()
    for key in range(4):
        recovery.add(key)
    recovery.died(range(4), lambda: True)
    recovery.died(range(4), lambda: True)
    for key in range(4):
        recovery.drop(key)
    assert recovery.turn() is None
    assert recovery.settled
    recovery.add(4)
    assert recovery.turn() == Move((4,))
    assert recovery.take_passed() == []


LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=17)


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_one_culprit_is_found_and_costs_the_others_few_deaths(
    lengths: list[int], data: st.DataObject
) -> None:
    key = data.draw(st.integers(0, len(lengths) - 1))
    culprit = key, (data.draw(st.integers(0, lengths[key] - 1)), data.draw(st.booleans()))
    world = World(lengths, dict([culprit]))
    world.run()
    assert world.lost == ({key} if culprit[1][1] else set())
    assert world.done.keys() | world.lost == set(range(len(lengths)))
    assert max(world.deaths.values()) <= halvings(len(lengths))


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_every_innocent_finishes_whatever_crashes_and_kills(lengths: list[int], data: st.DataObject) -> None:
    n = len(lengths)
    keys = st.integers(0, n - 1)
    culprits = data.draw(st.dictionaries(keys, st.tuples(st.integers(0, 119), st.booleans()), max_size=n))
    pairs = data.draw(st.sets(st.frozensets(keys, min_size=2, max_size=2), max_size=4)) if n > 1 else set()
    width = data.draw(st.sampled_from([NEVER, NEVER, 2, 3, 5]))
    kills = data.draw(st.frozensets(st.integers(1, 200), max_size=60))
    world = World(lengths, culprits, pairs, width, kills, data.draw(st.integers(0, 60)))
    world.run()
    poison = {key for key, (at, always) in culprits.items() if always and at < lengths[key]}
    assert world.lost == poison
    assert world.done.keys() | world.lost == set(range(n))
    # Each time they stay apart, or are watched, for twice as long.
    rounds = 2 + math.log2(max(lengths) / STEPS + 1)
    assert max(world.deaths.values()) <= (2 + len(culprits) + len(pairs)) * rounds * (halvings(n) + 1)


@settings(deadline=None)
@given(LENGTHS, st.frozensets(st.integers(1, 200), max_size=100))
def test_kills_isolate_nobody(lengths: list[int], kills: frozenset[int]) -> None:
    few = frozenset(kill for kill in kills if kill % KILLS_MAX)  # not too many in a row
    world = World(lengths, kills=few)
    world.run()
    assert world.done.keys() == set(range(len(lengths)))
    if len(lengths) > 1:
        assert set(world.done.values()) <= {Rung.NATIVE, Rung.SAFE}
    assert len(set(world.alone)) <= 1  # the last one that is left


def test_who_is_killed_again_and_again_is_tried_alone() -> None:
    world = World([100] * 3, kills=frozenset(range(1, KILLS_MAX + 2)))
    world.run()
    assert world.alone == [2, 1, 0]
    assert world.done.keys() == {0, 1, 2}


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(40, 2000))
def test_a_build_that_crashes_on_every_batch_costs_few_deaths(n: int, length: int) -> None:
    world = World([length] * n, width=2)
    world.run()
    assert world.done.keys() == set(range(n))
    assert max(world.deaths.values()) <= 2 * halvings(n) + math.log2(length / 32 + 1)
