"""`crumplezone.lowlevel` answers like llama_cpp, call by call, and lives where that dies."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone import Batch, Decoder, lowlevel
from crumplezone.errors import InputError
from crumplezone.reports.store.store import Store
from tests.support.decoders import Dose, Open, reports_of
from tests.support.native.decode_poison import Poison
from tests.support.paths import ROOT
from tests.support.reference import lowlevel_calls
from tests.support.reference.lowlevel_calls import (
    DEADLY,
    N_BATCH,
    N_CTX_SEQ,
    N_EMBD,
    N_SEQ,
    N_VOCAB,
    fill,
    play,
    sequence,
)

OURS = r"llama_(batch|decode|encode|process|memory|get_memory|get_logits|get_embeddings|set_embeddings).*"


def run_original(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", lowlevel_calls.__name__, *arguments],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def original(tiny: Path) -> dict[str, Any]:
    done = run_original(str(tiny))
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture
def ctx(make: Open, tiny: Path) -> Decoder:
    return make(tiny, N_SEQ, N_CTX_SEQ, n_batch=N_BATCH)


def test_every_call_answers_like_the_original(original: dict[str, Any], make: Open, tiny: Path) -> None:
    for scene, expected in original["answers"].items():
        seen = play(lowlevel, make(tiny, N_SEQ, N_CTX_SEQ, n_batch=N_BATCH), scene)
        assert [name for name, _ in seen] == [name for name, _ in expected]
        for (name, mine), (_, theirs) in zip(seen, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4, err_msg=f"{scene}: {name}")


def test_every_name_is_here_or_said_not_to_be(original: dict[str, Any]) -> None:
    document = (ROOT / "docs/decoder.md").read_text()
    here, absent = document.split("## llama.cpp's own functions")[1].split("Not here")
    theirs = {name for name in original["names"] if re.fullmatch(OURS, name) and "_ctypes" not in name}
    theirs -= {"llama_batch_ext_p", "llama_memory_t"}  # type aliases
    mine = {name for name in dir(lowlevel) if re.fullmatch(OURS, name)}
    assert mine <= theirs
    assert mine <= set(re.findall(r"`(\w+)`", here))
    assert theirs - mine <= set(re.findall(r"`(\w+)`", absent))


@pytest.mark.parametrize(
    ("call", "code"), [("encode", 0), ("null_sequence", -1), ("no_sequence", -1), ("too_many", 0)]
)
def test_what_kills_the_original(call: str, code: int, tiny: Path, ctx: Decoder, store: Store) -> None:
    assert run_original(str(tiny), call).returncode < 0
    assert DEADLY[call](lowlevel, ctx) == code
    assert reports_of(ctx, store) == []


def test_encoding_gives_a_row_for_each_token_and_leaves_the_memory(ctx: Decoder) -> None:
    assert lowlevel.llama_decode(ctx, fill(lowlevel, sequence(0, [9, 9]))) == 0
    batch = lowlevel.llama_batch_get_one([5, 6, 7], 3)
    assert lowlevel.llama_process(ctx, lowlevel.LLAMA_PROCESS_TYPE_ENCODE, batch) == 0
    assert lowlevel.llama_get_embeddings(ctx).shape == (3, N_EMBD)
    row = lowlevel.llama_get_embeddings_ith(ctx, -1)
    np.testing.assert_array_equal(row, lowlevel.llama_get_embeddings(ctx)[2])
    assert lowlevel.llama_memory_seq_pos_max(ctx.memory, 0) == 1
    with pytest.raises(InputError):
        lowlevel.llama_process(ctx, 2, batch)


def test_a_sequence_that_crashes_alone_is_minus_3(make: Open, tiny: Path, dose: Dose) -> None:
    dose(Poison(token=99))
    ctx = make(tiny, N_SEQ, N_CTX_SEQ)
    assert lowlevel.llama_decode(ctx, fill(lowlevel, sequence(0, [5, 99]) + sequence(1, [6, 7]))) == -3
    assert lowlevel.llama_get_logits_ith(ctx, 1) is None
    row = lowlevel.llama_get_logits_ith(ctx, 3)
    assert row is not None
    np.testing.assert_array_equal(lowlevel.llama_get_logits(ctx), [row])
    assert [lowlevel.llama_memory_seq_pos_max(ctx.memory, i) for i in (0, 1)] == [-1, 1]


def test_codes_without_the_ladder(make: Open, tiny: Path) -> None:
    ctx = make(tiny, N_SEQ, N_CTX_SEQ, n_batch=N_BATCH, safe_fallback=False)
    assert lowlevel.llama_decode(ctx, lowlevel.llama_batch_get_one([5] * N_CTX_SEQ, N_CTX_SEQ)) == 0
    assert lowlevel.llama_decode(ctx, lowlevel.llama_batch_get_one([5], 1)) == 1
    assert (
        DEADLY["too_many"](lowlevel, make(tiny, N_SEQ, N_CTX_SEQ, n_batch=N_BATCH, safe_fallback=False)) == -3
    )


def test_rows_of_a_call_that_failed_are_not_those_of_the_one_before(ctx: Decoder) -> None:
    assert lowlevel.llama_get_logits_ith(ctx, 0) is None
    assert lowlevel.llama_decode(ctx, lowlevel.llama_batch_get_one([5, 6], 2)) == 0
    assert lowlevel.llama_get_logits(ctx).shape == (1, N_VOCAB)
    assert [lowlevel.llama_get_logits_ith(ctx, i) is None for i in (0, 1, 2, -1, -2)] == [1, 0, 1, 0, 1]
    assert lowlevel.llama_get_embeddings_ith(ctx, 1) is None
    assert lowlevel.llama_decode(ctx, fill(lowlevel, sequence(0, [5], 9))) == -1
    assert lowlevel.llama_get_logits(ctx).shape == (0, N_VOCAB)


def test_get_one_refers_to_arrays_and_copies_lists(ctx: Decoder) -> None:
    tokens = (lowlevel.llama_token * 2)(5, 6)
    batches = [
        lowlevel.llama_batch_get_one(each, 2)
        for each in (tokens, ctypes.cast(tokens, ctypes.POINTER(lowlevel.llama_token)), [5, 6])
    ]
    tokens[1] = N_VOCAB  # not in the vocabulary
    assert [lowlevel.llama_decode(ctx, batch) for batch in batches] == [-1, -1, 0]
    with pytest.raises(InputError, match="n_tokens"):
        lowlevel.llama_batch_get_one(tokens, 3)
    with pytest.raises(InputError, match="n_tokens"):
        lowlevel.llama_batch_init(0, 0, 1)


def test_a_batch_of_embeddings(ctx: Decoder) -> None:
    batch = lowlevel.llama_batch_init(1, N_EMBD, 1)
    batch.n_tokens = batch.n_seq_id[0] = batch.logits[0] = 1
    for i in range(N_EMBD):
        batch.embd[i] = i / N_EMBD
    assert lowlevel.llama_decode(ctx, batch) == 0
    assert len(lowlevel.llama_get_logits(ctx)) == 1


def test_a_position_is_pointed_to() -> None:
    batch = Batch(4, 2)
    assert lowlevel.llama_batch_ext_add_token(batch, 0, 5) == 0
    assert lowlevel.llama_batch_ext_add_seq(batch, 0, 1)
    assert not lowlevel.llama_batch_ext_add_seq(batch, 0, 2)
    position = lowlevel.llama_pos(7)
    for pointer in (ctypes.byref(position), ctypes.pointer(position), (lowlevel.llama_pos * 1)(7)):
        lowlevel.llama_batch_ext_clear(batch)
        lowlevel.llama_batch_ext_add_token(batch, 0, 5)
        assert lowlevel.llama_batch_ext_set_pos(batch, 0, pointer)
        assert [item.pos for item in batch] == [7]
    assert not lowlevel.llama_batch_ext_set_pos(batch, 1, ctypes.byref(position))
    for wrong in (7, ctypes.cast(8, ctypes.POINTER(lowlevel.llama_pos))):
        with pytest.raises(InputError):
            lowlevel.llama_batch_ext_set_pos(batch, 0, wrong)
    assert [lowlevel.llama_batch_ext_add_token(batch, 0, 5) for _ in range(4)] == [1, 2, 3, -1]


def test_memory_arguments_on_which_llama_cpp_aborts(ctx: Decoder) -> None:
    assert lowlevel.llama_decode(ctx, lowlevel.llama_batch_get_one([5, 6, 7], 3)) == 0
    memory = lowlevel.llama_get_memory(ctx)
    with pytest.raises(InputError):
        lowlevel.llama_memory_seq_pos_max(memory, N_SEQ)
    with pytest.raises(InputError, match="whole sequences"):
        lowlevel.llama_memory_seq_cp(memory, 0, 1, 0, 2)
    lowlevel.llama_memory_seq_cp(memory, 0, 0, -1, -1)
    lowlevel.llama_memory_seq_cp(memory, 0, 1, 0, 3)
    assert lowlevel.llama_memory_seq_pos_max(memory, 1) == 2
    lowlevel.llama_memory_seq_keep(memory, 1)
    assert [lowlevel.llama_memory_seq_pos_max(memory, i) for i in range(N_SEQ)] == [-1, 2]
    assert lowlevel.llama_memory_seq_pos_min(memory, 1) == 0
