"""Prompts that crashed llama.cpp alone, on every rung: for a day they are refused, not tried again.

They lie beside the reports, as keyed hashes, for all processes of one user. What lies there is believed only
if it is this user's own file and has what is written here; whatever else it is costs nobody a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import hashlib
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from crumplezone.errors import ReportError
from crumplezone.reports.store import files
from crumplezone.reports.store.redaction_key import redaction_key
from crumplezone.reports.store.store import Store
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.incidents.environment import environment, libraries
from crumplezone.workers.model.file import identity
from crumplezone.workers.protocol.config import CellConfig

FILE = ".blamed-1.sqlite"  # the number is that of what is in it; no report's id begins with a dot
ROWS_MAX = 4096
FORGIVEN_AFTER = 24 * 3600.0  # seconds
_APPLICATION = 0x43525A42  # of all SQLite files, those are ours (https://sqlite.org/fileformat2.html, 1.3.13)
_SCHEMA = (
    "CREATE TABLE blamed (name BLOB PRIMARY KEY, report TEXT NOT NULL, count INTEGER NOT NULL, "
    "at REAL NOT NULL) WITHOUT ROWID"
)
_BLAME = (
    "INSERT INTO blamed VALUES (?, ?, 1, ?) "
    "ON CONFLICT (name) DO UPDATE SET count = count + 1, at = excluded.at"
)
_FORGET = "DELETE FROM blamed WHERE name IN (SELECT name FROM blamed ORDER BY at DESC LIMIT -1 OFFSET ?)"
_BYTES_MAX = 2**24
_NAME = 32  # bytes
_BUSY = 1.0  # seconds that another process may take
_BESIDE = ("", "-wal", "-shm")
_NOT_OURS = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_T = TypeVar("_T")
_log = BesideLog(logging.getLogger("crumplezone"))


@dataclasses.dataclass(frozen=True)
class Blamed:
    """What is remembered of a prompt.

    Attributes:
        report: Id of the report of the crash that it was first blamed for.
        count: How often it was blamed.
        at: When that was last, seconds since the epoch.
    """

    report: str
    count: int
    at: float

    @property
    def forgiven(self) -> bool:
        """Whether it is to be tried again. Clocks are set: what is to come counts as long ago."""
        return not abs(time.time() - self.at) <= FORGIVEN_AFTER

    @property
    def problem(self) -> str:
        """Why it is not tried, for its caller."""
        until = dt.datetime.fromtimestamp(self.at + FORGIVEN_AFTER, dt.UTC)
        return (
            f"it crashed llama.cpp before, alone and token by token (report {self.report}), and is not tried "
            f"again until {until:%Y-%m-%d %H:%M} UTC, or with another model, context or llama.cpp"
        )


class Blame:
    """The prompts that are remembered beside a report store. Its methods never raise for what lies there.

    Args:
        store: The report store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.directory / FILE
        self._lock = threading.Lock()
        self._read: dict[bytes, Blamed] = {}
        self._stamp: object = None  # of the files that this was read from

    def names(
        self, tokens: npt.NDArray[np.int32], sampling: Any, config: CellConfig, *adapters: object
    ) -> tuple[bytes, ...]:
        """What a prompt is remembered by: without its seed, and with it. Nothing if none can be remembered.

        Args:
            tokens: Of the prompt.
            sampling: How it is to go on, a dataclass; how far does not matter.
            config: Model and context.
            adapters: That change the model.
        """
        try:
            here, key = _here(config.model), redaction_key(self._store.directory)
        except (OSError, ReportError) as error:
            _log.debug("no prompt is remembered: %s", error)
            return ()
        asked = dataclasses.asdict(sampling)
        seed = asked.pop("seed", None)
        asked.pop("max_tokens", None)
        digest = hashlib.blake2b(key=key, person=b"blamed prompts", digest_size=_NAME)
        digest.update(repr((here, config, adapters, sorted(asked.items()), len(tokens))).encode())
        digest.update(tokens.tobytes())
        seeded = digest.copy()
        seeded.update(repr(seed).encode())
        return digest.digest(), seeded.digest()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be known. Costs no more than a look at a directory."""
        return not self._known()

    def known(self, names: Iterable[bytes]) -> Blamed | None:
        """What is remembered of a prompt by one of these names, unless it is forgiven."""
        found = self._known()
        return next((found[name] for name in names if name in found and not found[name].forgiven), None)

    def remember(self, name: bytes, report: str) -> None:
        """A prompt was blamed."""

        def write(connection: sqlite3.Connection) -> bool:
            now = time.time()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM blamed WHERE abs(? - at) > ?", (now, FORGIVEN_AFTER))
            connection.execute(_BLAME, (name, report, now))
            connection.execute(_FORGET, (ROWS_MAX,))
            connection.execute("COMMIT")
            return True

        try:
            for _ in range(2):  # once more where the first has set something aside
                if not self._is_there():
                    self._make()
                if self._with_it(write):
                    return
        except (sqlite3.Error, OSError) as error:
            _log.debug("a prompt is not remembered: %s", error)

    def _known(self) -> dict[bytes, Blamed]:
        with self._lock:
            try:
                stamp = self._stamped()
                if stamp != self._stamp:
                    rows = self._with_it(_rows) if stamp and self._is_there() else None
                    self._read = {row[0]: Blamed(*row[1:]) for row in rows or () if self._sound(*row)}
                    self._stamp = stamp
            except (sqlite3.Error, OSError) as error:
                _log.debug("what is remembered of prompts cannot be read: %s", error)
                return {}
            return self._read

    def _stamped(self) -> object:
        """Changes with the files; None if there are none."""
        found = []
        for each in _BESIDE[:2]:
            with contextlib.suppress(FileNotFoundError):
                state = os.lstat(f"{self._path}{each}")
                found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return found or None

    def _sound(self, name: object, report: object, count: object, at: object) -> bool:
        """Whether a row can be one of ours, whatever the columns are declared to hold."""
        kinds = (name, bytes), (report, str), (count, int), (at, float)
        if not all(isinstance(value, kind) for value, kind in kinds):
            return False
        try:
            self._store.path(str(report))
        except ReportError:
            return False
        return True

    def _is_there(self) -> bool:
        """Whether there is a file. What is no file of this user alone is set aside."""
        for each in _BESIDE:
            try:
                found = os.lstat(f"{self._path}{each}")
            except FileNotFoundError:
                if not each:
                    return False
                continue
            private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not (stat.S_ISREG(found.st_mode) and private and found.st_size <= _BYTES_MAX):
                self._set_aside("it is no file of this user alone, or too large")
                return False
        return True

    def _make(self) -> None:
        """Make the file beside its place, and link it there: no other process sees half of it."""
        directory = self._store.directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = files.temporary(directory, FILE)
        os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            with contextlib.closing(_connect(fresh)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")  # survives kill -9; readers wait for nobody
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(_SCHEMA)
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(fresh, self._path)
        finally:
            fresh.unlink()

    def _with_it(self, work: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """Do something with the file if it is what is written here; else it is set aside."""
        try:
            # For one thing: a fork must inherit nothing of SQLite's (sqlite.org/howtocorrupt.html, 2.6).
            with contextlib.closing(_connect(self._path)) as connection:
                connection.execute("PRAGMA trusted_schema = OFF")
                ((application,),) = connection.execute("PRAGMA application_id")
                schema = connection.execute("SELECT sql FROM sqlite_master LIMIT 2").fetchall()
                if application == _APPLICATION and schema == [(_SCHEMA,)]:
                    return work(connection)
            problem = "it is another program's, or was changed"
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF not in _NOT_OURS:  # of an extended one, the primary one
                raise
            problem = str(error)
        self._set_aside(problem)
        return None

    def _set_aside(self, problem: str) -> None:
        """Have it out of the way, in the place of what was set aside before it."""
        self._path.replace(f"{self._path}.aside")
        for each in _BESIDE[1:]:
            Path(f"{self._path}{each}").unlink(missing_ok=True)
        _log.warning("%s is not what was written there (%s): it was set aside", self._path, problem)


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"file:{quote(str(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY, isolation_level=None)
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    return connection


def _rows(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT * FROM blamed LIMIT ?", (ROWS_MAX,)).fetchall()


def _here(model: str) -> object:
    """The model and the build, and what else may decide whether llama.cpp crashes.

    Raises:
        OSError: The model cannot be read.
    """
    found = Path(model).stat()
    return _here_at(model, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _here_at(model: str, _size: int, _mtime_ns: int) -> object:
    here = environment(None)
    return identity(model), here.versions["llama-cpp-python"], libraries(), sorted(here.variables.items())
