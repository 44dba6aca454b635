"""What a request asks of a cell besides tokens: where its text ends, how likely they were, what was read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.generate.messages import OUTPUTS, Join, Logprob, Progress
from crumplezone.workers.protocol.generate.sampling import Sampling
from tests.support.models.tiny_gguf import write_tiny_mamba

CHUNK = 200
WARM = Sampling(40, temperature=0.8, seed=7)

Ask = Callable[..., list[Progress]]


def words(n: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 128, n).tolist()
    return tokens


@pytest.fixture
def client(tiny: Path) -> Iterator[DecodeClient]:
    made = DecodeClient(
        configure(tiny, n_ctx=1024, n_batch=CHUNK, n_seq_max=4, n_threads=1), Limits(60, None), None
    )
    made.start()
    yield made
    made.close()


def join(
    seq_id: int, prompt: Sequence[int], sampling: Sampling, drawn: Sequence[int] = (), **asked: Any
) -> tuple[Join, Any]:
    tokens = np.array([*prompt, *drawn], np.int32)
    return Join(seq_id, len(tokens), len(prompt), sampling, **asked), tokens


def finish(
    client: DecodeClient, joins: list[Any], *, steps: int = 8, reset: bool = True
) -> dict[int, list[Progress]]:
    """Every reply of each sequence, to its end."""
    told: dict[int, list[Progress]] = {each.seq_id: [] for each, _ in joins}
    running = set(told)
    while running:
        for progress in client.generate(joins, steps, CHUNK, reset=reset).progress:
            told[progress.seq_id].append(progress)
            if progress.finished:
                running.remove(progress.seq_id)
        joins, reset = [], False
    return told


def alone(client: DecodeClient, *args: Any, **asked: Any) -> Progress:
    """All that came of one prompt by itself."""
    (told,) = finish(client, [join(0, *args, **asked)]).values()
    return Progress(
        0,
        [token for each in told for token in each.tokens],
        b"".join(each.text for each in told),
        told[-1].finished,
        logprobs=[one for each in told for one in each.logprobs],
        prompt_logprobs=[one for each in told for one in each.prompt_logprobs],
        read=told[-1].read,
        cached=told[-1].cached,
    )


# --- ends


def test_a_stop_string_ends_a_text_at_once(client: DecodeClient) -> None:
    prompt = words(9)
    whole = alone(client, prompt, WARM)
    assert whole.finished == "length"
    for begin in range(0, len(whole.text) - 4, 5):
        stop = whole.text[begin : begin + 4]
        cut = alone(client, prompt, WARM, stops=[b"\xff\xff", stop])
        first = whole.text.find(stop) + len(stop)
        assert cut.finished == "word"
        assert whole.text.startswith(cut.text)
        assert len(cut.text) >= first
        assert whole.tokens[: len(cut.tokens)] == cut.tokens
        assert (
            sum(len(piece) for piece in [cut.text]) - first < 8
        )  # no token came behind the one that ends it


def test_a_stop_string_is_found_across_a_crash(client: DecodeClient) -> None:
    prompt = words(9)
    whole = alone(client, prompt, WARM)
    stop = whole.text[10:16]
    cut = alone(client, prompt, WARM, stops=[stop])
    for n in range(1, len(cut.tokens)):
        rest = alone(client, prompt, WARM, whole.tokens[:n], stops=[stop])
        assert (whole.tokens[:n] + rest.tokens, rest.finished) == (cut.tokens, "word")


def test_a_stop_token_ends_a_text_and_is_not_in_it(client: DecodeClient) -> None:
    prompt = words(9)
    whole = alone(client, prompt, WARM)
    stop = whole.tokens[12]
    cut = alone(client, prompt, WARM, stop_tokens=[5, stop])
    assert (cut.finished, cut.tokens) == ("word", whole.tokens[: whole.tokens.index(stop)])
    later = alone(client, prompt, replace(WARM, min_tokens=30), stop_tokens=[stop])
    assert len(later.tokens) >= 30
    assert stop not in later.tokens[:30]


# --- grammars


def test_a_grammar_that_is_none_is_refused_alone(client: DecodeClient) -> None:
    expected = alone(client, words(9), WARM)
    bad = replace(WARM, grammar='root ::= "')
    told = finish(client, [join(0, words(5), bad), join(1, words(9), WARM), join(2, words(5, 1), bad)])
    for seq_id in (0, 2):
        (refused,) = told[seq_id]
        assert (refused.finished, refused.tokens, bool(refused.problem)) == ("refused", [], True)
    assert [token for each in told[1] for token in each.tokens] == expected.tokens
    (refused,) = finish(client, [join(0, words(5), bad)])[0]
    assert refused.finished == "refused"


def test_a_request_may_be_larger_than_a_frame(client: DecodeClient) -> None:
    grammar = 'root ::= "ab" "c" "d"\n' + "".join(f'rule{i} ::= "x{i}"\n' for i in range(20_000))
    told = finish(client, [join(i, words(5, i), Sampling(9, grammar=grammar)) for i in range(4)])
    for each in told.values():
        assert (b"".join(progress.text for progress in each), each[-1].finished) == (b"abcd", "stop")


# --- how likely


def logits(client: DecodeClient, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Of each token, by the definition."""
    from crumplezone import Batch
    from crumplezone.workers.batch.call import DecodeOptions

    rows = client.send(Batch.of([tokens], outputs="all").columns(), DecodeOptions()).logits
    assert rows is not None
    return np.asarray(rows, np.float64)


