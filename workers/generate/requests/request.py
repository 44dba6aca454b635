"""What may be asked of the engine: a prompt, how to draw, where to end, what to tell."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, TokenError, check_integer, check_number
from crumplezone.workers.protocol.config import INT32_MAX, CellInfo
from crumplezone.workers.protocol.generate.sampling import SEEDS, Sampling, SamplingOptions

Prompt = str | tuple[int | str, ...]
GivenPrompt = str | Sequence[int] | Sequence[str] | Sequence[int | str] | npt.NDArray[np.integer[Any]]

CHOICES_MAX = 128
LOGPROBS_MAX = 20
STOPS_MAX = 16
_STOP_BYTES_MAX = 1024  # of all stop strings together: they travel with every start, in one frame
_STOP_TOKENS_MAX = 64
_TIMEOUT_MAX = 1e8  # seconds: three years
_PRIORITY_MAX = 1000


class RequestOptions(SamplingOptions, total=False):
    """All of a `Request` but its prompt, as keyword arguments."""

    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    timeout: float | None
    priority: int
    logprobs: int | None
    echo: bool
    n: int
    best_of: int | None
    special: bool


@dataclass(frozen=True, init=False)
class Request:
    """One request: a prompt and all that is asked of its completion.

    Args:
        prompt: A text; or token ids, which are taken as they are; or both mixed. Texts are tokenised each by
            itself, and the first of all has the tokens before it that the model wants (BOS).
        options: Any of the attributes below, and how to draw: the fields of `Sampling`.

    Attributes:
        sampling: How to draw, but for the seed.
        seed: The same one gives the same text, crash or no crash, but for rounding; None or -1: another for
            each request, told in `Completion.seed`. Choice ``i`` of several has ``seed + i``.
        stop: The text ends before the first of these strings; at most 16, of 1024 bytes together.
        stop_token_ids: Tokens that end the text like an end of generation; at most 64.
        timeout: Seconds after which it ends with what there is, be it in the queue or in flight; None: none.
        priority: The higher is begun first, from -1000 to 1000.
        logprobs: Tell the logarithms of the tokens' probabilities, and of so many of the likeliest in the
            place of each, up to 20; None: none of it.
        echo: Begin the text with the prompt; with ``logprobs``, those of the prompt are told too.
        n: So many completions, up to 128. The prompt is read once.
        best_of: Make so many, and give the ``n`` whose tokens are the likeliest in the mean; None: ``n``.
        special: Whether special tokens that are written out in texts (``<|im_end|>``) are taken for these
            tokens. If a stranger writes the text, he could end his turn, and begin another's.

    Raises:
        InputError: A value is out of range.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    timeout: float | None
    priority: int
    logprobs: int | None
    echo: bool
    n: int
    best_of: int | None
    special: bool

    def __init__(self, prompt: GivenPrompt, **options: Unpack[RequestOptions]) -> None:
        given: dict[str, Any] = dict(options)
        own = {name: given.pop(name, default) for name, default in _DEFAULTS.items()}
        values = {"prompt": _prompt("prompt", prompt), "sampling": Sampling(**given), **_checked(own)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def made(self) -> int:
        """How many completions are made of it."""
        return self.n if self.best_of is None else self.best_of

    def changed(self, **options: Unpack[RequestOptions]) -> Request:
        """The same with other options.

        Raises:
            InputError: A value is out of range.
        """
        given: dict[str, Any] = {
            each.name: getattr(self.sampling, each.name) for each in dataclasses.fields(Sampling)
        }
        given |= {name: getattr(self, name) for name in _DEFAULTS}
        given.update(options)
        return Request(self.prompt, **given)

    def check(self, info: CellInfo, field: str) -> None:
        """Raise `InputError` for tokens that the model has not, or more than its context holds."""
        last = info.n_vocab - 1
        for at, token in enumerate(self.stop_token_ids):
            check_integer(f"stop_token_ids[{at}]", token, 0, last, _VOCABULARY, error=TokenError)
        parts = self.prompt if isinstance(self.prompt, tuple) else (self.prompt,)
        for at, part in enumerate(parts):
            if isinstance(part, int):
                check_integer(f"{field}[{at}]", part, 0, last, _VOCABULARY, error=TokenError)
        check_room(f"number of tokens of {field}", sum(part != "" for part in parts), info)  # at least
        size = sum(len(part) for part in parts if isinstance(part, str))
        if size > (most := info.n_ctx_seq * _TOKEN_CHARACTERS):  # it would be read for long in vain
            limit = f"must be at most {most} in a context of {info.n_ctx_seq} tokens"
            raise InputError(f"number of characters of {field}", size, limit)


_DEFAULTS: dict[str, Any] = {
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "timeout": None,
    "priority": 0,
    "logprobs": None,
    "echo": False,
    "n": 1,
    "best_of": None,
    "special": False,
}
_TOKEN_CHARACTERS = 1024  # of the longest token that there may be: those of spaces have 128
_VOCABULARY = ", the last token of the model's vocabulary"


def check_room(field: str, n_tokens: int, info: CellInfo) -> None:
    """Raise `InputError` unless a prompt of so many tokens leaves room for one more."""
    if not 0 < n_tokens < info.n_ctx_seq:
        limit = f"the context holds {info.n_ctx_seq} tokens per sequence, one of them to generate"
        raise InputError(field, n_tokens, limit)


def requested(prompt: object, options: RequestOptions, field: str, index: int = 0) -> Request:
    """The request that a caller means.

    Args:
        prompt: A `Request`, of which ``options`` change something, or a prompt for one.
        options: Of several prompts alike; a seed among them is that of the first.
        field: What the caller calls the prompt.
        index: The place of this one.

    Raises:
        InputError: It is no prompt, or a value is out of range.
    """
    if isinstance(prompt, Request):
        request = prompt.changed(**options) if options else prompt
    else:
        try:
            request = Request(prompt, **options)  # type: ignore[arg-type]
        except InputError as error:
            if not error.field.startswith("prompt"):
                raise
            raise type(error)(field + error.field.removeprefix("prompt"), error.value, error.limit) from None
    if index and options.get("seed") is not None and request.seed is not None:
        request = request.changed(seed=(request.seed + index * request.made) % SEEDS)
    return request


def seed_of(request: Request) -> int:
    """The seed of its first choice."""
    if request.seed is None:
        return int.from_bytes(os.urandom(8), "little") % SEEDS
    return request.seed


def _checked(own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request but for those of its sampling, as they are kept."""
    values = dict(own)
    values["seed"] = _seed(own["seed"])
    values["stop"] = _stops(own["stop"])
    values["stop_token_ids"] = _ids("stop_token_ids", own["stop_token_ids"])
    if own["timeout"] is not None:
        check_number("timeout", own["timeout"], 0, _TIMEOUT_MAX)
        values["timeout"] = float(own["timeout"])
    check_integer("priority", own["priority"], -_PRIORITY_MAX, _PRIORITY_MAX)
    check_integer("n", own["n"], 1, CHOICES_MAX)
    if own["best_of"] is not None:
        check_integer("best_of", own["best_of"], int(own["n"]), CHOICES_MAX, ", and at least n")
    if own["logprobs"] is not None:
        check_integer("logprobs", own["logprobs"], 0, LOGPROBS_MAX)
    for name in ("echo", "special"):
        if not isinstance(own[name], bool | np.bool_):
            raise InputError(name, own[name], "must be True or False")
        values[name] = bool(own[name])
    for name in ("priority", "n", "best_of", "logprobs"):  # numpy's numbers are welcome, but do not travel
        values[name] = None if own[name] is None else int(own[name])
    return values


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    check_integer("seed", value, -1, SEEDS - 1, "; -1 or None: another each time")
    return None if value == -1 else int(value)


def _stops(value: object) -> tuple[str, ...]:
    stops: tuple[Any, ...] = ()
    if isinstance(value, str):
        stops = (value,)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        stops = tuple(value)
    elif value is not None:
        raise InputError("stop", value, "must be a text, or a list of texts")
    for at, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            raise InputError(f"stop[{at}]", stop, "must be a text of at least one character")
    if len(stops) > STOPS_MAX:
        raise InputError("number of stop strings", len(stops), f"must be at most {STOPS_MAX}")
    size = sum(len(_encoded(f"stop[{at}]", stop)) for at, stop in enumerate(stops))
    if size > _STOP_BYTES_MAX:
        raise InputError("bytes of all stop strings", size, f"must be at most {_STOP_BYTES_MAX}")
    return stops


def _ids(field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes | bytearray):
        raise InputError(field, value, "must be a list of token ids")
    if len(value) > _STOP_TOKENS_MAX:
        raise InputError(f"number of {field}", len(value), f"must be at most {_STOP_TOKENS_MAX}")
    for at, token in enumerate(value):
        check_integer(f"{field}[{at}]", token, 0, INT32_MAX, error=TokenError)
    return tuple(map(int, value))


def _prompt(field: str, value: object) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    texts = str | bytes | bytearray
    if not isinstance(value, Sequence) or isinstance(value, texts) or all(part == "" for part in value):
        limit = "must be a text of at least one character, or token ids, or both in one list"
        raise InputError(field, value, limit)
    for at, part in enumerate(value):
        if not isinstance(part, str):
            check_integer(f"{field}[{at}]", part, 0, INT32_MAX, error=TokenError)
    return tuple(part if isinstance(part, str) else int(part) for part in value)


def _encoded(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(field, text, f"must be encodable as UTF-8 ({error.reason})") from None
