"""A machine that has no process, thread or descriptor left: told by an error of ours, with its remedy."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from crumplezone import Batch, Decoder, Llama, SafeBatchProcessor
from crumplezone.errors import CrumplezoneError, ModelError
from crumplezone.workers.model.file import check_file
from tests.support.decoders import Open, descriptors, kill

Lack = Callable[[], AbstractContextManager[object]]


@contextmanager
def no_descriptor() -> Iterator[None]:
    """As many are open as may be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()) + 4, before[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def no_thread() -> Iterator[None]:
    """No stack of this size can be had."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextmanager
def no_null() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "devnull", "/proc/self/null")
        yield


@contextmanager
def large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRUMPLEZONE_TEST_LARGE", "x" * 200_000)
        yield


@pytest.mark.parametrize("start", ["auto", "spawn"])
@pytest.mark.parametrize(
    ("lack", "told"),
    [
        (no_descriptor, r"Too many open files.*ulimit -n"),
        (no_thread, r"no cell could be started \(can't start new thread\): end threads.*ulimit -u"),
        (no_null, r"no cell could be started \(.*null.*mknod"),
        (large, r"no cell could be started \(.*CRUMPLEZONE_TEST_LARGE takes 200024 bytes.*131072"),
    ],
)
def test_what_a_start_lacks_is_told(lack: Lack, told: str, start: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CrumplezoneError, match=told) as caught, lack():
        Decoder(tiny, n_threads=1, start=start, reports=tmp_path)  # type: ignore[arg-type]
    assert not isinstance(caught.value, ModelError)  # nothing is wrong with that


def test_a_file_that_cannot_be_opened_for_want_of_a_descriptor_is_not_blamed(tiny: Path) -> None:
    with pytest.raises(CrumplezoneError, match="ulimit -n") as caught, no_descriptor():
        check_file(tiny)
    assert not isinstance(caught.value, ModelError)


def test_a_model_below_a_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for make in (Decoder, Llama, SafeBatchProcessor):
        with pytest.raises(ModelError, match=r"the working directory is gone.*give an absolute one"):
            make("model.gguf", reports=tmp_path)


@pytest.mark.parametrize("start", ["auto", "spawn"])
def test_a_host_that_has_changed_gets_its_results(
    start: str, tiny: Path, make: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    decoder = make(tiny, start=start, spares=0)
    gone.rmdir()
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr("sys.executable", "/bin/cat")
    monkeypatch.setenv("CRUMPLEZONE_TEST_LARGE", "x" * 200_000)
    kill(decoder)
    assert decoder.decode(Batch.of([[5, 6]])).errors == {}
    assert [each.error for each in decoder.generate(["ab"], max_tokens=2)] == [None]
