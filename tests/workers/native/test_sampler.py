"""How tokens are drawn: by llama.cpp's samplers, from noise that depends on seed and position alone."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.workers.native.engine.sampler import Sampler, noise
from crumplezone.workers.protocol.generate.sampling import Sampling

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
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    **penalties,
)
greedy = st.builds(Sampling, **penalties)


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

    def close(self) -> None:
        C.llama_free(self.context)
        C.llama_model_free(self._model)
        C.llama_log_set(C.llama_log_callback(), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def logits(tiny: Path) -> Iterator[Logits]:
    opened = Logits(tiny)
    yield opened
    opened.close()


def drawn(logits: Logits, sampling: Sampling, history: list[int], n: int, *, begin: int = 0) -> list[int]:
    """Tokens that follow a history, the logits being the same for each."""
    sampler = Sampler(sampling, N_VOCAB, np.array(history, np.int32))
    try:
        return [sampler.draw(logits.context, 0, begin + i) for i in range(n)]
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
@given(st.permutations(range(N_VOCAB)), samplings)
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
    whole = drawn(logits, how, [1, 2, 3], 20)
    assert drawn(logits, how, [1, 2, 3, *whole[:cut]], 20 - cut, begin=cut) == whole[cut:]


def test_tokens_come_as_often_as_they_are_likely(logits: Logits) -> None:
    logits.row[:] = -np.inf
    logits.row[:4] = np.log([0.4, 0.3, 0.2, 0.1])
    n = 4000
    counts = Counter(drawn(logits, Sampling(temperature=1, seed=5), [1], n))
    assert [counts[i] / n for i in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)


def test_seeds_and_positions_give_noise_of_their_own(logits: Logits) -> None:
    seeds = {noise(seed, position) for seed in range(100) for position in range(100)}
    assert len(seeds) > 9990
    assert max(seeds) < C.LLAMA_DEFAULT_SEED  # that one means: another each time
    logits.row[:] = 0
    texts = {tuple(drawn(logits, Sampling(temperature=1, seed=seed), [1], 8)) for seed in range(50)}
    assert len(texts) == 50


def test_samplers_are_freed(logits: Logits) -> None:
    logits.row[:] = 0
    how = Sampling(temperature=1, repeat_penalty=2, penalty_last_n=2**14)
    process = psutil.Process()

    def churn() -> int:
        for _ in range(300):
            drawn(logits, how, list(range(N_VOCAB)) * 64, 2)
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
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field} is ") as caught:
        Sampling(**{field: value})
    assert caught.value.field == field


def test_numbers_of_numpy_are_numbers() -> None:
    how = Sampling(np.int64(5), np.float64(0.5), seed=np.int32(3))  # type: ignore[arg-type]
    assert (type(how.max_tokens), type(how.temperature), type(how.seed)) == (int, float, int)
