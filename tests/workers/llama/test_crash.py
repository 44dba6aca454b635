"""A `Llama` whose cell is killed, crashes or hangs goes on as if nothing had happened."""

from __future__ import annotations

import datetime as dt
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from crumplezone import Llama
from crumplezone.errors import CellDied, InputError, SequenceError, UsageError
from crumplezone.reports.records.report import Evidence, Exit, Report, VerdictKind
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.incidents.deaths import KILLS_MAX
from crumplezone.workers.llama.calls.task import Task
from crumplezone.workers.protocol.llama import NOTE_MAX, Evaluated, Note
from tests.support.decoders import OpenLlama as Open
from tests.support.decoders import fork, read_all
from tests.support.native.llama_poison import Poison
from tests.support.reference.llama_original import FOX, OPTIONS, SEA


def kill(llama: Llama) -> None:
    assert llama.pid is not None
    os.kill(llama.pid, signal.SIGKILL)


def died(how: Exit) -> CellDied:
    """As a call sees it."""
    evidence: Future[Evidence] = Future()
    evidence.set_result(Evidence(how, 1, "call", None))
    return CellDied("cell 1: died", Incident("call", dt.datetime.now(dt.UTC), evidence, []))


def reports_of(llama: Llama, store: Store) -> list[Report]:
    llama.flush_reports()
    return read_all(store)


def bare(chunk: Any) -> Any:
    return {key: value for key, value in chunk.items() if key not in {"crumplezone", "id", "created"}}


def test_a_stream_goes_on_after_three_kills(open_llama: Open, store: Store) -> None:
    llama = open_llama()
    undisturbed = list(llama.create_chat_completion(**SEA, stream=True))
    llama.reset()
    chunks: list[Any] = []
    for chunk in llama.create_chat_completion(**SEA, stream=True):
        chunks.append(chunk)
        if len(chunks) in {1, 8, 9}:
            kill(llama)
    assert [bare(chunk) for chunk in chunks] == [bare(chunk) for chunk in undisturbed]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    told = {i: chunk["crumplezone"] for i, chunk in enumerate(chunks) if "crumplezone" in chunk}
    assert {i: each["recovered"] for i, each in told.items()} == {1: 1, 8: 2, 9: 3}
    written = reports_of(llama, store)
    assert [str(store.path(report.id)) for report in written] == told[9]["reports"]
    assert {report.evidence.exit for report in written} == {Exit.KILLED}
    assert all("went on in a new cell" in report.result for report in written)


@pytest.mark.parametrize("settings", [{"seed": 7, "top_k": 1000}, {"seed": 7, "mirostat_mode": 2}])
def test_sampling_goes_on_with_the_same_noise(open_llama: Open, settings: dict[str, Any]) -> None:
    llama = open_llama()
    arguments = FOX | {"temperature": 1.0, "repeat_penalty": 1.2} | settings
    undisturbed = llama(**arguments)
    llama.reset()
    text = ""
    for i, chunk in enumerate(llama(**arguments, stream=True)):
        text += chunk["choices"][0]["text"]  # type: ignore[index]
        if i == 9:
            kill(llama)
    assert text == undisturbed["choices"][0]["text"]  # type: ignore[index]


def test_a_whole_completion_survives_and_calls_no_callback_twice(open_llama: Open) -> None:
    llama = open_llama()
    undisturbed: Any = llama(**FOX)
    llama.reset()
    lengths: list[int] = []

    def watch(ids: Any, scores: Any) -> Any:
        lengths.append(len(ids))
        if len(lengths) == 6:
            kill(llama)
        return scores

    done: Any = llama(**FOX, logits_processor=[watch])
    assert bare(done) == bare(undisturbed)
    assert done["crumplezone"]["recovered"] == 1
    assert lengths == [*range(4, 10), *range(9, 28)]  # the token that it was to judge was not yet drawn


