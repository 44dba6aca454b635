"""How tokens are drawn: by llama.cpp's samplers, from noise that depends on seed and position alone."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.workers.native.engine.sampler import END, Sampler, Vocabulary
from crumplezone.workers.native.engine.trigger import Trigger
from crumplezone.workers.native.grammar import GrammarError, begun
from crumplezone.workers.protocol.generate.sampling import BIASES_MAX, SAMPLERS, SEEDS, Sampling

N_VOCAB = 128
quick = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
floats = st.floats(-20, 20, width=32)
logits_like = st.lists(floats, min_size=N_VOCAB, max_size=N_VOCAB).map(lambda row: np.array(row, np.float32))
histories = st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=30)
penalties = {
    "repeat_penalty": st.floats(0.5, 3, width=32),
    "frequency_penalty": st.floats(-2, 2, width=32),
    "presence_penalty": st.floats(-2, 2, width=32),
    "penalty_last_n": st.integers(0, 40),
}
temperatures = st.sampled_from([0.0, 0.3, 0.8, 1.5])
truncations = {
    "top_k": st.sampled_from([0, 1, 5, 40, 1000]),
    "top_p": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
}
seeds = st.integers(0, SEEDS - 1)
greedy = st.builds(Sampling, **penalties)
samplings = st.builds(
    Sampling,
    temperature=temperatures,
    seed=seeds,
    typical_p=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    top_n_sigma=st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
    dynatemp_range=st.sampled_from([0.0, 0.5, 5.0]),
    dynatemp_exponent=st.sampled_from([0.0, 1.0, 30.0]),
    xtc_probability=st.sampled_from([0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.0, 0.1, 0.6]),
    dry_multiplier=st.sampled_from([0.0, 0.8, 100.0]),
    dry_base=st.sampled_from([1.0, 1.75, 100.0]),
    dry_allowed_length=st.integers(0, 3),
    dry_penalty_last_n=st.sampled_from([-1, 0, 5, 2**16]),
    dry_sequence_breakers=st.lists(st.sampled_from(["a", "\n", "b c", "\u00e9x"]), max_size=2, unique=True),
    mirostat_mode=st.sampled_from([0, 0, 0, 1, 2]),
    mirostat_tau=st.sampled_from([0.0, 5.0, 100.0]),
    mirostat_eta=st.sampled_from([0.0, 0.1, 100.0]),
    logit_bias=st.dictionaries(st.integers(0, N_VOCAB + 9), st.floats(-100, 100), max_size=9),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 9),
    samplers=st.lists(st.sampled_from(SAMPLERS), unique=True).map(tuple),
    **truncations,
    **penalties,
)
simple = st.builds(Sampling, temperature=temperatures, seed=seeds, **truncations, **penalties)


class Logs:
    """What llama.cpp would have said."""

    last_error = ""


class Logits:
    """A context with one row of logits, which can be set."""

    def __init__(self, model: Path) -> None:
        C.llama_backend_init()
        self._quiet = C.llama_log_callback(lambda *_: None)
        C.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = C.llama_model_load_from_file(str(model).encode(), C.llama_model_default_params())
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = 8
        params.n_threads = params.n_threads_batch = 1  # more would leave threads behind in this process
        self.context: Any = C.llama_init_from_model(self._model, params)
        assert C.llama_decode(self.context, C.llama_batch_get_one((C.llama_token * 1)(1), 1)) == 0
        self.row = np.ctypeslib.as_array(C.llama_get_logits_ith(self.context, 0), (N_VOCAB,))
        self.vocabulary = Vocabulary(C.llama_model_get_vocab(self._model), Logs())  # type: ignore[arg-type]

    def close(self) -> None:
        self.vocabulary.close()
        C.llama_free(self.context)
        C.llama_model_free(self._model)
        C.llama_log_set(C.llama_log_callback(), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def logits(tiny: Path) -> Iterator[Logits]:
    opened = Logits(tiny)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def smollm_vocabulary(smollm: Path) -> Iterator[Vocabulary]:
    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(smollm).encode(), params)
    vocabulary = Vocabulary(C.llama_model_get_vocab(model), Logs())  # type: ignore[arg-type]
    yield vocabulary
    vocabulary.close()
    C.llama_model_free(model)


def tokens_of(vocabulary: Vocabulary, text: bytes) -> list[int]:
    room = (C.llama_token * 64)()
    n = C.llama_tokenize(vocabulary.vocab, text, len(text), room, 64, False, False)
    return room[:n]


def drawn(logits: Logits, sampling: Sampling, history: list[int], n: int) -> list[int]:
    """Tokens that are drawn after others, the logits being the same for each."""
    sampler = Sampler(sampling, logits.vocabulary, history)
    try:
        if sampling.looks_back:
            for token in history:
                sampler.again(logits.row, token)
        return [sampler.draw(logits.context, 0, logits.row, int(logits.row.argmax())) for _ in range(n)]
    finally:
        sampler.close()


def penalised(row: npt.NDArray[np.float32], history: list[int], how: Sampling) -> npt.NDArray[np.float32]:
    """By the definition of the penalties."""
    row = row.copy()
    for token, count in Counter(history[max(len(history) - how.penalty_last_n, 0) :]).items():
        penalty = np.float32(how.repeat_penalty)
        row[token] = row[token] * penalty if row[token] <= 0 else row[token] / penalty
        row[token] -= np.float32(count) * np.float32(how.frequency_penalty) + np.float32(how.presence_penalty)
    return row


def likeliest(row: npt.NDArray[np.float32], how: Sampling) -> set[int]:
    """The tokens that top_k, top_p and min_p leave."""
    order = np.argsort(-row, kind="stable")[: how.top_k or None]
    share = np.exp(row[order] - row[order[0]])
    order = order[: int(np.searchsorted(np.cumsum(share / share.sum()), how.top_p)) + 1]
    return set(order[row[order] >= row[order[0]] + np.log(how.min_p or 1e-30)].tolist())


@quick
@given(logits_like, histories, greedy)
def test_penalties_are_as_defined(
    logits: Logits, row: npt.NDArray[np.float32], history: list[int], how: Sampling
) -> None:
    logits.row[:] = row
    expected = penalised(row, history, how)
    (token,) = drawn(logits, how, history, 1)
    assert expected[token] == pytest.approx(expected.max(), abs=1e-4)


@quick
@given(st.permutations(range(N_VOCAB)), simple)
def test_only_what_is_likely_enough_is_drawn(logits: Logits, order: list[int], how: Sampling) -> None:
    logits.row[:] = np.array(order, np.float32) / 8  # no two are equal
    how = Sampling(**asdict(how) | {"penalty_last_n": 0, "temperature": how.temperature or 1.0})
    assert set(drawn(logits, how, [1], 20)) <= likeliest(logits.row, how)


@quick
@given(logits_like, samplings, st.integers(0, 19))
def test_a_sequence_that_is_continued_elsewhere_draws_the_same(
    logits: Logits, row: npt.NDArray[np.float32], how: Sampling, cut: int
) -> None:
    logits.row[:] = row
    whole = drawn(logits, how, [], 20)
    assert set(whole) <= set(range(N_VOCAB))
    assert drawn(logits, how, whole[:cut], 20 - cut) == whole[cut:]


def test_tokens_come_as_often_as_they_are_likely(logits: Logits) -> None:
    logits.row[:] = -np.inf
    logits.row[:4] = np.log([0.4, 0.3, 0.2, 0.1])
    n = 4000
    counts = Counter(drawn(logits, Sampling(temperature=1, seed=5), [1], n))
    assert [counts[i] / n for i in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)


def test_seeds_give_noise_of_their_own(logits: Logits) -> None:
    logits.row[:] = 0
    texts = {tuple(drawn(logits, Sampling(temperature=1, seed=seed), [], 8)) for seed in range(50)}
    assert len(texts) == 50
    assert len(set(drawn(logits, Sampling(temperature=1), [], 50))) > 25


def test_the_noise_is_that_of_one_generator(logits: Logits) -> None:
    """Of llama.cpp, whose seed is the request's: one number for each token."""
    logits.row[:] = 0
    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_dist(7))
    expected = [C.llama_sampler_sample(chain, logits.context, 0) for _ in range(50)]
    C.llama_sampler_free(chain)
    assert drawn(logits, Sampling(temperature=1, seed=7), [], 50) == expected


