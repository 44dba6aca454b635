"""`Texts`: tokens, templates and grammars, of which a crash or a hang costs the one call that caused it."""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import reprlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellDied, CellRefused, InputError, TokenError
from crumplezone.reports.records.report import Exit
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.cells.factory import Cells
from crumplezone.workers.incidents.deaths import retried
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.text import SpecialTokens
from crumplezone.workers.text.client import BYTES_MAX, GRAMMAR_MAX, Int32, TextClient

_SIDE_BY_SIDE = 4  # cells, of which only as many are started as there are calls at the same time
_PATIENCE = 5.0  # seconds that closing waits for a call
_KNOWN = 64  # grammars
_TOKENS_MAX = 2**24
_SAID = 1000  # characters of a cell's own words

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
_T = TypeVar("_T")


class Texts:
    """The text cells of a decoder. Thread-safe: calls wait for no other, but where there are many of them.

    Args:
        cells: What the decoder's cells come from.
        config: Of the decoder.
        info: What its cells say of the model.
    """

    def __init__(self, cells: Cells, config: CellConfig, info: CellInfo) -> None:
        self._reporter, self._config, self._info = cells.reporter, config, info
        self._clients = [
            TextClient(config, cells.limits, cells.reporter, cells.zygote, info.n_vocab)
            for _ in range(_SIDE_BY_SIDE)
        ]
        # The one that was used last is used next. A signal handler may call in the middle of these.
        self._idle, self._turns = deque(self._clients), queue.SimpleQueue[None]()
        for _ in self._clients:
            self._turns.put(None)
        self._lock = threading.Lock()
        self._grammars: OrderedDict[bytes, str] = OrderedDict()
        self._special: SpecialTokens | None = None
        self._templates: dict[str | None, str] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids of the cells that run."""
        return [client.pid for client in self._clients if client.pid is not None]

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Int32:
        """See `Decoder.tokenize`."""
        raw = utf8("text", text)
        work = functools.partial(TextClient.to_tokens, add_special=add_special, parse_special=parse_special)
        return self._run(lambda client: work(client, raw), "tokenize")

    def detokenize(self, tokens: Tokens, *, special: bool) -> str:
        """See `Decoder.detokenize`."""
        ids = self._ids(tokens)
        text = self._run(lambda client: client.to_text(ids, special=special), "detokenize")
        return text.decode("utf-8", "replace")

    def special(self) -> SpecialTokens:
        """See `Decoder.special_tokens`."""
        if self._special is None:
            self._special = self._run(TextClient.special, "tell of special tokens")
        return self._special

    def template(self, name: str | None) -> str:
        """The model's chat template of this name, None for its default; empty if it has none."""
        if name not in self._templates:
            raw = self._run(lambda client: client.template(name), "tell its chat template")
            if not raw and name is not None:
                return ""  # names are the caller's: nothing is kept of those that there are not
            self._templates[name] = raw.decode("utf-8", "replace")
        return self._templates[name]

    def render(self, template: str, name: str, context: Mapping[str, Any]) -> tuple[str, Int32]:
        """A prompt and its tokens.

        Args:
            template: The source.
            name: Of the template, for messages.
            context: What it is given: messages, tools, ...

        Raises:
            InputError: The template refuses this, or did not end in time, or cost its cell.
        """
        raw = encoded("messages", context)
        source = template.encode()
        text, tokens = self._judged(
            "messages",
            f"cannot be rendered by {name}",
            lambda client: client.render(source, raw),
            context.get("messages"),
        )
        return text.decode("utf-8", "replace"), tokens

    def grammar(self, field: str, rules: str, schemas: Mapping[str, Any] | None = None) -> str:
        """A grammar that llama.cpp can use; what was asked for lately is known.

        Args:
            field: Whose value it is made of, for messages.
            rules: In GBNF.
            schemas: Of each rule that is missing, the JSON schema.

        Raises:
            InputError: There is none such, or it is too much for llama.cpp.
        """
        utf8(field, rules, GRAMMAR_MAX)
        asked = encoded(field, {"rules": rules, "schemas": schemas or {}}, GRAMMAR_MAX)
        with self._lock:
            known = self._grammars.get(asked)
        if known is None:
            what = "cannot be used as a grammar"
            raw = self._judged(field, what, lambda client: client.grammar(asked), schemas or rules)
            known = raw.decode("utf-8", "replace")
            with self._lock:
                self._grammars[asked] = known
                while len(self._grammars) > _KNOWN:
                    self._grammars.popitem(last=False)
        return known

    def close(self) -> None:
        """End the cells for good; those that are at a call soon. Idempotent."""
        mine = 0
        with contextlib.suppress(queue.Empty):
            for _ in self._clients:
                self._turns.get(timeout=_PATIENCE / len(self._clients))
                mine += 1
        for client in self._clients:
            client.close()
        for _ in range(mine):  # who still waits is told that it is closed
            self._turns.put(None)

    def _run(self, work: Callable[[TextClient], _T], doing: str) -> _T:
        """Do something in a free cell; again in another, where somebody killed it.

        Raises:
            CellDied: The cell was lost by it.
        """

        def tell(died: CellDied, again: bool) -> None:
            result = "it was asked again in a new cell" if again else "this call failed"
            self._reporter.file_lone(Incident.of(died), doing, result, self._config, self._info)

        with self._client() as client:
            return retried(lambda: work(client), tell)

    def _judged(self, field: str, problem: str, work: Callable[[TextClient], _T], value: object) -> _T:
        """`_run`, for somebody's program: what goes wrong with it is an error of its giver."""
        try:
            return self._run(work, "run a template" if field == "messages" else "read a grammar")
        except CellRefused as refused:
            raise InputError(field, reprlib.repr(value), f"{problem}: {str(refused)[:_SAID]}") from refused
        except CellDied as died:
            evidence = Incident.of(died).evidence.result()
            if evidence.exit is Exit.KILLED:
                raise
            deadline = self._clients[0].program_deadline
            hung = f"that did not end within {deadline:g} seconds"
            how = hung if evidence.exit is Exit.HANG else "that cost the cell which tried it its life"
            limit = f"{problem}: {how}; there is a crash report of it"
            raise InputError(field, reprlib.repr(value), limit) from died

    @contextlib.contextmanager
    def _client(self) -> Iterator[TextClient]:
        self._turns.get()
        client = self._idle.pop()
        try:
            yield client
        finally:
            self._idle.append(client)
            self._turns.put(None)

    def _ids(self, tokens: Tokens) -> Int32:
        """Checked token ids.

        Raises:
            TokenError: One of them is none of this vocabulary.
        """
        n_vocab = self._info.n_vocab
        try:
            ids = np.asarray(tokens)
        except (ValueError, OverflowError):
            ids = np.asarray(None)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TokenError("tokens", tokens, "must be a list of token ids")
        if len(ids) > _TOKENS_MAX:
            raise TokenError("number of tokens", len(ids), f"must be at most {_TOKENS_MAX}")
        wrong = (ids < 0) | (ids >= n_vocab)
        if wrong.any():
            at = int(wrong.argmax())
            raise TokenError(f"tokens[{at}]", int(ids[at]), f"must be from 0 to {n_vocab - 1}")
        return ids.astype(np.int32)


def utf8(field: str, text: object, most: int = BYTES_MAX) -> bytes:
    """A text in UTF-8; half a surrogate pair, which has none, becomes U+FFFD.

    Raises:
        InputError: It is no text, or too long.
    """
    if not isinstance(text, str):
        raise InputError(field, text, "must be a str")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    if len(raw) > most:
        raise InputError(f"number of bytes of {field}", len(raw), f"must be at most {most}")
    return raw


def encoded(field: str, value: object, most: int = BYTES_MAX) -> bytes:
    """A value as JSON.

    Raises:
        InputError: It is none, or too long.
    """
    try:
        raw = msgspec.json.encode(value)
    except (UnicodeEncodeError, TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        try:  # with surrogates as JSON escapes them
            raw = json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(field, value, f"must be JSON: {error}") from error
    if len(raw) > most:
        raise InputError(f"number of bytes of {field}", len(raw), f"must be at most {most}")
    return raw
