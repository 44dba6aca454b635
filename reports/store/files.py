"""The store's files: no link is followed, no pipe is waited for, and nothing half written is seen."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import stat
from pathlib import Path

TEMPORARY = ".tmp-"
"""What is being written, or being removed. No id begins with a dot, so readers never look at it."""


def temporary(directory: Path, what: str) -> Path:
    """A new name in the store that readers do not look at."""
    return directory / f"{TEMPORARY}{what}-{secrets.token_hex(4)}"


def open_folder(path: Path) -> int:
    """Open a directory, but no link to one (ELOOP or ENOTDIR)."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def read(name: str | Path, limit: int, folder: int | None = None) -> tuple[bytes, os.stat_result]:
    """Read a regular file.

    Args:
        name: Relative to ``folder``, if that is given.
        limit: The most bytes it may have.
        folder: An open directory.

    Raises:
        OSError: It cannot be opened, is not a regular file (EINVAL) or is too large (EFBIG).
    """
    # A pipe without a writer opens at once with O_NONBLOCK, see fifo(7).
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit), found
    finally:
        os.close(descriptor)


def unmarked(data: bytes) -> bytes:
    """Text in UTF-8 without the byte-order mark that editors on Windows put in front."""
    return data.removeprefix(codecs.BOM_UTF8)


def replace(
    directory: Path, name: str, data: bytes, folder: int | None = None, mode: int = 0o600
) -> os.stat_result:
    """Write a file and put it in the place of another by one rename.

    Args:
        directory: The store, where it is written first.
        name: Its name in the store, or in ``folder`` if that is given.
        data: All of its content.
        folder: An open directory on the same file system.
        mode: Who may read it, less the umask. Reports may hold secrets, so by default nobody else.

    Returns:
        The state of the new file.

    Raises:
        OSError: It cannot be written; what was there is untouched.
    """
    fresh = temporary(directory, name)
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            found = os.fstat(descriptor)
        # An absolute target makes rename(2) ignore the directory descriptor.
        os.replace(fresh, name if folder is not None else directory / name, dst_dir_fd=folder)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return found