# --- ends, biases, grammars


def test_what_ends_a_text_waits_for_min_tokens(logits: Logits) -> None:
    end = logits.vocabulary.ends[0]
    logits.row[:], logits.row[end], logits.row[5] = 0, 9, 5
    for temperature in (0.0, 0.01):
        how = Sampling(temperature=temperature, min_tokens=3)
        assert drawn(logits, how, [], 4) == [5, 5, 5, end]
        assert drawn(logits, how, [5, 5], 2) == [5, end]
        assert drawn(logits, Sampling(temperature=temperature, ignore_eos=True), [], 4) == [5] * 4
        stop = Sampler(how, logits.vocabulary, [], [5])
        assert stop.draw(logits.context, 0, logits.row, end) not in (5, end)
        stop.close()


def test_a_bias_is_added_to_the_logit(logits: Logits) -> None:
    logits.row[:], logits.row[3] = 0, 9
    assert drawn(logits, Sampling(logit_bias={4: 9.5}), [], 1) == [4]
    assert drawn(logits, Sampling(logit_bias={3: -9.5, 4: 0.1}, temperature=0.001), [], 1) == [4]


def letters(logits: Logits) -> dict[str, int]:
    """The tokens of one letter each."""
    room = ctypes.create_string_buffer(16)
    found: dict[str, int] = {}
    for token in range(N_VOCAB):
        n = C.llama_token_to_piece(logits.vocabulary.vocab, token, room, 16, 0, False)
        found.setdefault(room.raw[:n].decode("utf-8", "replace"), token)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"frequency_penalty": 0.1}, {"mirostat_mode": 2}]
)
def test_a_grammar_lets_pass_what_goes_on_with_it(logits: Logits, options: dict[str, Any]) -> None:
    token = letters(logits)
    logits.row[:], logits.row[token["z"]] = 0, 2
    how = Sampling(grammar='root ::= "ab" [xyz]', **options)
    *fixed, last, end = drawn(logits, how, [], 4)
    assert fixed == [token["a"], token["b"]]
    assert last in {token[letter] for letter in "xyz"}
    assert end in logits.vocabulary.ends
    assert drawn(logits, how, [*fixed, last], 1) == [end]
    assert drawn(logits, Sampling(grammar=how.grammar, ignore_eos=True, **options), [*fixed, last], 1) == [
        END
    ]


