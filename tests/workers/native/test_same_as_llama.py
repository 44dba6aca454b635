"""Option by option: what the engine draws is what ``llama_cpp.Llama`` does, whatever happens to its cells."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crumplezone.errors import CellDied
from crumplezone.sandbox.cells.cell import CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.targets import SEEDS
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.generate.messages import Join, Progress
from crumplezone.workers.protocol.generate.sampling import Sampling
from crumplezone.workers.protocol.generate.stops import first_stop
from tests.support.reference import completions
from tests.support.reference.completions import CASES, PROMPT, WARM

ROOT = Path(__file__).parents[3]
# What `Llama` has under no name.
OURS: dict[str, dict[str, Any]] = {
    "dynamic temperature": WARM | {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
    "top_n_sigma": WARM | {"top_n_sigma": 1.0},
    "xtc": WARM | {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "dry": WARM | {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    "min_tokens": WARM | {"min_tokens": 22},
    "ignore_eos": WARM | {"ignore_eos": True},
    "order": WARM
    | {"samplers": ("temperature", "top_p", "penalties"), "top_p": 0.8, "frequency_penalty": 0.5},
    "lazy grammar": WARM
    | {"grammar": 'root ::= "a" [0-9]+', "grammar_lazy": True, "grammar_triggers": ("[^a]*(a)",)},
    "mirostat and grammar": WARM | {"mirostat_mode": 2, "grammar": "root ::= [a-z ]+"},
}
EVERY = CASES | OURS
WITH_REAL_WEIGHTS = (
    "temperature",
    "its own defaults",
    "mirostat 2",
    "warm grammar",
    "logprobs",
    "xtc",
    "order",
)


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def originals(model: Path) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", completions.__name__, str(model)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


@pytest.fixture
def client(model: Path) -> Iterator[DecodeClient]:
    """With a zygote: a new cell is there at once."""
    config = configure(model, n_ctx=256, n_batch=256, n_seq_max=1, n_threads=1, flash_attn="on")
    zygote = Zygote(CellSpec(SEEDS["context"], config), lambda _: None)
    made = DecodeClient(config, Limits(60, None), None, zygote=zygote)
    yield made
    made.close()
    zygote.close()


def asked(case: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    names = {field.name for field in dataclasses.fields(Sampling)}
    stops = [stop.encode() for stop in case.get("stop", ())]
    sampling = Sampling(**{name: value for name, value in case.items() if name in names})
    return sampling, {"stops": stops, "logprobs": case.get("logprobs", -1)}


def complete(client: DecodeClient, case: dict[str, Any], kills: int = 0) -> Progress:
    """All that came of the prompt. Its cell is killed so many times, each time two tokens later."""
    client.start()
    prompt = client.tokenize(PROMPT)
    sampling, options = asked(case)
    made, told, fresh = Progress(0, [], b""), [], True
    while not made.finished:
        if fresh:
            tokens = np.concatenate([prompt, np.array(made.tokens, np.int32)])
            joins = [(Join(0, len(tokens), len(prompt), sampling, **options), tokens)]
        try:
            (one,) = client.generate(joins if fresh else [], 2, 256, reset=fresh).progress
        except CellDied:
            client.start()
            fresh = True
            continue
        told.append(one)
        fresh = False
        made = Progress(
            0,
            made.tokens + one.tokens,
            made.text + one.text,
            one.finished,
            logprobs=made.logprobs + one.logprobs,
        )
        if kills and not made.finished:
            kills -= 1
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
    assert not kills, "it was over before"
    return made


def test_the_same_as_the_original(client: DecodeClient, originals: dict[str, Any]) -> None:
    for name, (text, reason, logprobs) in originals.items():
        made = complete(client, CASES[name])
        stop = first_stop(made.text, asked(CASES[name])[1]["stops"])
        shown = made.text[:stop] if stop >= 0 else made.text
        assert (name, shown.decode("utf-8", "ignore")) == (name, text)
        assert (name, {"word": "stop"}.get(made.finished, made.finished)) == (name, reason)
        if logprobs:
            assert [one.logprob for one in made.logprobs] == pytest.approx(logprobs, abs=1e-3)
    assert originals.keys() == CASES.keys()


def test_the_same_after_three_kills(client: DecodeClient, model: Path) -> None:
    """To the bit, where attention is `flash_attn`: the tokens of before are read in one batch."""
    for name in EVERY if model.stem == "tiny" else WITH_REAL_WEIGHTS:
        case = EVERY[name]
        undisturbed = complete(client, case)
        kills = min(3, (len(undisturbed.tokens) - 1) // 2)
        assert kills or name == "stop", name
        killed = complete(client, case, kills)
        assert (name, killed.text, killed.tokens) == (name, undisturbed.text, undisturbed.tokens)
        assert killed.finished == undisturbed.finished
        assert [one.logprob for one in killed.logprobs] == pytest.approx(
            [one.logprob for one in undisturbed.logprobs], abs=0.02
        )