def check(told: Logprob, row: np.ndarray[Any, Any], token: int, n: int) -> None:
    """It is the logarithm of the softmax; the batches had other shapes."""
    expected = row - row.max() - math.log(np.exp(row - row.max()).sum())
    assert told.logprob == pytest.approx(expected[token], abs=0.02)
    assert [value for _, value in told.top] == pytest.approx(sorted(expected, reverse=True)[:n], abs=0.02)
    assert [expected[each] for each, _ in told.top] == pytest.approx(
        [value for _, value in told.top], abs=0.02
    )


@pytest.mark.parametrize("n", [0, 3, 20])
def test_logprobs_are_the_logarithms_of_the_softmax(n: int, client: DecodeClient) -> None:
    prompt, sampling = (
        words(150),
        Sampling(20, temperature=1, top_k=3, frequency_penalty=1),
    )  # samplers are no part of it
    told = alone(client, prompt, sampling, logprobs=n, prompt_logprobs=True)
    assert (len(told.prompt_logprobs), len(told.logprobs)) == (149, len(told.tokens))
    tokens = prompt + told.tokens
    rows = logits(client, tokens)
    for i, each in enumerate([*told.prompt_logprobs, *told.logprobs], 1):
        check(each, rows[i - 1], tokens[i], n)


def test_no_more_logits_at_once_than_there_is_room_for(client: DecodeClient) -> None:
    joins = [join(i, words(180, i), Sampling(3), logprobs=20, prompt_logprobs=True) for i in range(4)]
    told = finish(client, joins, steps=1)
    assert {sum(len(each.prompt_logprobs) for each in told[i]) for i in told} == {179}
    for i in range(max(map(len, told.values()))):
        asked = [len(each[i].prompt_logprobs) for each in told.values() if i < len(each)]
        assert sum(asked) <= OUTPUTS


def test_a_reply_with_probabilities_fits_a_frame(client: DecodeClient) -> None:
    joins = [join(i, words(200, i), Sampling(50), logprobs=20, prompt_logprobs=True) for i in range(4)]
    told = finish(client, joins, steps=500)
    assert {sum(len(each.logprobs) for each in told[i]) for i in told} == {50}


def test_a_prompt_whose_logprobs_are_asked_for_is_not_copied(client: DecodeClient) -> None:
    prompt = words(60)
    expected = alone(client, prompt, Sampling(5), logprobs=1, prompt_logprobs=True)
    told = finish(
        client, [join(i, prompt, Sampling(5), logprobs=1, prompt_logprobs=bool(i)) for i in range(3)]
    )
    assert [told[i][-1].cached for i in told] == [0, 0, 0]
    for i in (1, 2):
        assert [one for each in told[i] for one in each.prompt_logprobs] == expected.prompt_logprobs


def test_what_was_read_and_what_was_there(client: DecodeClient) -> None:
    prompt = words(100)
    told = finish(client, [join(i, prompt, Sampling(9)) for i in range(2)])
    assert [told[i][-1].cached for i in told] == [0, 99]
    assert [told[i][-1].read for i in told] == [108, 108]  # the last token was drawn, but not decoded
    told = finish(client, [join(3, prompt, Sampling(9))], reset=False)
    assert told[3][0].cached == 99


# --- samplers that look back


@pytest.mark.parametrize(
    "options",
    [
        {"mirostat_mode": 1},
        {"mirostat_mode": 2},
        {"xtc_probability": 0.5, "xtc_threshold": 0.01, "top_p": 0.9},
    ],
)
def test_samplers_are_moved_over_the_logits_of_before(options: dict[str, Any], client: DecodeClient) -> None:
    prompt, how = words(9), replace(WARM, max_tokens=80, **options)
    whole = alone(client, prompt, how)
    assert len(whole.tokens) > 45
    for cut in (1, 2, 30, len(whole.tokens) - 1):
        assert alone(client, prompt, how, whole.tokens[:cut]).tokens == whole.tokens[cut:]
    # also where the memory holds all of it
    told = finish(client, [join(0, prompt, how, whole.tokens[:40])], reset=False)[0]
    assert [token for each in told for token in each.tokens] == whole.tokens[40:]
    assert told[0].cached == len(prompt) - 1


def test_a_recurrent_model_tells_as_much(tmp_path: Path) -> None:
    config = configure(
        write_tiny_mamba(tmp_path / "mamba.gguf"), n_ctx=512, n_batch=CHUNK, n_seq_max=2, n_threads=1
    )
    client = DecodeClient(config, Limits(60, None), None)
    client.start()
    try:
        how = replace(WARM, mirostat_mode=2)
        whole = alone(client, words(9), how, logprobs=2, prompt_logprobs=True)
        assert len(whole.prompt_logprobs) == 8
        assert alone(client, words(9), how, whole.tokens[:20]).tokens == whole.tokens[20:]
    finally:
        client.close()