def test_a_lazy_grammar_holds_from_its_trigger_on(logits: Logits) -> None:
    token = letters(logits)
    logits.row[:], logits.row[token["z"]] = 0, 2
    lazy: dict[str, Any] = {"grammar_lazy": True, "grammar_triggers": ["z(b)"]}
    for temperature in (0.0, 0.01):
        how = Sampling(grammar='root ::= "b" "cccc"', temperature=temperature, **lazy)
        assert drawn(logits, how, [token["b"]], 2) == [token["z"]] * 2
        assert drawn(logits, how, [token["z"], token["b"]], 2) == [token["c"]] * 2
        wrong = Sampling(grammar='root ::= "c"', temperature=temperature, **lazy)
        assert drawn(logits, wrong, [token["z"], token["b"]], 2) == [END] * 2


def test_a_trigger_may_begin_within_a_token() -> None:
    trigger = Trigger(["<(a)?b>", "(c+)d$"])
    assert trigger.fires(7, b"xx") is None
    assert trigger.fires(8, b"y\xc3") is None
    assert trigger.fires(9, b"\xa9z<") is None
    assert trigger.fires(10, b"b") is None
    assert trigger.fires(11, b">") == (b"\xa9z", [9, 10, 11])
    assert Trigger(["c(d)"]).fires(1, b"abcd") == (b"abc", [1])
    assert Trigger(["()"]).fires(1, b"") == (b"", [])


def test_a_grammar_goes_on_from_within_a_token(smollm_vocabulary: Vocabulary) -> None:
    """Whose beginning is before it."""
    text = b'x = "\xc3\xa9\\[<'
    grammar, root = begun('root ::= "<" [0-9]+', text[:-1].decode())
    made = smollm_vocabulary.grammar(grammar, root)
    try:
        for token in tokens_of(smollm_vocabulary, text):
            smollm_vocabulary.one.fill_one(token, 1.0)
            smollm_vocabulary.one.apply(made)
            assert smollm_vocabulary.one.logits[0] == 1
            C.llama_sampler_accept(made, token)
        for follows, passes in ((b"7", True), (b"x", False)):
            smollm_vocabulary.one.fill_one(tokens_of(smollm_vocabulary, follows)[0], 1.0)
            smollm_vocabulary.one.apply(made)
            assert (smollm_vocabulary.one.logits[0] == 1) == passes
    finally:
        C.llama_sampler_free(made)


