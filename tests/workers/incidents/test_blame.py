"""What is remembered of prompts that crashed alone: by all processes, for a day, and never on trust."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from crumplezone.reports.store.store import Store
from crumplezone.workers.incidents import blame as module
from crumplezone.workers.incidents.blame import FILE, FORGIVEN_AFTER, Blame, Blamed
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CellConfig
from tests.support.decoders import descriptors

NAMES = [bytes([n]) * 32 for n in range(9)]
TOKENS = np.array([1, 2, 3], np.int32)


@dataclass(frozen=True)
class Asked:
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 9


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> CellConfig:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny.read_bytes())
    return configure(copy, n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1, n_gpu_layers=0)


def report_of(blame: Blame, name: bytes) -> str | None:
    found = blame.known([name])
    return found.report if found else None


def database(store: Store) -> Path:
    return store.directory / FILE


def change(store: Store, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(database(store))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_what_is_remembered_is_known_to_all(store: Store) -> None:
    mine, other = Blame(store), Blame(store)
    assert mine.empty
    assert not store.directory.exists()
    before = descriptors()
    mine.remember(NAMES[0], "first")
    mine.remember(NAMES[0], "second")
    other.remember(NAMES[1], "third")
    for blame in (mine, other, Blame(store)):
        assert [report_of(blame, name) for name in NAMES[:3]] == ["first", "third", None]
    found = mine.known([NAMES[2], NAMES[0]])
    assert found is not None
    assert (found.count, abs(found.at - time.time()) < 60) == (2, True)
    assert "report first" in found.problem
    assert descriptors() == before
    assert sorted(path.name for path in store.directory.iterdir()) == [FILE]
    assert database(store).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("seconds", [FORGIVEN_AFTER + 9, -FORGIVEN_AFTER - 9])
def test_it_is_forgiven_after_a_time(seconds: float, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    blame = Blame(store)
    blame.remember(NAMES[0], "first")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    assert blame.known(NAMES) is None
    blame.remember(NAMES[1], "second")
    with contextlib.closing(sqlite3.connect(database(store))) as connection:
        assert connection.execute("SELECT report FROM blamed").fetchall() == [("second",)]


def test_the_oldest_are_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 3)
    blame = Blame(store)
    for n, name in enumerate(NAMES):
        blame.remember(name, f"report{n}")
    assert [name for name in NAMES if report_of(blame, name)] == NAMES[-3:]


def test_a_name_tells_prompts_models_contexts_and_ways_to_draw_apart(
    store: Store, config: CellConfig
) -> None:
    blame = Blame(store)
    plain, seeded = blame.names(TOKENS, Asked(), config)
    assert blame.names(TOKENS, Asked(max_tokens=1), config) == (plain, seeded)
    assert blame.names(TOKENS, Asked(seed=1), config)[0] == plain
    others = {
        blame.names(TOKENS, Asked(seed=1), config)[1],
        *blame.names(TOKENS[:2], Asked(), config),
        *blame.names(TOKENS, Asked(temperature=0.5), config),
        *blame.names(TOKENS, Asked(), msgspec.structs.replace(config, n_ctx=1024)),
        *blame.names(TOKENS, Asked(), config, "an adapter"),
        *Blame(Store(store.directory / "other")).names(TOKENS, Asked(), config),
    }
    os.utime(config.model, ns=(1, 1))  # another file, for all that is known
    others |= {*blame.names(TOKENS, Asked(), config)}
    assert len(others) == 13
    assert not others & {plain, seeded}
    Path(config.model).unlink()
    assert blame.names(TOKENS, Asked(), config) == ()


def garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 999)


def torn(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE blamed (name, report, count, at)")


def trapped(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE INSERT ON blamed BEGIN SELECT randomblob(1000000000); END"
        )


def shared(path: Path) -> None:
    path.chmod(0o666)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def huge(path: Path) -> None:
    os.truncate(path, 2**25)


DAMAGES = [garbage, torn, cut, empty, foreign, trapped, shared, linked, huge]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_was_not_written_here_is_set_aside(damage: Callable[[Path], None], store: Store) -> None:
    Blame(store).remember(NAMES[0], "first")
    damage(database(store))
    blame = Blame(store)
    assert blame.known(NAMES) is None
    blame.remember(NAMES[1], "second")
    assert [report_of(blame, name) for name in NAMES[:2]] == [None, "second"]
    assert database(store).with_name(f"{FILE}.aside").lstat()


def test_a_directory_in_its_place_costs_nobody_a_prompt(store: Store) -> None:
    (database(store) / "x").mkdir(parents=True)
    blame = Blame(store)
    blame.remember(NAMES[0], "first")
    assert blame.known(NAMES) is None or report_of(blame, NAMES[0]) == "first"


def test_rows_that_cannot_be_are_not_believed(store: Store) -> None:
    blame = Blame(store)
    blame.remember(NAMES[0], "first")
    now = time.time()
    change(
        store,
        f"INSERT INTO blamed VALUES (x'01', '../../etc', 1, {now})",
        f"INSERT INTO blamed VALUES (x'02', 'report', 'many', {now})",
        "INSERT INTO blamed VALUES (x'03', 'report', 1, 9e99)",
        f"INSERT INTO blamed VALUES (x'04', CAST(x'ff' AS TEXT), 1, {now})",
        f"INSERT INTO blamed VALUES ('text', 'report', 1, {now})",
    )
    assert [blame.known([bytes([n])]) for n in range(1, 5)] == [None] * 4
    assert report_of(blame, NAMES[0]) == "first"


WRITER = """
import sys
from pathlib import Path
from crumplezone.reports.store.store import Store
from crumplezone.workers.incidents.blame import Blame
blame = Blame(Store(Path(sys.argv[1])))
for n in range(10**6):
    blame.remember(n.to_bytes(32, "big"), f"report{n}")
    print(n, flush=True)
"""


def test_two_processes_that_write_at_once_and_are_killed_leave_a_sound_file(store: Store) -> None:
    command = [sys.executable, "-c", WRITER, str(store.directory)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(20):
            assert writer.stdout.readline()
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=30)
    blame = Blame(store)
    assert [report_of(blame, n.to_bytes(32, "big")) for n in range(20)] == [f"report{n}" for n in range(20)]
    blame.remember(NAMES[8], "last")
    assert report_of(blame, NAMES[8]) == "last"
    assert not database(store).with_name(f"{FILE}.aside").exists()


def test_a_row_of_the_future_is_forgiven() -> None:
    assert not Blamed("x", 1, time.time()).forgiven
    assert Blamed("x", 1, time.time() + FORGIVEN_AFTER + 9).forgiven
    assert Blamed("x", 1, float("nan")).forgiven
