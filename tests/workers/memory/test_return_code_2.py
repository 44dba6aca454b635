"""Return code 2: compute passes that ended stay in memory, and must not stay in the caller's."""

from __future__ import annotations

from pathlib import Path

import pytest

from crumplezone import Batch, Rung
from crumplezone.errors import BatchError
from tests.support.decoders import Dose, Open, held, kill, say
from tests.support.models.tiny_gguf import write_tiny_mamba
from tests.support.native.decode_poison import Poison

TOKENS = [1 + i % 20 for i in range(40)]


@pytest.fixture(params=["llama", "mamba"])
def model(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    return tiny if request.param == "llama" else write_tiny_mamba(tmp_path / "mamba.gguf")


def test_journal_and_memory_agree(model: Path, make: Open, dose: Dose, tmp_path: Path) -> None:
    reference = make(model, 2, n_ubatch=8)
    dose(Poison(token=7, min_tokens=9, once=str(tmp_path / "once"), how="interrupt"))
    decoder = make(model, 2, n_ubatch=8, safe_fallback=False)
    for each in (decoder, reference):
        say(each, 1, 4, 5)
    with pytest.raises(BatchError, match="rc 2") as caught:
        decoder.decode(Batch.of([TOKENS]))
    assert caught.value.rc == 2
    assert held(decoder, 2) == held(reference, 2)
    for each in (decoder, reference):
        each.decode(Batch.of([TOKENS]))
    kill(decoder)
    for seq_id in range(2):
        ours, theirs = say(decoder, seq_id, 9), say(reference, seq_id, 9)
        assert abs(ours - theirs).max() < 1e-2


def test_the_safe_rung_does_it_again(tiny: Path, make: Open, dose: Dose, tmp_path: Path) -> None:
    dose(Poison(token=7, min_tokens=9, once=str(tmp_path / "once"), how="interrupt"))
    decoder = make(tiny, 2, n_ubatch=8)
    pid = decoder.pid
    result = decoder.decode(Batch.of([TOKENS, [3]]))
    assert {result.rung(0), result.rung(1)} == {Rung.SAFE}
    assert result.errors == {}
    assert held(decoder, 2) == [(0, 39), (0, 0)]
    assert (decoder.pid, result.reports) == (pid, [])
