"""Models, and the rule that no test leaves a process behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import crumplezone
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The embedded SmolLM2: real weights."""
    return crumplezone.embedded_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights: 128 tokens of vocabulary, trained on 256 of context."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_vocab=128, n_ctx=256)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Set up first and torn down last: what a test's other fixtures close is gone by then."""
    yield
    children = psutil.Process().children(recursive=True)
    if children:
        gc.collect()  # a cell that nobody closed ends with its last reference
        psutil.wait_procs(children, timeout=5)
    assert psutil.Process().children(recursive=True) == []
