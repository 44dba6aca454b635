"""The width that is chosen: by measuring, from before, or the safe one."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crumplezone.errors import ModelError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.cells.cell import CellSpec
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.sandbox.host.errands import DELIVERY
from crumplezone.workers.cells.targets import SEEDS
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.width import Weighed
from crumplezone.workers.width import cache as width_cache
from crumplezone.workers.width import choose as width
from crumplezone.workers.width.cache import Found, Rate
from crumplezone.workers.width.choose import choose
from crumplezone.workers.width.race import Width, pick, race
from tests.support.decoders import Plant, read_all
from tests.support.models.tiny_bert import write_tiny_bert
from tests.support.models.tiny_gguf import write_tiny_llama, write_tiny_mamba
from tests.support.native import width_stunts

WIDTHS = (1, 2, 4, 8, 16)
MEASURED = Found(
    [Rate(1, 2, 100.0), Rate(2, 2, 90.0), Rate(4, 2, 190.0), Rate(8, 2, 240.0), Rate(16, 2, 245.0)],
    Weighed(first=1000, more=1000, nanoseconds=10**7),
)
Choose = Callable[..., Width]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache file, not there yet, of a process that has measured nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # see the conftest's `make`
    monkeypatch.setattr(width, "_known", {})
    return tmp_path / "cache" / "crumplezone" / "width.json"


@pytest.fixture
def reporter(store: Store) -> Iterator[Reporter]:
    with closing(Reporter(store.directory)) as made:
        yield made


@pytest.fixture
def chosen(cache: Path, reporter: Reporter) -> Choose:
    """`choose`, for one thread if nothing else is said."""
    assert not cache.exists()

    def choose_for(model: Path, memory: int | None = None, **options: Any) -> Width:
        return choose(config_of(model), Limits(None, memory), reporter, **{"most_threads": 1} | options)

    return choose_for


@pytest.fixture
def no_cell(plant: Plant) -> Callable[[], None]:
    """From now on a cell that is started is an error."""
    return lambda: plant("width", "tests.nowhere:Nothing")


def config_of(model: Path) -> CellConfig:
    return configure(model, n_ctx=4096, n_batch=512, n_seq_max=4, n_threads=1)


def rates_in(cache: Path) -> set[tuple[int, int]]:
    (entry,) = msgspec.json.decode(cache.read_bytes())
    return {(n_seq, n_threads) for n_seq, n_threads, _ in entry["found"]["rates"]}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be another process."""
    monkeypatch.setattr(width, "_known", {})


def remember(model: Path, found: Found, threads: tuple[int, ...] = (2, 1)) -> None:
    """Let the cache have this measurement."""
    asked = width_cache.key(width._shape(config_of(model), threads[-1]), WIDTHS, threads)
    width_cache.keep(asked, found)


def test_what_is_given_is_kept(tiny: Path, chosen: Choose, no_cell: Callable[[], None]) -> None:
    no_cell()
    assert chosen(tiny, n_seq=3, n_threads=5, most_threads=64) == Width(3, 5)
    assert chosen(tiny, n_seq=3, most_threads=1) == Width(3, 1)  # there is nothing to choose


def test_every_width_is_measured(
    tiny: Path, chosen: Choose, cache: Path, no_cell: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "_DISTURBED", math.inf)  # the machine that runs tests is a busy one
    first = chosen(tiny)
    assert rates_in(cache) == {(n_seq, 1) for n_seq in WIDTHS}
    no_cell()
    assert chosen(tiny) == first
    forget(monkeypatch)
    assert chosen(tiny) == first


