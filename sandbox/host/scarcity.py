"""What a machine has no more of, in words: no process, thread or descriptor, no room for an environment."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping

from crumplezone.errors import CrumplezoneError

SCARCE = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
"""Of an OSError that says nothing of what was asked for."""

NO_CELL = (OSError, RuntimeError, MemoryError)
"""What a start raises that has no cell. RuntimeError: threading has no thread left."""


def no_cell(error: BaseException) -> CrumplezoneError:
    """The error to raise where a cell could not be started."""
    return CrumplezoneError(f"no cell could be started ({error}): {remedy(error)}")


def too_large(env: Mapping[str, str]) -> OSError:
    """The error to raise where an environment is too large to be given to a process."""
    sizes = {name: len(os.fsencode(f"{name}={value}")) + 1 for name, value in env.items()}
    name = max(sizes, key=sizes.__getitem__)
    what = f"{name} takes {sizes[name]} bytes, all variables {sum(sizes.values())}"
    return OSError(errno.E2BIG, f"the environment is too large: {what}")


def remedy(error: BaseException) -> str:
    """What to do where a process could not be started."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError):
        number = errno.EAGAIN
    elif isinstance(error, MemoryError):
        number = errno.ENOMEM
    if isinstance(error, OSError) and error.filename == os.devnull:
        return f"have a {os.devnull} here (in a chroot: mknod -m 666 dev/null c 1 3)"
    files, tasks = map(_limit, (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    known = {
        errno.EMFILE: f"close files, or raise the limit of open ones (ulimit -n is {files})",
        errno.ENFILE: "close files: the whole machine has too many open; or raise fs.file-max",
        errno.EAGAIN: f"end threads or processes, or raise a limit (ulimit -u is {tasks}; pids.max)",
        errno.ENOMEM: "free memory, or raise a limit (ulimit -v, memory.max)",
        errno.E2BIG: "shorten it: Linux takes 131072 bytes of each, and of all a quarter of ulimit -s",
    }
    program = "name the Python to run by multiprocessing.set_executable('/path/to/python')"
    known |= dict.fromkeys((errno.ENOENT, errno.EACCES, errno.ENOEXEC), program)
    profile = "have the seccomp profile of this process allow it: `crumplezone doctor` tries what is needed"
    known |= dict.fromkeys((errno.EPERM, errno.ENOSYS), profile)
    return known.get(number or 0, "free memory, processes or file descriptors")


def _limit(which: int) -> str:
    soft, _ = resource.getrlimit(which)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
