"""What a report keeps of a sequence that generates: all of it, and what older reports kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.reports.records.report import Generating
from crumplezone.workers.protocol.generate.messages import Join
from crumplezone.workers.protocol.generate.records import check_generating, generating, joining
from crumplezone.workers.protocol.generate.sampling import SAMPLERS, SEEDS, Sampling

samplings = st.builds(
    Sampling,
    max_tokens=st.integers(5, 99),
    temperature=st.floats(0, 2),
    seed=st.integers(0, SEEDS - 1),
    mirostat_mode=st.integers(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-9, 9), max_size=3),
    samplers=st.permutations(SAMPLERS),
    ignore_eos=st.booleans(),
    grammar=st.just("root ::= [a]"),
    grammar_lazy=st.booleans(),
    grammar_triggers=st.just(("a",)),
)


@given(samplings, st.integers(1, 4), st.integers(1, 4))
def test_a_sequence_is_kept_whole(sampling: Sampling, n_prompt: int, n_drawn: int) -> None:
    tokens = np.arange(n_prompt + n_drawn, dtype=np.int32)
    join = Join(3, len(tokens), n_prompt, sampling, [b"a", b"\xc3\xa9"], [4], 2, prompt_logprobs=True)
    kept = generating(join, tokens)
    assert kept.max_tokens == sampling.max_tokens - n_drawn  # still to come
    read = msgspec.json.decode(msgspec.json.encode(kept), type=Generating)
    check_generating(read, "x")
    assert (joining(read), read.tokens) == (join, tokens.tolist())


def test_a_report_has_the_defaults_of_sampling() -> None:
    plain = Generating(0, [1], 64)
    assert joining(plain).sampling == Sampling()
    assert {field.name for field in dataclasses.fields(Sampling)} <= set(Generating.__struct_fields__)


def test_older_reports_are_read() -> None:
    old = b'{"seq_id":0,"tokens":[1,2,3],"max_tokens":7,"temperature":0.8,"seed":5000015000001}'
    read = msgspec.json.decode(old, type=Generating)
    check_generating(read, "x")
    assert joining(read) == Join(0, 3, 3, Sampling(7, 0.8, seed=5000015000001 % SEEDS))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("x.seed", {"seed": 2**63}),
        ("x.n_prompt", {"n_prompt": 3}),
        ("x.logprobs", {"logprobs": 21}),
        (r"x.stops\[0\]", {"stops": [""]}),
        (r"x.stops\[1\]", {"stops": ["a", "\ud800"]}),
        (r"x.stop_tokens\[0\]", {"stop_tokens": [-1]}),
        (r"len\(x.stops\)", {"stops": ["a"] * 1025}),
        ("x.dry_base", {"dry_base": 0.0}),
        (r"x.samplers\[0\]", {"samplers": ("a",)}),
    ],
)
def test_what_a_report_may_not_say_is_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{field} is "):
        check_generating(Generating(0, [1, 2], 4, **fields), "x")