def test_threads_alone(
    tiny: Path, chosen: Choose, cache: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setattr(width, "_DISTURBED", math.inf)
    found = chosen(tiny, n_seq=50, most_threads=2)
    assert found in (Width(50, 1), Width(50, 2))
    assert rates_in(cache) == {(32, 1), (32, 2)}
    assert read_all(store) == []


def test_where_others_compute_it_is_not_kept(
    tiny: Path, chosen: Choose, cache: Path, no_cell: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "_DISTURBED", 0.0)
    first = chosen(tiny)
    assert not cache.exists()
    no_cell()
    assert chosen(tiny) == first  # by this process


def test_a_recurrent_model_forked_off_a_zygote(chosen: Choose, tmp_path: Path) -> None:
    model = write_tiny_mamba(tmp_path / "mamba.gguf")
    spec = CellSpec(SEEDS["context"], config_of(model))
    with closing(Zygote(spec, lambda _: None)) as zygote:
        chosen(model, zygote=zygote)
    (found,) = width._known.values()
    assert found
    assert found.weighed.more == 0  # a state does not grow


def test_a_model_that_generates_nothing(
    chosen: Choose, tmp_path: Path, caplog: pytest.LogCaptureFixture, store: Store
) -> None:
    with caplog.at_level(logging.WARNING, "crumplezone"):
        assert chosen(write_tiny_bert(tmp_path / "bert.gguf")) == Width(1, 1)
    assert DELIVERY.wait(30)
    assert "the width was not measured: this kind of model does not generate text" in caplog.text
    assert read_all(store) == []


@pytest.mark.usefixtures("cache")
def test_a_model_that_is_not_there(tiny: Path, tmp_path: Path, reporter: Reporter) -> None:
    model = Path(shutil.copy(tiny, tmp_path / "model.gguf"))
    config = config_of(model)
    model.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        choose(config, Limits(None, None), reporter, most_threads=1)


@pytest.mark.parametrize(
    ("stunt", "exit_"),
    [
        ("weigh segv", Exit.SIGNAL),
        ("step hang", Exit.HANG),
        *((f"step {lie}", Exit.PROTOCOL) for lie in width_stunts.LIES),
    ],
)
def test_a_cell_that_dies_or_lies(
    stunt: str,
    exit_: Exit,
    tiny: Path,
    chosen: Choose,
    cache: Path,
    store: Store,
    reporter: Reporter,
    no_cell: Callable[[], None],
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(width_stunts.VARIABLE, stunt)
    plant("width", width_stunts.TARGET)
    if "hang" in stunt:
        monkeypatch.setattr(width, "_DEADLINE", 2.0)
    assert chosen(tiny) == Width(1, 1)
    no_cell()
    assert chosen(tiny) == Width(1, 1)  # it is not tried again
    assert not cache.exists()
    reporter.flush()
    (report,) = read_all(store)
    assert report.evidence.exit is exit_
    assert [step.detail for step in report.ladder] == ["while measuring the width"]
    assert report.model
    assert report.model.path == str(tiny)
    if exit_ is Exit.PROTOCOL:
        assert re.match("the cell (told of|sent a reply that does not decode)", report.evidence.detail)


def test_a_refusal(
    tiny: Path,
    chosen: Choose,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(width_stunts.VARIABLE, "fill refuse")
    plant("width", width_stunts.TARGET)
    assert chosen(tiny, n_seq=7, most_threads=2) == Width(7, 2)
    assert DELIVERY.wait(30)
    assert "the width was not measured: refused on demand" in caplog.text


@pytest.mark.usefixtures("cache")
def test_the_smallest_of_those_that_are_as_good(
    tiny: Path, chosen: Choose, no_cell: Callable[[], None]
) -> None:
    remember(tiny, MEASURED)
    no_cell()
    assert chosen(tiny, most_threads=2) == Width(8, 2)


def test_what_does_not_fit_into_the_memory(
    tiny: Path, chosen: Choose, no_cell: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    available = psutil.virtual_memory().available
    per_token = available // 2 // 1024 // 9  # 9 sequences of 1024 tokens take half of it
    found = Found(MEASURED.rates, Weighed(0, per_token, 10**7))
    remember(tiny, found)
    no_cell()
    assert chosen(tiny, most_threads=2, contexts=2) == Width(4, 2)
    remember(tiny, Found(MEASURED.rates, Weighed(2**44, 0, 10**7)))
    forget(monkeypatch)
    assert chosen(tiny, most_threads=2) == Width(1, 2)
    remember(tiny, MEASURED)
    forget(monkeypatch)
    limit = tiny.stat().st_size + 2 * 5 * 1024 * 1000
    assert chosen(tiny, limit, most_threads=2) == Width(4, 2)


def _garbage(file: Path) -> None:
    file.write_bytes(b"\xff{")


def _deep(file: Path) -> None:
    file.write_bytes(b"[" * 200_000)


def _huge(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" " * 2**20)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new))

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_garbage, id="garbage"),
        pytest.param(_deep, id="deep"),
        pytest.param(_huge, id="huge"),
        pytest.param(_pipe, id="pipe"),
        pytest.param(_link, id="link"),
        pytest.param(_folder, id="folder"),
        pytest.param(_replaced(b"[16,2,245.0]", b"[17,2,245.0]"), id="another-width"),
        pytest.param(_replaced(b"[16,2,245.0]", b"[16,512,245.0]"), id="more-threads"),
        pytest.param(_replaced(b"[1,2,100.0]", b"[2,2,100.0]"), id="nothing-sequential"),
        pytest.param(_replaced(b"100.0", b"-100.0"), id="negative"),
        pytest.param(_replaced(b"245.0", b"1e999"), id="infinite"),
        pytest.param(_replaced(b"245.0", b"NaN"), id="not-a-number"),
    ],
)
def test_a_cache_that_cannot_be_true(spoil: Callable[[Path], None], tiny: Path, cache: Path) -> None:
    remember(tiny, MEASURED)
    name = width_cache.key(width._shape(config_of(tiny), 1), WIDTHS, (2, 1))
    assert width_cache.recall(name, WIDTHS, (2, 1)) == MEASURED
    spoil(cache)
    assert width_cache.recall(name, WIDTHS, (2, 1)) is None
    width_cache.keep(name, MEASURED)
    mended = spoil is not _folder  # which stays: nothing here removes what it has not made
    assert (width_cache.recall(name, WIDTHS, (2, 1)) == MEASURED) is mended