def test_evaluated_tokens_are_evaluated_again(open_llama: Open, store: Store) -> None:
    llama = open_llama(logits_all=True)
    tokens = llama.tokenize(b"The capital of France is")
    llama.eval(tokens[:3])
    kill(llama)
    llama.eval(tokens[3:])
    assert list(llama.eval_tokens) == tokens
    expected = llama.sample(temp=0.0)
    kill(llama)
    assert llama.sample(temp=0.0) == expected
    kill(llama)
    assert llama.scores[len(tokens) - 1].argmax() == expected
    kill(llama)
    state = llama.save_state()
    kill(llama)
    llama.load_state(state)
    kill(llama)
    assert next(llama.generate([expected], temp=0.0, reset=False)) >= 0
    assert list(llama.eval_tokens) == [*tokens, expected]
    assert llama.detokenize(tokens) == b"The capital of France is"
    assert len(reports_of(llama, store)) == 6


def write_lora(path: Path) -> Path:
    """An adapter for the tiny llama: rank 2, on the query weights of its first layer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    weights = np.random.default_rng(1).standard_normal((2, 32), dtype=np.float32)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", weights)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ascontiguousarray(weights.T))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_new_cell_has_the_lora(open_llama: Open, tiny: Path, tmp_path: Path) -> None:
    adapted = {"lora_path": str(write_lora(tmp_path / "lora.gguf")), "logits_all": True}
    plain, llama = open_llama(tiny, logits_all=True), open_llama(tiny, **adapted)
    for one in (plain, llama):
        one.eval([1, 5, 6, 7])
    before = llama.scores
    assert not np.array_equal(before, plain.scores)
    kill(llama)
    np.testing.assert_array_equal(llama.scores, before)


def test_a_segfault_is_repeated_once_and_reported(
    open_llama: Open, dose: Callable[[Poison], None], store: Store, tmp_path: Path
) -> None:
    undisturbed: Any = open_llama()(**FOX)
    dose(Poison(at=12, once=str(tmp_path / "died")))
    llama = open_llama()
    done: Any = llama(**FOX)
    assert bare(done) == bare(undisturbed)
    (report,) = reports_of(llama, store)
    assert report.evidence.exit == Exit.SIGNAL
    assert report.batch is not None
    assert report.batch.tokens[:4] == llama.tokenize(b"The quick brown fox")
    assert report.evidence.flight[-1].name == "decode"
    assert done["crumplezone"] == {"recovered": 1, "reports": [str(store.path(report.id))]}


def test_a_batch_that_always_crashes_is_cured_token_by_token(
    open_llama: Open, dose: Callable[[Poison], None], store: Store
) -> None:
    dose(Poison(min_tokens=2))
    llama = open_llama()
    done: Any = llama(**FOX)
    assert len(done["choices"][0]["text"]) > 20
    assert done["crumplezone"]["recovered"] == 2
    written = reports_of(llama, store)
    assert [report.verdict and report.verdict.kind for report in written] == [VerdictKind.BATCH_ONLY] * 2
    assert written[0].context["n_batch"] == 512


def test_a_call_that_always_crashes_fails_with_its_report(
    open_llama: Open, dose: Callable[[Poison], None], store: Store
) -> None:
    dose(Poison(at=6))
    llama = open_llama()
    stream: Any = llama(**FOX, stream=True)
    texts = [next(stream)["choices"][0]["text"]]
    with pytest.raises(SequenceError, match="lost 3 cells") as raised:
        texts.extend(chunk["choices"][0]["text"] for chunk in stream)
    assert len(texts) >= 2
    written = reports_of(llama, store)
    assert raised.value.report in [str(store.path(report.id)) for report in written]
    assert {report.verdict and report.verdict.kind for report in written} == {VerdictKind.INPUT}
    assert {report.rung for report in written} == {"native", "token"}
    short: Any = llama("The", max_tokens=2, temperature=0.0)
    assert short["usage"]["completion_tokens"] == 2


def test_a_hang_ends_at_the_deadline_but_a_slow_callback_is_none(
    open_llama: Open, dose: Callable[[Poison], None], store: Store, tmp_path: Path
) -> None:
    died = tmp_path / "died"
    dose(Poison(at=8, once=str(died), how="hang"))
    llama = open_llama(deadline=2.0)

    def slow(ids: Any, _: Any) -> bool:
        return len(ids) == 5 and threading.Event().wait(2.5)  # longer than the deadline; then False

    done: Any = llama(**FOX, stopping_criteria=slow)
    assert done["usage"]["completion_tokens"] == 24
    (report,) = reports_of(llama, store)
    assert report.evidence.exit == Exit.HANG
    assert died.exists()


@pytest.fixture
def small_stack() -> Iterator[None]:
    """Of children: an overflow of the usual 8 MiB takes long to unwind."""
    limits = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, limits)


@pytest.mark.usefixtures("small_stack")
def test_a_grammar_that_crashes_the_parser_is_an_error(open_llama: Open, store: Store) -> None:
    llama = open_llama()
    deep = "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
    with pytest.raises(InputError, match=r"crashes llama\.cpp's grammar") as raised:
        llama(**FOX, grammar=deep)
    assert raised.value.field == "grammar"
    (report,) = reports_of(llama, store)
    assert report.evidence.flight[-1].name == "grammar"
    assert llama(**FOX)


def test_a_cell_that_dies_during_a_callbacks_question(open_llama: Open) -> None:
    llama = open_llama()
    undisturbed: Any = llama(**FOX)
    killed: list[int] = []

    def ask(ids: Any, scores: Any) -> Any:
        if len(ids) == 6 and not killed:
            killed.append(len(ids))
            kill(llama)
            llama.detokenize(ids.tolist())
        return scores

    done: Any = llama(**FOX, logits_processor=[ask])
    assert done["choices"] == undisturbed["choices"]
    assert done["crumplezone"]["recovered"] == 1


def test_a_fork_does_not_share_the_cell(open_llama: Open, tiny: Path) -> None:
    llama = open_llama(tiny)
    child = fork()
    if child == 0:
        try:
            llama.tokenize(b"x")
        except UsageError:
            llama.close()  # which leaves the parent's cell alone
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert llama.tokenize(b"x")


def test_a_dropped_llama_leaves_no_process(smollm: Path, tmp_path: Path) -> None:
    llama = Llama(str(smollm), **OPTIONS, reports=tmp_path)
    stream = iter(llama(**FOX, stream=True))
    next(stream)
    assert llama.pid is not None
    cell = psutil.Process(llama.pid)
    del llama, stream
    gc.collect()
    assert psutil.wait_procs([cell], timeout=5)[1] == []


@pytest.mark.parametrize(
    ("note", "problem"),
    [
        (Note(evaluated=[Evaluated(1, [5])]), "position 1, and holds 0"),
        (Note(drawn=[(0, 128)]), "drew token 128"),
        (Note(drawn=[(4096, 1)]), "generation 4096"),
        (Note(evaluated=[Evaluated(i * NOTE_MAX, [5] * NOTE_MAX) for i in range(3)]), "position 16384"),
        (Note(drawn=[(0, 1)] * (2 * 256 + NOTE_MAX + 1)), "in a context of 256"),
    ],
)
def test_a_cell_that_tells_nonsense_is_not_believed(note: Note, problem: str) -> None:
    assert problem in Task("eval", {}).take(note, 128, 256)


def test_progress_buys_another_attempt() -> None:
    task, crash = Task("generate", {}), died(Exit.SIGNAL)
    assert task.lost(crash)
    for i in range(3):
        task.take(Note(drawn=[(0, i)]), 128, 256)
        assert task.lost(crash)
        assert not task.cautious
    assert task.lost(crash)
    assert task.cautious
    assert not task.lost(crash)


def test_a_kill_is_no_crash_of_a_call() -> None:
    task = Task("generate", {})
    assert all(task.lost(died(Exit.KILLED)) for _ in range(KILLS_MAX))
    assert not task.cautious
    assert not task.lost(died(Exit.KILLED))
    task = Task("generate", {})
    assert task.lost(died(Exit.SIGNAL))
    assert task.lost(died(Exit.KILLED))
    assert not task.cautious
    assert task.lost(died(Exit.SIGNAL))
    assert task.cautious
    for i in range(100):  # of a long stream among many kills
        task.take(Note(drawn=[(0, i)]), 128, 256)
        assert task.lost(died(Exit.KILLED))
