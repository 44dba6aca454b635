"""Supervisor side: one text cell, and typed calls on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.cells.client import CellClient
from crumplezone.workers.cells.source import CellSource
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.text import (
    OVER,
    AskSpecial,
    AskTemplate,
    AsText,
    AsTokens,
    MakeGrammar,
    Render,
    Rendered,
    SpecialTokens,
    TextInfo,
    ToText,
    ToTokens,
    grammar_shapes,
    render_shapes,
    text_shapes,
    tokens_shapes,
)

BYTES_MAX = 2**24  # of a text, and of what messages say
RENDERED_MAX = 2**23  # bytes that messages may become
GRAMMAR_MAX = 2**20  # bytes, and of what it is made of
_TEMPLATE_MAX = 2**20  # bytes
_TIMES = 64  # so many bytes have no more tokens, so many tokens no more bytes, than these times
_DEADLINE = 5.0  # seconds for what is somebody's program: a template, a grammar

Int32 = npt.NDArray[np.int32]
_Request = TypeVar("_Request", bound=msgspec.Struct)


class TextClient(CellClient[TextInfo]):
    """A text cell, replaced when it has died.

    Args:
        config: Of the decoder; only its model counts.
        limits: Of every call and every cell.
        reporter: Where a crash of the loader is reported.
        zygote: What cells are forked from; None to spawn them.
        n_vocab: Tokens that the decoder knows the vocabulary to have.
    """

    def __init__(
        self, config: CellConfig, limits: Limits, reporter: Reporter, zygote: Zygote | None, n_vocab: int
    ) -> None:
        super().__init__(CellSource("text", config, limits, reporter, zygote), TextInfo, limits.deadline)
        self._n_vocab = n_vocab
        most = _DEADLINE if limits.deadline is None else min(limits.deadline, _DEADLINE)
        self.program_deadline = most

    def _began(self) -> None:
        if self.info.n_vocab != self._n_vocab:
            raise self._lie(f"tells of {self.info.n_vocab} tokens in a vocabulary of {self._n_vocab}")

    def to_tokens(self, text: bytes, *, add_special: bool, parse_special: bool) -> Int32:
        """Token ids of a text in UTF-8.

        Raises:
            CellDied: The cell was lost.
        """

        def ask(room: int) -> tuple[int, ToTokens]:
            request = ToTokens(len(text), room, add_special, parse_special)
            self._filled(tokens_shapes(request), text)
            return self._call(request, AsTokens).n_tokens, request

        n, request = self._roomy(ask, len(text) + OVER, "tokens")
        return self._checked(self.running().arrays(tokens_shapes(request))[1][:n].copy())

    def to_text(self, tokens: Int32, *, special: bool) -> bytes:
        """The text of tokens, all of which are in the vocabulary, in UTF-8.

        Raises:
            CellDied: The cell was lost.
        """

        def ask(room: int) -> tuple[int, ToText]:
            request = ToText(len(tokens), room, special)
            self._filled(text_shapes(request), tokens)
            return self._call(request, AsText).n_bytes, request

        n, request = self._roomy(ask, 8 * len(tokens) + OVER, "bytes")
        return bytes(self.running().arrays(text_shapes(request))[1][:n].tobytes())

    def template(self, name: str | None) -> bytes:
        """The model's chat template of a name, None for its default; empty if there is none.

        Raises:
            InputError: It is too long.
            CellDied: The cell was lost.
        """
        (room,) = self.start().arrays([("u1", _TEMPLATE_MAX)])
        n = self._call(AskTemplate(name, _TEMPLATE_MAX), AsText).n_bytes
        if n > _TEMPLATE_MAX:
            raise InputError("chat template", f"{n} bytes", f"must have at most {_TEMPLATE_MAX}")
        return bytes(room[:n].tobytes())

    def render(self, template: bytes, context: bytes) -> tuple[bytes, Int32]:
        """A prompt, in UTF-8, and its tokens.

        Args:
            template: The source.
            context: A JSON object.

        Raises:
            CellRefused: The template raised an error.
            CellDied: The cell was lost.
        """
        request = Render(len(context), len(template), RENDERED_MAX)
        self._filled(render_shapes(request), context, template)
        done = self._program(request, Rendered)
        *_, text, tokens = self.running().arrays(render_shapes(request))
        if done.n_bytes > len(text) or done.n_tokens > len(tokens):
            raise self._lie(f"rendered {done.n_bytes} bytes, {done.n_tokens} tokens; {RENDERED_MAX} may be")
        return bytes(text[: done.n_bytes].tobytes()), self._checked(tokens[: done.n_tokens].copy())

    def grammar(self, asked: bytes) -> bytes:
        """A grammar in GBNF, which llama.cpp can use.

        Args:
            asked: See `MakeGrammar`.

        Raises:
            CellRefused: There is none such.
            CellDied: The cell was lost.
        """
        request = MakeGrammar(len(asked), GRAMMAR_MAX)
        self._filled(grammar_shapes(request), asked)
        n = self._program(request, AsText).n_bytes
        if n > GRAMMAR_MAX:
            raise self._lie(f"made a grammar of {n} bytes; {GRAMMAR_MAX} may be")
        return bytes(self.running().arrays(grammar_shapes(request))[1][:n].tobytes())

    def special(self) -> SpecialTokens:
        """Ids of the special tokens.

        Raises:
            CellDied: The cell was lost.
        """
        self.start()
        found = self._call(AskSpecial(), SpecialTokens)
        ids = [value for value in msgspec.structs.astuple(found) if type(value) is int]
        if max([*ids, *found.eog], default=-1) >= self._n_vocab:
            raise self._lie("tells of special tokens that are not in the vocabulary")
        return found

    def _program(self, request: msgspec.Struct, reply: type[_Request]) -> _Request:
        return self.running().call(request, reply, self.program_deadline)

    def _filled(self, shapes: Any, *given: Int32 | bytes) -> None:
        """Begin a job: put these into the first arrays of the arena."""
        arrays = self.start().arrays(shapes)
        for array, each in zip(arrays, given, strict=False):
            array[:] = np.frombuffer(each, np.uint8) if isinstance(each, bytes) else each

    def _roomy(
        self, ask: Callable[[int], tuple[int, _Request]], room: int, what: str
    ) -> tuple[int, _Request]:
        """Ask with this much room; once more, if it was too little, and if what it takes can be."""
        n, request = ask(room)
        if n > room:
            if n > _TIMES * room:
                raise self._lie(f"made {n} {what} where {room} are usual")
            room = n
            n, request = ask(room)
        if n > room:
            raise self._lie(f"made {n} {what}, and {room} of the same before")
        return n, request

    def _checked(self, tokens: Int32) -> Int32:
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._n_vocab:
            raise self._lie("made tokens that are not in the vocabulary")
        return tokens
