"""A cell that died and cannot be had again, in the middle of a job: what was produced is kept."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest

from crumplezone import Batch, Completion, Decoder, Rung
from crumplezone.errors import BatchError, CrumplezoneError, ModelError, SequenceError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from crumplezone.workers.incidents.deaths import KILLS_MAX
from crumplezone.workers.protocol.messages import Request
from tests.support.decoders import Dose, Open, assert_equal_logits, kill, outcome, reports_of
from tests.support.native.decode_poison import Poison, PoisonCell

BATCH = Batch.of([[4, 5, 6], [7, 8]])
# Two at a time: two finish, the third dies at position 31 beside the fourth, and the fifth has to wait.
PROMPTS = ["abcd", "efgh", "a longer prompt", "ijkl", "mnop"]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A model to be taken away. A cell that runs has mapped it and goes on."""
    return Path(shutil.copy(tiny, tmp_path / "model.gguf"))


def generate(decoder: Decoder) -> list[Completion]:
    return list(decoder.generate(PROMPTS, max_tokens=20))


def awake(decoder: Decoder) -> Decoder:
    """With its lane's cell running."""
    assert next(decoder.generate(["a"], max_tokens=1)).error is None
    return decoder


def test_prompts_in_flight_and_in_the_queue_get_an_error(
    model: Path, make: Open, store: Store, dose: Dose, tmp_path: Path
) -> None:
    undisturbed = generate(make(model, 2))
    dose(Poison(position=31, once=str(tmp_path / "crashed")))
    decoder = awake(make(model, 2, start="spawn"))
    model.unlink()
    completions = generate(decoder)
    assert outcome(completions[:2]) == outcome(undisturbed[:2])
    assert [c.error for c in completions[:2]] == [None, None]
    for lost, whole in zip(completions[2:], undisturbed[2:], strict=True):
        assert lost.index == whole.index
        assert isinstance(lost.error, SequenceError)
        assert f"model {model}: cannot be read (No such file or directory)" in str(lost.error)
        assert lost.finish_reason == "error"
        assert lost.tokens == whole.tokens[: len(lost.tokens)]
        assert whole.text.startswith(lost.text)
    assert [0 < len(lost.tokens) < 20 for lost in completions[2:]] == [True, True, False]
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit == Exit.SIGNAL
    assert report.blamed == []
    assert [c.reports for c in completions] == [(), (), *[(str(store.path(report.id)),)] * 2, ()]


def test_the_memory_waits_until_the_model_is_there_again(model: Path, make: Open) -> None:
    undisturbed, decoder = make(model, 2), make(model, 2, start="spawn")
    for each in (undisturbed, decoder):
        each.decode(BATCH)
    elsewhere = model.rename(model.with_suffix(".moved"))
    kill(decoder)
    lost = decoder.decode(BATCH)
    assert list(lost.errors) == [0, 1]
    assert all("cannot be read" in str(error) for error in lost.errors.values())
    with pytest.raises(ModelError):
        decoder.memory.remove(0, 1)
    assert [decoder.memory.pos_max(i) for i in (0, 1)] == [2, 1]
    elsewhere.rename(model)
    assert_equal_logits(decoder.decode(BATCH), undisturbed.decode(BATCH))


def test_without_fallback_the_error_says_what_is_missing(
    model: Path, make: Open, dose: Dose, tmp_path: Path
) -> None:
    dose(Poison(position=31, once=str(tmp_path / "crashed")))
    decoder = awake(make(model, 2, start="spawn", safe_fallback=False))
    model.unlink()
    completions = generate(decoder)
    assert [c.error is None for c in completions] == [True, True, False, False, False]
    assert [0 < len(c.tokens) < 20 for c in completions[2:]] == [True, True, False]
    assert "cannot be read" in str(completions[4].error)
    kill(decoder)
    with pytest.raises(BatchError, match=r"model\.gguf: cannot be read") as caught:
        decoder.decode(BATCH)
    assert caught.value.report is None
    with pytest.raises(ModelError):
        decoder.tokenize("abc")


def test_a_model_that_shrinks_under_its_cell(model: Path, make: Open, store: Store) -> None:
    decoder = awake(make(model, 2, start="spawn"))
    whole = model.read_bytes()
    os.truncate(model, len(whole) - 40_000)  # its pages are gone from the running cell too: SIGBUS
    completions = generate(decoder)
    assert [c.index for c in completions] == [0, 1, 2, 3, 4]
    assert all("llama.cpp cannot load it" in str(c.error) for c in completions)
    (report,) = reports_of(decoder, store)
    assert report.evidence.fault is not None
    assert report.evidence.fault.name == "SIGBUS"
    result = decoder.decode(BATCH)
    assert len(result.reports) == 1  # of the cell that held the memory
    assert list(result.errors) == [0, 1]
    model.write_bytes(whole)
    assert decoder.decode(BATCH).rung(0) == Rung.NATIVE


def test_a_machine_without_descriptors(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 2, spares=0)
    reference = decoder.decode(BATCH)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kill(decoder)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        result = decoder.decode(BATCH)
        (completion,) = decoder.generate(["abc"], max_tokens=4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    errors: list[CrumplezoneError | None] = [*result.errors.values(), completion.error]
    assert len(errors) == 3
    assert all("Too many open files" in str(error) for error in errors)
    assert [decoder.memory.pos_max(i) for i in (0, 1)] == [2, 1]
    decoder.memory.clear()
    again = decoder.decode(BATCH)
    assert again.rung(0) == Rung.NATIVE
    np.testing.assert_array_equal(again.logits(0), reference.logits(0))


DEATHS = "CRUMPLEZONE_TEST_DEATHS"


class Mortal(PoisonCell):
    """Killed, as by somebody else, at some requests: a file has their kind, and how many are left."""

    def handle(self, request: Request) -> msgspec.Struct:
        file = Path(os.environ[DEATHS])
        kind, left = file.read_text().split()
        if type(request).__name__ == kind and int(left):
            file.write_text(f"{kind} {int(left) - 1}")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().handle(request)


@pytest.fixture
def deadly(dose: Dose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says at which requests the next cells are killed."""
    dose(Poison(token=10**9), "tests.workers.ladder.test_lost_cell:Mortal")
    file = tmp_path / "deaths"
    file.write_text("None 0")
    monkeypatch.setenv(DEATHS, str(file))
    return file


@pytest.mark.parametrize("kind", ["Tokenize", "Generate"])
def test_cells_that_are_killed_one_after_the_other_cost_no_prompt(
    kind: str, tiny: Path, make: Open, deadly: Path
) -> None:
    decoder = make(tiny, 1)
    (undisturbed,) = decoder.generate(["abc"], max_tokens=4)
    deadly.write_text(f"{kind} 6")
    (completion,) = decoder.generate(["abc"], max_tokens=4)
    assert deadly.read_text() == f"{kind} 0"
    assert completion.error is None
    assert outcome([completion]) == outcome([undisturbed])
    assert len(completion.reports) == (6 if kind == "Generate" else 0)


@pytest.mark.parametrize("kind", ["Tokenize", "Generate"])
def test_whoever_is_killed_again_and_again_gets_an_error(
    kind: str, tiny: Path, make: Open, deadly: Path
) -> None:
    decoder = make(tiny, 1)
    deadly.write_text(f"{kind} 1000")
    (completion,) = decoder.generate(["abc"], max_tokens=4)
    assert isinstance(completion.error, SequenceError)
    left = int(deadly.read_text().split()[1])
    assert 1000 - left == 1 + KILLS_MAX * (2 if kind == "Generate" else 1)
