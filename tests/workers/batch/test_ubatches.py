"""Compute passes: each token once, order kept, and cut where llama.cpp cuts."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import InputError
from crumplezone.workers.batch.columns import Columns, Indices
from crumplezone.workers.batch.ubatches import split_equal, split_seq, split_simple

Split = Callable[[Columns, int], list[Indices]]
SPLITS: dict[str, Split] = {
    "simple": split_simple,
    "equal": lambda columns, n_ubatch: split_equal(columns, n_ubatch, sequential=False),
    "sequential": lambda columns, n_ubatch: split_equal(columns, n_ubatch, sequential=True),
    "seq": split_seq,
}


def batch(sets: list[tuple[int, ...]]) -> Columns:
    """A batch whose tokens belong to these sequences; the id of a token is its index."""
    n = len(sets)
    return Columns(
        tokens=np.arange(n, dtype=np.int32),
        embd=None,
        positions=np.zeros(n, np.int32),
        n_seq_id=np.array([len(each) for each in sets], np.int32),
        seq_ids=np.array([seq_id for each in sets for seq_id in each], np.int32),
        outputs=np.ones(n, np.bool_),
    )


singles = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(lambda ids: batch([(i,) for i in ids]))
coupled = st.lists(
    st.sets(st.integers(0, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=40
).map(batch)
widths = st.integers(1, 12)


@pytest.mark.parametrize("name", list(SPLITS))
@given(data=st.data(), n_ubatch=widths)
@settings(max_examples=60, deadline=None)
def test_each_token_is_in_one_piece_and_keeps_its_place_in_its_sequence(
    name: str, data: st.DataObject, n_ubatch: int
) -> None:
    columns = data.draw(singles if name == "sequential" else coupled)
    pieces = SPLITS[name](columns, n_ubatch)
    rows = np.concatenate(pieces)
    assert sorted(rows.tolist()) == list(range(len(columns)))
    sets = columns.sets()
    for mask in set(sets):
        assert [i for i in rows.tolist() if sets[i] == mask] == [
            i for i, each in enumerate(sets) if each == mask
        ]


@pytest.mark.parametrize("name", list(SPLITS))
@given(columns=singles, n_ubatch=widths)
@settings(max_examples=60, deadline=None)
def test_pieces_are_bounded(name: str, columns: Columns, n_ubatch: int) -> None:
    for piece in SPLITS[name](columns, n_ubatch):
        n_seqs = len(np.unique(columns.seq_ids[piece]))
        assert len(piece) <= n_ubatch or (
            len(piece) == n_seqs == n_ubatch + 1 and name in ("equal", "sequential")
        )


@pytest.mark.parametrize("sequential", [False, True])
@given(columns=singles, n_ubatch=widths)
@settings(max_examples=60, deadline=None)
def test_an_equal_piece_has_as_many_tokens_of_each_sequence(
    sequential: bool, columns: Columns, n_ubatch: int
) -> None:
    for piece in split_equal(columns, n_ubatch, sequential=sequential):
        ids, counts = np.unique(columns.seq_ids[piece], return_counts=True)
        assert len(set(counts.tolist())) == 1
        assert (np.diff(columns.seq_ids[piece]) != 0).sum() == len(ids) - 1  # one sequence behind the other
        if sequential:
            assert np.diff(columns.seq_ids[piece[:: counts[0]]]).tolist() == [1] * (len(ids) - 1)


@given(columns=coupled, n_ubatch=widths)
@settings(max_examples=60, deadline=None)
def test_sets_only_shrink_within_a_piece_by_sequence(columns: Columns, n_ubatch: int) -> None:
    sets = columns.sets()
    for piece in split_seq(columns, n_ubatch):
        masks = [sets[i] for i in piece]
        assert all(after | before == before for before, after in itertools.pairwise(masks))


def test_a_sequential_split_refuses_shared_tokens() -> None:
    with pytest.raises(InputError, match=r"n_seq_id\[1\] is 2: must be 1"):
        split_equal(batch([(0,), (0, 1)]), 4, sequential=True)


@pytest.mark.parametrize("name", list(SPLITS))
def test_a_width_is_at_least_one(name: str) -> None:
    with pytest.raises(InputError, match="n_ubatch"):
        SPLITS[name](batch([(0,)]), 0)


def decode_all(model: str, *, unified: bool) -> None:
    """For each batch on stdin, let llama.cpp say on stdout how it cuts it. Runs in a process of its own."""
    import llama_cpp as C  # noqa: N812 - the C API, which no supervisor loads

    lines: list[str] = []
    log = C.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    C.llama_log_set(log, None)
    loaded = C.llama_model_load_from_file(model.encode(), C.llama_model_default_params())
    for sets, n_ubatch in json.load(sys.stdin):
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 64, n_ubatch, 6
        params.kv_unified = unified
        context: Any = C.llama_init_from_model(loaded, params)
        native = C.llama_batch_init(64, 0, 6)
        native.n_tokens = len(sets)
        follows = dict.fromkeys(range(6), 0)
        for i, seq_ids in enumerate(sets):
            native.token[i], native.n_seq_id[i], native.logits[i] = i, len(seq_ids), 1
            native.pos[i] = follows[seq_ids[0]]
            for j, seq_id in enumerate(seq_ids):
                native.seq_id[i][j] = seq_id
                follows[seq_id] = native.pos[i] + 1
        lines.clear()
        rc = C.llama_decode(context, native)
        pieces = "".join(lines).split("added ubatch to split")[1:]
        print(json.dumps([rc, [[int(i) for i in re.findall(r"id = +(\d+) \(", piece)] for piece in pieces]]))
        C.llama_batch_free(native)
        C.llama_free(context)


@pytest.mark.parametrize("unified", [False, True])
def test_llama_cpp_cuts_the_same(tiny: Path, unified: bool) -> None:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(40):
        n_seqs = int(rng.integers(1, 7))
        ids = rng.integers(0, n_seqs, int(rng.integers(1, 41)))
        ids = np.sort(ids) if rng.random() < 0.5 else ids
        batches.append(([[int(seq_id)] for seq_id in ids], int(rng.integers(1, 13))))
    code = f"from {__name__} import decode_all; decode_all({str(tiny)!r}, unified={unified})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(batches),
        env=os.environ | {"LLAMA_BATCH_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(batches)
    for (sets, n_ubatch), (rc, pieces) in zip(batches, answers, strict=True):
        columns = batch([tuple(each) for each in sets])
        ours = split_simple(columns, n_ubatch) if unified else split_equal(columns, n_ubatch, sequential=True)
        assert rc == 0
        assert pieces == [piece.tolist() for piece in ours]
