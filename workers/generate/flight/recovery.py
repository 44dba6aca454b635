"""Who goes on with whom after a crash: a state machine over the prompts in flight, without cells and clocks.

- After a first crash all go on together. They are watched until they are past its place.
- Those who are in a second crash meanwhile are halved, and the halves tried one after the other, and so on. A
  prompt that is alone is for the safe rungs to try. The others stand still until every part was tried. Those
  that came last are tried first: a crash while a prompt is read is its own, and what passes after the last
  crash need not be read again.
- A part that gets past the place has passed. If a smaller part of its group crashed, that was the reason, and
  what has passed is free. If every part has passed, they crash only together, and go on apart for a while, in
  turns. If they crash when they meet again they part at once, each time for twice as long: so that ends.
- A kill from outside changes nothing, unless there are too many of them with no token between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from crumplezone.workers.batch.results import Rung
from crumplezone.workers.incidents.deaths import KILLS_MAX

Own = Callable[[], bool]
"""Whether a cell died of its work, and nobody killed it. May wait for that, and always says the same."""

STEPS = 8  # native calls per message: a crash is at most so many tokens behind the last one delivered
_MARGIN = STEPS + 1
_APART = 32  # tokens that the parts of a group which crashes only together go on apart, at first
_MESSAGES = 2  # of a turn: where a memory has no prefixes, each turn reads its prompts again
_DOUBLED_MAX = 20  # times


@dataclass(frozen=True)
class Move:
    """What is to be done next.

    Attributes:
        keys: The prompts that are to be run together, and no others.
        rung: On which they run.
        alone: The one prompt is for the safe rungs to try: tell `Recovery.cured` or `Recovery.lost`.
    """

    keys: tuple[int, ...]
    rung: Rung = Rung.NATIVE
    alone: bool = False


@dataclass
class _Mark:
    """A prompt that was in a crash, or in party ``origin``, is watched until it has so many tokens."""

    until: int
    own: Own
    origin: int = 0


@dataclass(eq=False)
class _Split:
    """A group that crashed, and what its parts have shown."""

    above: _Split | None
    open: int  # parts of which nothing is known yet
    explained: bool = False  # less than all of it crashed
    passed: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class _Suspects:
    """A part of a group that crashed: it passes when each prompt has as many tokens as its goal."""

    goals: dict[int, int]
    split: _Split
    alone: bool
    finished: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Party:
    """Prompts that run by themselves until each has as many tokens as its goal, or to their end."""

    keys: list[int]
    goals: dict[int, int]
    rung: Rung
    number: int


class Recovery:
    """Decides whose turn it is. Prompts are numbers that are given once."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}  # that each prompt has; in the order in which they came
        self._marks: dict[int, _Mark] = {}
        self._places: dict[int, int] = {}  # of a first crash: how many tokens are past it
        self._past: list[int] = []  # who has got there
        self._fell: dict[int, list[Own]] = {}  # first crashes of each
        self._parted: dict[int, int] = {}  # how often each was found to crash only together with others
        self._trials: deque[_Suspects] = deque()
        self._apart: list[_Party] = []
        self._parties = 0  # that there ever were
        self._rotation = self._messages = 0
        self._row = 0  # crashes and kills with no token between
        self._passed: list[tuple[int, ...]] = []

    @property
    def settled(self) -> bool:
        """Whether everybody is past the place of the latest crashes."""
        return not (self._trials or self._places)

    def turn(self) -> Move | None:
        """What is to be done next; None: nobody is in flight."""
        if self._trials:
            trial = self._trials[0]
            return Move(tuple(trial.goals), Rung.SAFE if trial.alone else Rung.NATIVE, trial.alone)
        apart = {key for party in self._apart for key in party.keys}
        crowd = tuple(key for key in self._tokens if key not in apart)
        turns = [Move(crowd)] if crowd else []
        turns += [Move(tuple(party.keys), party.rung) for party in self._apart]
        return turns[self._rotation % len(turns)] if turns else None

    def add(self, key: int) -> None:
        """A prompt takes a place; it has no tokens yet."""
        self._tokens[key] = 0

    def advanced(self, tokens: Mapping[int, int]) -> None:
        """Some prompts were run, and have so many tokens now. Drop those that have ended after that."""
        if any(n > self._tokens[key] for key, n in tokens.items()):
            self._row = 0
        self._tokens.update(tokens)
        self._messages += 1
        if self._messages >= _MESSAGES:
            self._rotate()
        self._marks = {key: mark for key, mark in self._marks.items() if self._tokens[key] < mark.until}
        for key in [key for key, place in self._places.items() if self._tokens[key] >= place]:
            del self._places[key]
            self._past.append(key)
        self._look_past()
        if self._trials and not self._trials[0].alone and self._reached(self._trials[0].goals):
            self._pass(self._trials[0])
        self._come_together()

    def drop(self, key: int, *, finished: bool = False) -> None:
        """A prompt is in flight no more."""
        for known in (self._tokens, self._marks, self._fell, self._parted):
            known.pop(key, None)
        if self._places.pop(key, None) is not None and finished:
            self._past.append(key)
        self._look_past()
        for party in self._apart:
            if key in party.keys:
                party.keys.remove(key)
                party.goals.pop(key, None)
        self._apart = [party for party in self._apart if party.keys]
        for trial in [trial for trial in self._trials if key in trial.goals]:
            del trial.goals[key]
            trial.finished += [key] if finished else []
            if not trial.goals:
                self._pass(trial)

    def died(self, keys: Iterable[int], own: Own) -> None:
        """The cell that ran these was lost, or refused."""
        self._row += 1
        group = [key for key in keys if key in self._tokens]
        if self._row > KILLS_MAX:
            self.scatter(group)
        elif not self._trials and len(group) > 1 and not self._suspected(group):
            self._watch(group, own)
        elif len(group) == 1 or own():  # the safe rungs find out about kills by themselves
            self._separate(self._parts(group))

    def scatter(self, keys: Iterable[int]) -> None:
        """Have each of these tried alone, whatever else is known of them."""
        self._separate([[key] for key in keys])

    def cured(self, key: int, rung: Rung, tokens: int) -> None:
        """A safe rung brought a prompt past the place. If it was the last rung, it stays alone to its end."""
        trial = self._trials[0]
        self.advanced({key: tokens})
        if rung is Rung.TOKEN:  # it crashed alone, too
            trial.split.explained = True
            del trial.goals[key]
            self._park([key], rung)
        self._pass(trial)

    def lost(self, key: int) -> None:
        """A prompt failed on every safe rung."""
        trial = self._trials[0]
        trial.split.explained = True
        self.drop(key)

    def take_passed(self) -> list[tuple[int, ...]]:
        """The groups that have got past a crash together since this was asked last."""
        passed, self._passed = self._passed, []
        return passed

    def _rotate(self) -> None:
        self._rotation, self._messages = self._rotation + 1, 0

    def _reached(self, goals: Mapping[int, int]) -> bool:
        return all(self._tokens[key] >= goal for key, goal in goals.items())

    def _look_past(self) -> None:
        if self._past and not self._places:
            self._passed.append(tuple(self._past))
            self._past = []

    # Crashes.

    def _suspected(self, group: Iterable[int]) -> bool:
        """Whether some of them are watched, with good reason."""
        for key in group:
            if (mark := self._marks.get(key)) and not mark.own():
                del self._marks[key]
        return any(key in self._marks for key in group)

    def _watch(self, group: Iterable[int], own: Own) -> None:
        """All go on together. Who has been here before is watched for longer."""
        for key in group:
            tokens, fell = self._tokens[key], [each for each in self._fell.get(key, ()) if each()]
            self._fell[key] = [*fell, own]
            self._marks[key] = _Mark(tokens + _doubled(_MARGIN, len(fell)), own)
            self._places[key] = tokens + _MARGIN

    def _parts(self, group: list[int]) -> list[list[int]]:
        """The parties that they come from, or else two halves."""
        parts: dict[int, list[int]] = {}
        for key in group:
            mark = self._marks.get(key)
            parts.setdefault(mark.origin if mark else 0, []).append(key)
        if self._trials or len(parts) == 1:
            half = -(-len(group) // 2)
            return [part for part in (group[:half], group[half:]) if part]
        return list(parts.values())

    def _separate(self, parts: list[list[int]]) -> None:
        """Have the parts of a group that has crashed tried next, from the last one on."""
        group = {key for part in parts for key in part}
        above = self._trials.popleft().split if self._trials else None
        split = _Split(above, len(parts))
        for key in group:
            self._places.pop(key, None)
        self._look_past()
        for party in self._apart:
            party.keys = [key for key in party.keys if key not in group]
            party.goals = {key: goal for key, goal in party.goals.items() if key not in group}
        self._apart = [party for party in self._apart if party.keys]
        for part in parts:
            goals = {key: self._tokens[key] + _MARGIN for key in part}
            self._trials.appendleft(_Suspects(goals, split, alone=len(part) == 1))

    def _pass(self, trial: _Suspects) -> None:
        """Nothing more is to be found out from a trial."""
        self._trials.remove(trial)
        if not trial.alone and (tried := (*trial.finished, *trial.goals)):
            self._passed.append(tried)
        if trial.goals or trial.finished:
            trial.split.passed.append(list(trial.goals))
        self._settle(trial.split)

    def _settle(self, split: _Split) -> None:
        split.open -= 1
        if split.open:
            return
        passed = [[key for key in part if key in self._tokens] for part in split.passed]
        passed = [part for part in passed if part]
        if split.explained or len(passed) < 2:
            for part in passed:
                for key in part:
                    self._marks.pop(key, None)
        else:
            for part in passed:
                self._park(part, Rung.SAFE if len(part) == 1 else Rung.NATIVE)
        if split.above:
            split.above.explained = True
            self._settle(split.above)

    def _park(self, part: list[int], rung: Rung) -> None:
        """Have some go on by themselves: for a while, or to their end if they are read token by token."""
        self._parties += 1
        for key in part:
            self._parted[key] = self._parted.get(key, 0) + 1
            self._marks[key] = _Mark(self._tokens[key] + _MARGIN, _certainly, self._parties)
        while_ = _doubled(_APART, max(self._parted[key] for key in part) - 1)
        goals = {} if rung is Rung.TOKEN else {key: self._tokens[key] + while_ for key in part}
        self._apart.append(_Party(list(part), goals, rung, self._parties))

    def _come_together(self) -> None:
        """Have all go on together again, watched, when each was apart for long enough."""
        parties = [party for party in self._apart if party.goals]
        if not all(self._reached(party.goals) for party in parties):
            return
        self._apart = [party for party in self._apart if not party.goals]
        for party in parties:
            for key in party.keys:
                self._marks[key] = _Mark(self._tokens[key] + _MARGIN, _certainly, party.number)


def _doubled(n: int, times: int) -> int:
    return n << min(times, _DOUBLED_MAX)


def _certainly() -> bool:
    return True
