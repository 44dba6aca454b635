"""What `doctor` reads of the machine: limits, cgroups, what the kernel can do, and the report store."""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from crumplezone.diagnostics.doctor.check import Check, State, in_words
from crumplezone.errors import InputError, ReportError
from crumplezone.reports.store.store import MAX_BYTES, directory_of
from crumplezone.sandbox.process import cgroup
from crumplezone.sandbox.process.cgroup import HOST, oom_kills

# landlock_create_ruleset has this number on every machine; with this flag it returns the ABI (landlock(7)).
_LANDLOCK_CREATE_RULESET, _LANDLOCK_CREATE_RULESET_VERSION = 444, 1
_MEMORY_LEAST = 512 << 20  # bytes: a supervisor and three cells with a small model
_THREADS_LEAST = 64  # a decoder has some ten of its own, and each cell as many as it has processors
_DESCRIPTORS_LEAST = 64  # a cell takes nine in its supervisor


def seccomp() -> Check:
    """Whether the kernel filters system calls, and whether this process is filtered."""
    if not Path("/proc/sys/kernel/seccomp").exists():
        return Check("seccomp", State.LACK, "the kernel has no filters", remedy="CONFIG_SECCOMP_FILTER")
    status = dict(line.split(":\t", 1) for line in _lines("/proc/self/status") if ":\t" in line)
    if status.get("Seccomp") != "2":
        return Check("seccomp", State.OK, "no filter over this process")
    number = status.get("Seccomp_filters", "some")  # Linux >= 5.9
    return Check("seccomp", State.OK, f"{number} filters over this process; what they refuse is listed above")


def landlock() -> Check:
    """The version of Landlock."""
    abi = ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    if abi > 0:
        return Check("landlock", State.OK, f"ABI {abi}; cells do not use it yet")
    return Check(
        "landlock", State.LACK, "the kernel has none; cells do not use it yet", remedy="Linux >= 5.13"
    )


def cores(*, held: bool) -> Check:
    """Whether the kernel would write a core file, which matters only where a crash cannot be held."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    found = f"limit {limit}, pattern {pattern!r}"
    if held:
        return Check("core files", State.OK, f"{found}; none is needed, as crashes are held")
    if soft:
        return Check("core files", State.OK, found)
    costs = "the last trace of a crash, as none can be held here"
    return Check("core files", State.LACK, found, costs, "ulimit -c unlimited")


def memory() -> Check:
    """What may still be allocated, by the machine and by the memory cgroups of this process."""
    left, who = room()
    found = f"{in_words(left)} left, says {who}"
    if left >= _MEMORY_LEAST:
        return Check("memory", State.OK, found)
    costs = "work: cells will be killed for memory"
    remedy = f"free {in_words(_MEMORY_LEAST)} and the size of the model"
    return Check("memory", State.LACK, found, costs, remedy)


def room() -> tuple[int, str]:
    """Bytes that may still be allocated, and who says so."""
    found = [(psutil.virtual_memory().available, "the machine")]
    for left, limit, folder in cgroup.memory_limits():
        found.append((left, f"the memory cgroup {folder} with a limit of {in_words(limit)}"))
    return min(found)


def oom_counters() -> Check:
    """Whether a kill by the kernel for memory can be told from that of a stranger."""
    counters = sorted(oom_kills())
    found = ", ".join(counters) or "none can be read"
    if set(counters) - {HOST}:
        return Check("OOM counters", State.OK, found)
    remedy = "mount the cgroups of this process below /sys/fs/cgroup"
    if counters:
        costs = "certainty: an OOM kill elsewhere on this host, at that moment, is taken for the cell's"
    else:
        costs = "the cause: a cell that was killed for memory is reported as killed by a stranger"
    return Check("OOM counters", State.LACK, found, costs, remedy)


def threads() -> Check:
    """How many threads and processes may still be started."""
    left = list(_threads_left())
    if not left:
        return Check("threads", State.OK, "no limit")
    least, who = min(left)
    found = f"{least:,} more may be started, says {who}"
    if least >= _THREADS_LEAST:
        return Check("threads", State.OK, found)
    costs = "work: cells do not start, or exit when OpenMP gets no thread (libgomp calls exit(1))"
    return Check("threads", State.LACK, found, costs, "a higher ulimit -u, or pids.max of the cgroup")


def descriptors() -> Check:
    """How many descriptors this process may still open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = soft - len(list(Path("/proc/self/fd").iterdir()))
    found = f"{left:,} more may be opened"
    if left >= _DESCRIPTORS_LEAST:
        return Check("descriptors", State.OK, found)
    costs = "work: cells do not start"
    return Check("descriptors", State.LACK, found, costs, "ulimit -n 1024")


def store(reports: Path | None) -> Check:
    """Whether reports can be written, tried with a file without a name where the store is or would be."""
    costs = "every report: what happened is then only logged"
    remedy = "--reports or CRUMPLEZONE_REPORTS with a directory that this user may write"
    try:
        directory = directory_of(reports, "--reports")
        place = next(each for each in (directory, *directory.parents) if os.path.lexists(each))
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b".")
            file.flush()
        state = os.statvfs(place)
    except (ReportError, InputError) as error:
        return Check("report store", State.LACK, str(error), costs, remedy)
    except OSError as error:
        return Check("report store", State.LACK, f"{directory}: {error.strerror}", costs, remedy)
    free = state.f_bavail * state.f_frsize
    found = f"{directory}, {in_words(free)} free"
    if free >= 2 * MAX_BYTES:
        return Check("report store", State.OK, found)
    return Check("report store", State.LACK, found, costs, f"make room for {in_words(2 * MAX_BYTES)}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _threads_left() -> Iterator[tuple[int, str]]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # It counts the threads of a user, and does not bind root (getrlimit(2)).
    if soft != resource.RLIM_INFINITY and os.getuid() != 0:
        everyone = [each.info for each in psutil.process_iter(["uids", "num_threads"])]
        own = [each for each in everyone if each["uids"] and each["uids"].real == os.getuid()]
        used = sum(each["num_threads"] or 0 for each in own)
        yield max(soft - used, 0), f"ulimit -u of {soft:,}"
    for folder in cgroup.folders("pids"):
        limit, used_here = cgroup.number(folder / "pids.max"), cgroup.number(folder / "pids.current")
        if limit is not None and used_here is not None:
            yield max(limit - used_here, 0), f"the pids cgroup {folder} with a limit of {limit:,}"
