"""`Llama` answers as ``llama_cpp.Llama`` does, and keeps the caller's own code in the caller."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from crumplezone import (
    Llama,
    LlamaGrammar,
    LlamaPromptLookupDecoding,
    LlamaRAMCache,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from crumplezone.errors import InputError, ModelError, UsageError
from tests.support.decoders import collect
from tests.support.reference.llama_original import CALLS, FOX, OPTIONS, SEA, answer

Get = Callable[[dict[str, Any]], Llama]
BAD_GRAMMARS = ["root ::= (", 'root ::= root "a" | "b"', 'other ::= "a"']  # each a SIGSEGV in the original


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """As in conftest.py, but after all of the module: its tests share a few cells."""
    yield
    collect()
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture(scope="module")
def original(smollm: Path) -> dict[str, Any]:
    """What the original answers."""
    command = [sys.executable, "-m", "tests.support.reference.llama_original", str(smollm)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=110)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def get(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """A `Llama` for each set of options."""
    reports = tmp_path_factory.mktemp("reports")
    made: dict[str, Llama] = {}

    def one(options: dict[str, Any]) -> Llama:
        key = repr(options)
        if key not in made:
            made[key] = Llama(str(smollm), **OPTIONS, reports=reports, **options)
        return made[key]

    yield one
    for llama in made.values():
        llama.close()
    assert list(reports.glob("*/report.json")) == []  # nothing here crashes


@pytest.fixture
def llama(get: Get) -> Llama:
    one = get({})
    one.reset()
    return one


def text_of(completion: Any) -> str:
    text: str = completion["choices"][0]["text"]
    return text


@pytest.mark.parametrize("name", CALLS)
def test_answers_as_the_original(name: str, get: Get, original: dict[str, Any]) -> None:
    options, method, arguments = CALLS[name]
    assert answer(get(options), method, arguments) == original[name]


def test_a_grammar_is_text_or_an_object(llama: Llama, tmp_path: Path) -> None:
    text = 'root ::= ("yes" | "no")'
    path = tmp_path / "grammar.gbnf"
    path.write_text(text)
    grammars: list[Any] = [text, LlamaGrammar.from_string(text), LlamaGrammar.from_file(path)]
    assert {text_of(llama(**FOX, grammar=grammar)) for grammar in grammars} <= {"yes", "no"}
    schema = LlamaGrammar.from_json_schema('{"type": "boolean"}')
    assert text_of(llama(**FOX, grammar=schema)).strip() in {"true", "false"}


@pytest.mark.parametrize("grammar", BAD_GRAMMARS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_an_error_and_the_next_call_works(llama: Llama, grammar: str, stream: bool) -> None:
    pid = llama.pid
    with pytest.raises(InputError, match="grammar") as raised:
        list(llama(**FOX, grammar=grammar, stream=stream))
    assert raised.value.field == "grammar"
    assert raised.value.value == grammar
    assert text_of(llama(**FOX))
    assert llama.pid == pid


def test_a_bad_schema_is_an_error(llama: Llama) -> None:
    with pytest.raises(InputError, match="Unrecognized schema"):
        llama(**FOX, grammar=LlamaGrammar.from_json_schema('{"type": "nonsense"}'))
    with pytest.raises(InputError, match="must be JSON"):
        LlamaGrammar.from_json_schema("{")
    with pytest.raises(InputError, match="GBNF text or a LlamaGrammar"):
        llama(**FOX, grammar=7)


def test_logits_processors_run_here(llama: Llama) -> None:
    the = llama.tokenize(b" the", add_bos=False)[0]
    seen: list[tuple[list[int], str]] = []

    def only_the(ids: Any, scores: Any) -> Any:
        assert ids.dtype == np.intc
        assert scores.dtype == np.single
        assert scores.shape == (llama.n_vocab(),)
        seen.append((ids.tolist(), threading.current_thread().name))
        assert llama.detokenize(ids.tolist()[-1:])  # a callback may ask the model
        scores[:] = -np.inf
        scores[the] = 1.0
        return scores

    done = llama(**FOX | {"max_tokens": 3}, logits_processor=LogitsProcessorList([only_the]))
    prompt = llama.tokenize(b"The quick brown fox")
    assert text_of(done) == " the the the"
    assert seen == [([*prompt, *[the] * i], threading.current_thread().name) for i in range(3)]


def test_stopping_criteria_run_here(llama: Llama) -> None:
    long_enough = StoppingCriteriaList([lambda ids, _: len(ids) >= 8])
    done = llama(**FOX, stopping_criteria=long_enough)
    assert isinstance(done, dict)
    assert done["usage"]["total_tokens"] == 8
    assert done["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_exception_of_a_callback_reaches_the_caller(llama: Llama, kind: str, stream: bool) -> None:
    class MineError(Exception):
        pass

    error, pid = MineError("mine"), llama.pid

    def fail(ids: Any, scores: Any) -> Any:
        if len(ids) > 5:
            raise error
        return scores if kind == "logits_processor" else False

    given: Any = {kind: [fail] if kind == "logits_processor" else fail}
    with pytest.raises(MineError) as raised:
        list(llama(**FOX, stream=stream, **given))
    assert raised.value is error
    assert text_of(llama(**FOX))
    assert llama.pid == pid


def test_a_callback_may_not_start_another_call(llama: Llama) -> None:
    with pytest.raises(UsageError, match="may only tokenize"):
        llama(**FOX, stopping_criteria=lambda ids, _: bool(llama(ids.tolist())))


def test_evaluated_tokens(llama: Llama) -> None:
    tokens = llama.tokenize(b"The capital of France is")
    llama.eval(tokens)
    assert llama.n_tokens == len(tokens)
    assert list(llama.eval_tokens) == tokens
    assert llama.input_ids[: len(tokens)].tolist() == tokens
    first = llama.sample(temp=0.0)
    state = llama.save_state()
    llama.eval([first])
    second = llama.sample(temp=0.0)
    llama.load_state(pickle.loads(pickle.dumps(state)))
    assert llama.n_tokens == len(tokens)
    llama.eval([first])
    assert llama.sample(temp=0.0) == second
    llama.n_tokens = 2
    llama.eval(tokens[2:])
    assert llama.sample(temp=0.0) == first
    llama.reset()
    assert llama.n_tokens == 0


def test_scores(get: Get) -> None:
    llama = get({"logits_all": True})
    llama.reset()
    tokens = llama.tokenize(b"The capital of France is")
    llama.eval(tokens)
    scores = llama.scores
    assert scores.shape == (512, llama.n_vocab())
    assert scores[len(tokens) - 1].argmax() == llama.sample(temp=0.0)
    assert not scores[len(tokens) :].any()
    assert len(llama.eval_logits) == len(tokens)
    logprobs = llama.logits_to_logprobs(scores[: len(tokens)])
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=-1), 1.0, rtol=1e-4)


def test_tokens_sent_into_a_generator_are_a_draft(get: Get) -> None:
    llama = get({"logits_all": True})  # without it the original aborts on them
    prompt = llama.tokenize(b"One two three")
    llama.reset()
    alone = list(islice(llama.generate(prompt, temp=0.0), 6))
    llama.reset()
    generator = llama.generate(prompt, temp=0.0)
    assert next(generator) == alone[0]
    assert (
        generator.send([alone[1], 7]) == alone[1]
    )  # one token that it would draw, and one that it would not
    assert list(islice(generator, 4)) == alone[2:]
    assert list(llama.eval_tokens) == prompt + alone[:5]
    generator.close()


def test_a_suspended_stream_goes_on_after_other_calls(llama: Llama) -> None:
    whole = [text_of(chunk) for chunk in llama(**FOX, stream=True)]
    stream: Any = llama(**FOX, stream=True)
    texts = [text_of(next(stream)) for _ in range(5)]
    other = text_of(llama("Once upon a time", max_tokens=5, temperature=0.0))
    texts += [text_of(chunk) for chunk in stream]
    assert texts == whole
    assert other == text_of(llama("Once upon a time", max_tokens=5, temperature=0.0))


def test_threads_take_turns(llama: Llama) -> None:
    prompts = ["The quick brown fox", "Once upon a time", "The capital of France is"]
    alone = {prompt: text_of(llama(prompt, max_tokens=8, temperature=0.0)) for prompt in prompts}
    together: dict[str, str] = {}

    def run(prompt: str) -> None:
        stream = llama(prompt, max_tokens=8, temperature=0.0, stream=True)
        together[prompt] = "".join(text_of(chunk) for chunk in stream)

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_a_stream_that_is_dropped_gives_way(llama: Llama) -> None:
    stream = iter(llama(**FOX, stream=True))
    next(stream)
    del stream
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(text_of(llama(**FOX))))
    thread.start()
    thread.join(60)
    assert done == [text_of(llama(**FOX))]


def test_errors_are_the_originals(llama: Llama) -> None:
    with pytest.raises(ValueError, match="exceed context window"):
        llama("word " * 600)
    with pytest.raises(ValueError, match="logits_all"):
        llama(**FOX, logprobs=1)
    with pytest.raises(InputError, match="cannot cross"):
        llama.create_chat_completion([{"role": "user", "content": object()}])
    with pytest.raises(InputError, match="must be one of"):
        llama.chat_format = "no such format"
    with pytest.raises(AttributeError, match=r"use n_ctx\(\)"):
        _ = llama.ctx  # type: ignore[attr-defined]


def test_a_message_larger_than_a_frame(llama: Llama) -> None:
    tokens = llama.tokenize(b"word " * 100_000)
    assert len(tokens) > 100_000
    assert llama.detokenize(tokens).startswith(b"word word")


def test_cache_and_draft_model_change_no_text(get: Get, llama: Llama) -> None:
    plain = answer(llama, "create_completion", FOX)
    drafted = get({"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=3)})
    assert answer(drafted, "create_completion", FOX) == plain
    llama.set_cache(LlamaRAMCache(2**26))
    assert [answer(llama, "create_completion", FOX) for _ in range(2)] == [plain, plain]
    llama.set_cache(None)
    with pytest.raises(UsageError, match="LlamaRAMCache"):
        llama.set_cache({})


def test_survives_pickling(llama: Llama) -> None:
    copy = pickle.loads(pickle.dumps(llama))
    try:
        assert copy.pid != llama.pid
        assert copy.metadata == llama.metadata
        assert answer(copy, "create_chat_completion", SEA) == answer(llama, "create_chat_completion", SEA)
    finally:
        copy.close()
    copy.close()
    with pytest.raises(UsageError, match="closed"):
        copy("x")


@pytest.mark.parametrize("name", ["chat_handler", "tokenizer", "draft_model"])
def test_code_is_not_sent_to_the_cell(name: str, smollm: Path) -> None:
    given: Any = {name: lambda: None}
    with pytest.raises(UsageError, match=r"pass|model's own"):
        Llama(str(smollm), **given)


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        Llama(str(tmp_path / "missing.gguf"))
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="cannot load"):  # the original raises one too
        Llama(str(fake), reports=tmp_path)


def test_a_lora_that_cannot_be_loaded(smollm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="LoRA"):  # the original goes on, and its first decode is a SIGSEGV
        Llama(str(smollm), **OPTIONS, reports=tmp_path, lora_path=str(tmp_path / "missing.gguf"))


def test_a_model_of_the_hub(
    smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Llama
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface-hub"):
        Llama.from_pretrained("some/model", "*.gguf")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    package = tmp_path / "huggingface_hub"  # stands for the one that downloads
    package.mkdir()
    (package / "utils.py").write_text("def validate_repo_id(name): assert name == 'some/model'")
    (package / "__init__.py").write_text(
        "class HfFileSystem:\n"
        "    def ls(self, repo, recursive):\n"
        "        return [{'name': f'{repo}/q/a.gguf'}, {'name': f'{repo}/b.gguf'}, f'{repo}/README.md']\n"
        "def hf_hub_download(repo_id, filename, subfolder, cache_dir, **_):\n"
        "    assert (repo_id, filename, subfolder) == ('some/model', 'a.gguf', 'q')\n"
        "    return cache_dir\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="must fit one file"):
        Llama.from_pretrained("some/model", "*.gguf", cache_dir=smollm)
    there = Llama.from_pretrained("some/model", "q/*.gguf", cache_dir=smollm, reports=tmp_path, **OPTIONS)
    try:
        assert there.metadata == llama.metadata
    finally:
        there.close()