def test_no_place_for_a_cache(tiny: Path, chosen: Choose, cache: Path) -> None:
    cache.parent.parent.write_text("no folder")
    assert chosen(tiny).n_threads == 1
    assert cache.parent.parent.read_text() == "no folder"


def test_a_cache_home_that_is_relative_is_ignored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(cache.parent))
    width_cache.keep("key", MEASURED)
    assert (cache.parent / ".cache/crumplezone/width.json").is_file()


def test_a_cache_has_bounds_and_many_writers(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: width_cache.keep(f"key {n}", MEASURED), range(100)))
    width_cache.keep("last", MEASURED)
    entries = msgspec.json.decode(cache.read_bytes())
    assert 1 < len(entries) <= width_cache._ENTRIES
    assert width_cache.recall("last", (1, 2, 4, 8, 16), (2,)) == MEASURED
    assert list(cache.parent.iterdir()) == [cache]


def test_what_is_measured_holds_for_one_model_build_and_machine(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(model: Path, *asked: object) -> str:
        return width_cache.key(config_of(model), *asked)

    same = Path(shutil.copy2(tiny, tmp_path / "same.gguf"))
    other = write_tiny_llama(tmp_path / "other.gguf", n_vocab=128, n_ctx=256, seed=1)
    keys = [key(tiny), key(tiny, 1), key(tiny, 2), key(other)]
    assert key(same) == keys[0]
    os.utime(same, (1, 1))
    keys.append(key(same))
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        keys.append(key(tiny))
    finally:
        os.sched_setaffinity(0, cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys.append(key(tiny))
    build = tmp_path / "lib"
    build.mkdir()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(build))
    for content in ("", "a", "ab"):
        (build / "libggml-cpu.so").write_text(content)
        keys.append(key(tiny))
    assert len(set(keys)) == len(keys) - (len(cores) == 1)


rates = st.dictionaries(
    st.builds(Width, st.sampled_from([2, 4, 8, 16, 32]), st.integers(1, 4)),
    st.floats(1e-3, 1e6),
)
sequential = st.dictionaries(
    st.builds(Width, st.just(1), st.integers(1, 4)), st.floats(1e-3, 1e6), min_size=1
)


@given(rates, sequential)
def test_never_slower_than_sequential(batched: dict[Width, float], alone: dict[Width, float]) -> None:
    known = batched | alone
    best = pick(known)
    assert known[best] >= 0.97 * max(known.values())
    if best.n_seq > 1:
        assert known[best] > max(alone.values())
    assert not [each for each in known if each < best and known[each] >= 0.97 * max(known.values())]


@given(
    st.floats(1e-4, 10.0),
    st.lists(st.floats(1.0, 2.0), min_size=5, max_size=5),
    st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6),
)
# One thread is faster for one sequence and slower for two: with it, twice as many take 8 times as long.
@example(0.75, [2.0, 1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 1.0, 1.0, 1.0])
# Twice as long for all but one sequence: half of the best rate, but for the last bit.
@example(
    0.0015311114411357784,
    [2.0, 1.2932464874321947, 1.0, 1.5348879844352121, 1.0],
    [0.5, 1.615201563022253, 2.0, 2.0, 2.0, 2.0],
)
def test_a_race_finds_the_fastest_in_time(token: float, grows: list[float], halved: list[float]) -> None:
    """Steps of twice the sequences, or of half the threads, that take at most twice as long."""
    seconds: dict[Width, float] = {}
    for n_seq, grow, half in zip((*WIDTHS, 32), [1.0, *grows], halved, strict=True):
        token *= grow
        seconds |= {Width(n_seq, 2): token, Width(n_seq, 1): token * half}
    visits: list[float] = []

    def visit(each: Width) -> tuple[int, float]:
        steps = min(64, math.ceil(0.03 / seconds[each]))
        visits.append(steps * seconds[each])
        return steps, visits[-1]

    found = race((*WIDTHS, 32), (2, 1), visit)
    assert found == pytest.approx({each: each.n_seq / seconds[each] for each in found})
    assert sum(visits) <= max(3.0, visits[0])
    if sum(seconds.values()) < 0.2:  # then there is time for all that may win
        best = max(each.n_seq / seconds[each] for each in seconds if each.n_threads == 2)
        assert max(found.values()) >= 0.5 * best * (1 - 1e-9)  # rates are rounded