def test_a_token_that_the_grammar_would_not_have_let_pass_ends_the_text(logits: Logits) -> None:
    token = letters(logits)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "mirostat_mode": 2}):
        how = Sampling(grammar='root ::= "ab"', **options)  # type: ignore[arg-type]
        assert drawn(logits, how, [token["a"], token["x"], token["b"]], 1) == [END]


def test_a_grammar_that_is_none_is_refused(logits: Logits) -> None:
    for grammar in ('root ::= "', "no ::= [a]", "root ::= missing", "root ::= root [a]"):
        with pytest.raises(GrammarError):
            Sampler(Sampling(grammar=grammar), logits.vocabulary)


def test_samplers_are_freed(logits: Logits) -> None:
    logits.row[:] = 0
    how = Sampling(
        temperature=1,
        repeat_penalty=2,
        penalty_last_n=2**14,
        min_tokens=1,
        dry_multiplier=1,
        grammar="root ::= [a-z]*",
    )
    process = psutil.Process()

    def churn() -> int:
        for _ in range(300):
            drawn(logits, how, [], 2)
        return int(process.memory_info().rss)

    assert churn() - churn() > -(2**22)  # each has a ring of 64 KiB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", "x"),
        ("repeat_penalty", 0),
        ("frequency_penalty", float("inf")),
        ("presence_penalty", -101),
        ("penalty_last_n", 2**16 + 1),
        ("seed", -1),
        ("seed", SEEDS),
        ("min_tokens", -1),
        ("dynatemp_range", -1),
        ("dynatemp_exponent", 101),
        ("typical_p", 1.5),
        ("top_n_sigma", float("nan")),
        ("xtc_probability", 2),
        ("xtc_threshold", -0.5),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", "ab"),
        ("mirostat_mode", 3),
        ("mirostat_tau", -1),
        ("mirostat_eta", "x"),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("samplers", "top_k"),
        ("grammar", b"root"),
        ("grammar", "root\0"),
        ("grammar_lazy", True),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field} is ") as caught:
        Sampling(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("token of logit_bias is -1", {"logit_bias": {-1: 1}}),
        (r"logit_bias\[3\] is inf", {"logit_bias": {3: float("inf")}}),
        (r"len\(logit_bias\) is", {"logit_bias": dict.fromkeys(range(BIASES_MAX + 1), 0)}),
        (r"samplers\[1\] is 'top_x'", {"samplers": ["top_k", "top_x"]}),
        (r"samplers\[1\] is 'top_k': must not come twice", {"samplers": ["top_k", "top_k"]}),
        (r"bytes of dry_sequence_breakers\[0\] is 41", {"dry_sequence_breakers": ["x" * 41]}),
        (r"bytes of dry_sequence_breakers\[0\] is 0", {"dry_sequence_breakers": [""]}),
        (r"len\(dry_sequence_breakers\) is 17", {"dry_sequence_breakers": list("abcdefghijklmnopq")}),
        (r"grammar_triggers\[0\] is '\(a'", {"grammar": "x", "grammar_triggers": ["(a"]}),
        (r"len\(grammar_triggers\[0\]\) is 1001", {"grammar": "x", "grammar_triggers": ["a" * 1001]}),
        (r"dry_sequence_breakers\[0\] is", {"dry_sequence_breakers": ["\ud800"]}),
    ],
)
def test_what_is_wrong_inside_is_named(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Sampling(**options)


def test_a_bias_is_of_a_token_that_there_is() -> None:
    with pytest.raises(InputError, match=r"^token of logit_bias is 128: must be from 0 to 127"):
        Sampling(logit_bias={128: 1}).check_vocabulary(N_VOCAB)


def test_a_sampling_travels() -> None:
    how = Sampling(logit_bias={5: 1}, samplers=["top_k"], grammar="x", grammar_triggers=["a+"])  # type: ignore[arg-type]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(how), type=Sampling) == how


def test_numbers_of_numpy_are_numbers() -> None:
    how = Sampling(np.int64(5), np.float64(0.5), seed=np.int32(3))  # type: ignore[arg-type]
    assert (type(how.max_tokens), type(how.temperature), type(how.seed)) == (int, float, int)
