"""No memory or descriptor for a moment: the job is refused, the cell lives, and the next job runs."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import numpy as np

from crumplezone import Batch, Decoder, Llama, Rung
from tests.support.decoders import Open, assert_equal_logits, descriptors, held, kill, limited
from tests.support.models.tiny_gguf import write_tiny_llama

SMALL, LARGE = Batch.of([[4, 5, 6], [7, 8]]), Batch(1500, 1)
LARGE.add_sequence(0, [3 + i % 100 for i in range(1500)], output="all")


def long_decoder(make: Open, tmp_path: Path) -> Decoder:
    model = write_tiny_llama(tmp_path / "long.gguf", n_vocab=4096, n_ctx=2048)
    return make(model, 2, 2048, n_batch=512, spares=0)


def test_without_memory_a_job_costs_no_cell(make: Open, tmp_path: Path) -> None:
    decoder = long_decoder(make, tmp_path)
    expected, pid = decoder.decode(SMALL), decoder.pid
    decoder.memory.clear()
    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert size is not None
    with limited(resource.RLIMIT_AS, (int(size[1]) << 10) + (1 << 20)):
        refused = decoder.decode(LARGE)
    # In one piece it cannot be done; in the smallest ones there may just be enough.
    assert (refused.rung(0), refused.reports, decoder.pid) == (Rung.TOKEN, [], pid)
    assert held(decoder, 2) == [(-1, -1) if refused.errors else (0, 1499), (-1, -1)]
    decoder.memory.clear()
    assert_equal_logits(decoder.decode(SMALL), expected)
    decoder.memory.clear()
    whole = decoder.decode(LARGE)
    assert (whole.errors, whole.rung(0), decoder.pid) == ({}, Rung.SAFE, pid)  # longer than n_batch


def test_what_has_no_descriptor_goes_in_smaller_pieces(make: Open, tmp_path: Path) -> None:
    decoder = long_decoder(make, tmp_path)
    decoder.decode(SMALL)
    decoder.memory.clear()
    free = os.dup(0)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free):
        pieces = decoder.decode(LARGE)
    assert (pieces.errors, pieces.rung(0), pieces.reports) == ({}, Rung.TOKEN, [])
    assert held(decoder, 2) == [(0, 1499), (-1, -1)]
    decoder.memory.clear()
    whole = decoder.decode(LARGE)
    np.testing.assert_allclose(whole.logits(0), pieces.logits(0), rtol=0, atol=0.1)


def arenas() -> list[str]:
    maps = Path("/proc/self/maps").read_text().split("\n")
    return [line for line in [*maps, *descriptors()] if "crumplezone-arena" in line]


def test_a_decoder_that_is_closed_keeps_no_arena(tiny: Path, make: Open) -> None:
    before = len(arenas())
    decoder = make(tiny, 2)
    decoder.decode(SMALL)
    vectors = decoder.embed(["abc"]).vectors
    list(decoder.generate(["abc"], max_tokens=4))
    kill(decoder)
    result = decoder.decode(SMALL)
    kill(decoder)
    assert len(arenas()) > before
    decoder.close()
    assert len(arenas()) <= before  # an earlier test may be about to release its own
    assert np.isfinite(result.logits(0)).all()
    assert np.isfinite(vectors).all()


def test_a_closed_llama_keeps_none_either(tiny: Path, tmp_path: Path) -> None:

    before = len(arenas())
    llama = Llama(str(tiny), n_ctx=256, n_threads=1, verbose=False, reports=tmp_path)
    llama.eval([4, 5, 6])
    llama.close()
    assert len(arenas()) <= before  # an earlier test may be about to release its own
