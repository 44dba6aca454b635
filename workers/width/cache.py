"""What was measured before: one small file for all models, believed only as far as it can be true."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from crumplezone.reports.store import files
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.incidents.environment import environment, libraries
from crumplezone.workers.model.file import identity
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.width import Weighed

_FORMAT = 1
_FILE = "width.json"
_ENTRIES = 64  # the latest; an entry has under 2 kB
_LIMIT = 2**18  # bytes of the file

_log = BesideLog(logging.getLogger("crumplezone"))


class Rate(msgspec.Struct, frozen=True, array_like=True):
    """Tokens per second of all sequences together, in the best of several visits."""

    n_seq: Annotated[int, msgspec.Meta(ge=1, le=256)]
    n_threads: Annotated[int, msgspec.Meta(ge=1, le=512)]
    tokens_per_second: Annotated[float, msgspec.Meta(gt=0, lt=1e9)]


class Found(msgspec.Struct, frozen=True):
    """A measurement, and what the memory of a sequence takes."""

    rates: list[Rate]
    weighed: Weighed


class _Entry(msgspec.Struct, frozen=True):
    key: str
    found: Found


def key(config: CellConfig, *asked: object) -> str:
    """Names a measurement: of this model file, this llama.cpp and this CPU, and of what was asked.

    Raises:
        OSError: The model cannot be read.
    """
    here = environment(None)
    parts = [
        _FORMAT,
        identity(config.model),
        (here.versions["llama-cpp-python"], libraries(), sorted(here.variables.items())),
        (here.cpu, here.cpu_flags, sorted(os.sched_getaffinity(0))),
        sorted(config.parameters().items()),  # with it, every setting that changes how long a step takes
        asked,
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def recall(name: str, widths: Sequence[int], threads: Sequence[int]) -> Found | None:
    """What is known under a key, if it has the first of these widths, and none but these."""
    for entry in _read():
        n_seq = {rate.n_seq for rate in entry.found.rates}
        n_threads = {rate.n_threads for rate in entry.found.rates}
        if entry.key == name and widths[0] in n_seq and n_seq <= {*widths} and n_threads <= {*threads}:
            return entry.found
    return None


def keep(name: str, found: Found) -> None:
    """Keep a measurement. Of two processes that write at once one wins; the other's is measured again."""
    entries = [entry for entry in _read() if entry.key != name]
    data = msgspec.json.encode([*entries[1 - _ENTRIES :], _Entry(name, found)])
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(folder, _FILE, data)
    except (OSError, RuntimeError) as error:
        _log.debug("the measured width is not kept: %s", error)


def _folder() -> Path:
    # The XDG specification says that a relative value is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "crumplezone"


def _read() -> list[_Entry]:
    """All of the file, or nothing of it."""
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError, RecursionError):
        data, _ = files.read(_folder() / _FILE, _LIMIT)
        return msgspec.json.decode(data, type=list[_Entry])
    return []
