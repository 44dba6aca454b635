"""What a crash report keeps of a sequence that generates, and back again."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, check_integer
from crumplezone.reports.records.report import Generating
from crumplezone.workers.protocol.config import INT32_MAX
from crumplezone.workers.protocol.generate.messages import LOGPROBS_MAX, Join
from crumplezone.workers.protocol.generate.sampling import SEEDS, Sampling, check_sampling

_ASKED = ("stop_tokens", "logprobs", "prompt_logprobs")  # of `Join`, under the same names
_STOPS_MAX = 1024
_OLD_SEEDS = 2**63 - 1  # older reports have seeds up to this


def generating(join: Join, tokens: npt.NDArray[np.int32]) -> Generating:
    """A sequence as it would continue from its last delivered token."""
    drawn = dataclasses.asdict(join.sampling)
    drawn["max_tokens"] -= join.drawn
    stops = [stop.decode("utf-8", "replace") for stop in join.stops]
    asked = {name: getattr(join, name) for name in _ASKED}
    return Generating(join.seq_id, tokens.tolist(), n_prompt=join.n_prompt, stops=stops, **drawn, **asked)


def joining(each: Generating) -> Join:
    """Ask to continue it."""
    n_tokens = len(each.tokens)
    n_prompt = each.n_prompt or n_tokens
    drawn = {field.name: getattr(each, field.name) for field in dataclasses.fields(Sampling)}
    drawn["max_tokens"] = min(each.max_tokens + n_tokens - n_prompt, INT32_MAX)
    drawn["seed"] %= SEEDS
    stops = [stop.encode() for stop in each.stops]
    asked = {name: getattr(each, name) for name in _ASKED}
    return Join(each.seq_id, n_tokens, n_prompt, Sampling(**drawn), stops, **asked)


def check_generating(each: Generating, field: str) -> None:
    """Raise `InputError` unless what a report says of how to continue a sequence is in range.

    Args:
        each: Of a report; untrusted.
        field: What to call it.
    """
    check_integer(f"{field}.seed", each.seed, 0, _OLD_SEEDS)
    check_sampling(msgspec.structs.replace(each, seed=each.seed % SEEDS), f"{field}.")
    check_integer(f"{field}.n_prompt", each.n_prompt, 0, len(each.tokens))
    check_integer(f"{field}.logprobs", each.logprobs, -1, LOGPROBS_MAX)
    for name in ("stops", "stop_tokens"):
        check_integer(f"len({field}.{name})", len(getattr(each, name)), 0, _STOPS_MAX)
    for i, stop in enumerate(each.stops):
        try:
            empty = not stop.encode()
        except UnicodeEncodeError:
            empty = True
        if empty:
            raise InputError(f"{field}.stops[{i}]", stop, "must be a text of at least one character")
    for i, token in enumerate(each.stop_tokens):
        check_integer(f"{field}.stop_tokens[{i}]", token, 0, INT32_MAX)
