"""One call of a `Llama`, as the supervisor remembers it: enough to make it again in another cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any

from crumplezone.errors import CellDied
from crumplezone.reports.records.report import BatchRecord
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.incidents.deaths import KILLS_MAX, was_killed
from crumplezone.workers.protocol.llama import NOTE_MAX, Grammar, LlamaCall, Note

_GENERATIONS_MAX = 4096  # within one call: a chat format makes one for each tool that is called
_CRASHES_MAX = 16  # of cells in one call, however far it gets with each


@dataclass
class LlamaSnapshot:
    """What a `Llama` is between two calls. A cell that does not know it is told.

    Attributes:
        tokens: Evaluated, in order.
        seed: Of the next sampler.
        chat_format: Name of the chat format.
        cache: Bytes of the cache of states, or None.
    """

    tokens: list[int] = field(default_factory=list)
    seed: int = 0
    chat_format: str | None = None
    cache: int | None = None


@dataclass(eq=False)
class Task:
    """A call.

    Attributes:
        method: Its name in `crumplezone.workers.native.llama.cell`.
        args: Keyword arguments.
        grammar: One of them, apart because it travels as a value of its own.
        processors: The caller's logits processors.
        criteria: The caller's stopping criteria.
        base: How the `Llama` stood before it; set when it begins.
        tokens: Evaluated by now, as far as the cell has told.
        drawn: Tokens of each of its generations, likewise.
        sent: What the caller sent for each item that it got.
        stage: What the cell said that it is at.
        begun: Whether a cell has had it.
        cautious: Whether it runs in a cell with one thread, token by token.
        losses: How many cells it has lost.
        reports: Directories of their reports.
        news: Whether the caller has not yet been told of the latest.
        restored: Whether the cell that has it began with a saved state.
        asked: Questions of that cell.
        has_turn: See `CallLock`.
    """

    method: str
    args: Mapping[str, Any]
    grammar: Grammar | None = None
    processors: Iterable[Callable[..., Any]] | None = None
    criteria: Callable[..., Any] | None = None
    base: LlamaSnapshot = field(default_factory=LlamaSnapshot)
    tokens: list[int] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
    sent: list[list[int] | None] = field(default_factory=list)
    stage: str = ""
    begun: bool = False
    cautious: bool = False
    losses: int = 0
    reports: list[str] = field(default_factory=list)
    news: bool = False
    restored: bool = False
    asked: int = 0
    has_turn: bool = False
    _identity: int = field(default_factory=lambda: SystemRandom().getrandbits(63))
    _created: int = field(default_factory=lambda: int(time.time()))
    _died: list[CellDied] = field(default_factory=list)
    _in_vain: int = 0  # cells lost since it last got any further: the last of these
    _reached: int = -1

    @property
    def rung(self) -> Rung:
        """Where it runs."""
        return Rung.TOKEN if self.cautious else Rung.NATIVE

    @property
    def shown_grammar(self) -> Any:
        """The grammar that it was given, for a message."""
        return self.grammar.text if self.grammar else self.args.get("response_format")

    def call(self, *, known: bool, saved: list[int] | None = None) -> LlamaCall:
        """What to tell a cell.

        Args:
            known: It stands as the `Llama` did before the call.
            saved: The tokens of the state that it has just been given.
        """
        base = self.base
        return LlamaCall(
            self.method,
            dict(self.args),
            base.seed,
            len(base.tokens),
            base.chat_format,
            self._identity,
            self._created,
            None if known else base.tokens,
            self.drawn,
            saved or [],
            self.grammar,
            self.processors is not None,
            self.criteria is not None,
            base.cache,
        )

    def too_curious(self, n_ctx: int) -> bool:
        """Count a question; whether they are more than this call can bring.

        A cell asks when it evaluates a part of a prompt, at most thrice for each token that is drawn or drawn
        again, and between texts.
        """
        self.asked += 1
        texts = self.args.get("input")
        n_texts = len(texts) if isinstance(texts, list) else 1
        return self.asked > 1024 + n_texts + 16 * n_ctx * (1 + len(self.drawn))

    def take(self, note: Note, n_vocab: int, n_ctx: int) -> str:
        """Add what a cell tells; returns what is wrong with it, or an empty string."""
        self.stage = note.stage
        most = 2 * n_ctx + NOTE_MAX  # it tells of a part before llama.cpp says that there is no room
        for part in note.evaluated:
            if part.at > min(len(self.tokens), most):
                return f"told of tokens at position {part.at}, and holds {len(self.tokens)}"
            self.tokens[part.at :] = part.tokens
        for place, token in note.drawn:
            if place >= _GENERATIONS_MAX or token >= n_vocab:
                return f"drew token {token} in generation {place}"
            while len(self.drawn) <= place:
                self.drawn.append([])
            self.drawn[place].append(token)
            if len(self.drawn[place]) > most:
                return f"drew {most} tokens in a context of {n_ctx}"
        return ""

    def lost(self, died: CellDied) -> bool:
        """Note that its cell was lost; returns whether to try another.

        What somebody else killed says nothing of the call. It is only asked, which waits for autopsies, where
        something depends on it.
        """
        reached = len(self.sent) + sum(map(len, self.drawn))
        self._in_vain = 1 if reached > self._reached else self._in_vain + 1
        self._reached = reached
        self._died.append(died)
        self.losses += 1
        self.news = True
        if self._in_vain == 1 and self.losses <= _CRASHES_MAX:
            return True
        crashes = [not was_killed(each) for each in self._died]
        in_vain = sum(crashes[-self._in_vain :])
        hopeless = (in_vain > 1 and self.cautious) or sum(crashes) > _CRASHES_MAX
        self.cautious = self.cautious or in_vain > 1
        return not (hopeless or self._in_vain > KILLS_MAX + in_vain)

    def batch(self, chunk: int) -> BatchRecord | None:
        """What its cell was evaluating, from the first token on; ``chunk``: most tokens per native call."""
        n = len(self.tokens)
        if not n:
            return None
        outputs = [i == n - 1 for i in range(n)]
        return BatchRecord(list(self.tokens), list(range(n)), [0] * n, outputs, chunk=chunk)

    def told(self, item: Any) -> Any:
        """An item for the caller; the first one after a lost cell says so."""
        if self.news and isinstance(item, dict):
            item["crumplezone"] = {"recovered": self.losses, "reports": list(self.reports)}
            self.news = False
        return item
