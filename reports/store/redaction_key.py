"""The key of a report store: equal texts stay equal within it, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from crumplezone.errors import ReportError
from crumplezone.reports.printable import printable
from crumplezone.reports.store import files

KEY_NAME = ".redaction-key"
KEY_BYTES = 32


def redaction_key(directory: Path) -> bytes:
    """The key of a store: random, made when it is first asked for, readable by its owner only.

    Safe for several processes at once: all get the same key.

    Raises:
        ReportError: It cannot be made or read, or something else lies in its place.
    """
    path = directory / KEY_NAME
    try:
        if not path.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_key(path)
        key, _ = files.read(path, KEY_BYTES)
    except OSError as error:
        raise ReportError(
            f"the redaction key {printable(str(path))} cannot be used: {error.strerror}. "
            "Make its directory readable and writable, or remove what lies there."
        ) from error
    if len(key) != KEY_BYTES:
        raise ReportError(
            f"the redaction key {printable(str(path))} has {len(key)} bytes, not {KEY_BYTES}. Remove it: "
            "another is made, and its hashes differ from those of reports that were redacted before."
        )
    return key


def _make_key(path: Path) -> None:
    fresh = files.temporary(path.parent, KEY_NAME)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        # A link, as a rename would replace the key of a writer who was faster.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
