"""The public table of ``llama_cpp.Llama``, taken from the real class: `Llama` has it all, or a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crumplezone import Llama
from tests.support.reference.llama_original import OPTIONS, signatures

POINTER = "it is native memory of the cell; the AttributeError says what to use instead"
ABSENT = {
    "ctx": POINTER,
    "model": POINTER,
    "model_params": POINTER,
    "context_params": POINTER,
    "tokenizer_": "the tokenizer is in the cell; tokenizer() gives one that asks it",
}
OURS = {
    "reports",
    "deadline",
    "memory_limit",
    "redact",
    "start",
    "spares",
}  # keyword-only
EXTRA = {"pid", "processes", "flush_reports"}  # public here and not there


@pytest.fixture(scope="module")
def original(tiny: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.reference.llama_original", "--table", str(tiny)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=110)
    table: dict[str, Any] = json.loads(done.stdout)
    return table


@pytest.fixture
def llama(tiny: Path, tmp_path: Path) -> Iterator[Llama]:
    one = Llama(str(tiny), **OPTIONS, reports=tmp_path)
    yield one
    one.close()


def test_every_method_has_the_originals_signature(original: dict[str, Any]) -> None:
    ours = signatures(Llama)
    ours["__init__"] = [parameter for parameter in ours["__init__"] if parameter[0] not in OURS]
    theirs = {name: each for name, each in original["signatures"].items() if name not in ABSENT}
    assert {name: ours.get(name) for name in theirs} == theirs


def test_every_attribute_is_there_or_has_a_reason(original: dict[str, Any], llama: Llama) -> None:
    names = {*original["signatures"], *original["attributes"]}
    missing = {name for name in names if not hasattr(llama, name)}
    assert missing == set(ABSENT)
    here = {name for name in dir(llama) if not name.startswith("_")}
    assert here - names == EXTRA
    for name in ABSENT:
        with pytest.raises(AttributeError, match="; use "):
            getattr(llama, name)


def test_attributes_have_the_originals_types(original: dict[str, Any], llama: Llama) -> None:
    theirs = {name: kind for name, kind in original["attributes"].items() if name not in ABSENT}
    assert {name: type(getattr(llama, name)).__name__ for name in theirs} == theirs


def test_the_pickled_state_has_the_originals_keys(original: dict[str, Any], llama: Llama) -> None:
    state = llama.__getstate__()
    assert set(state) - OURS == set(original["state"])
    given = {name for name, value in state.items() if value is not None} - OURS
    assert {name: repr(state[name]) for name in given} == {name: original["state"][name] for name in given}
