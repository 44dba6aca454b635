"""From a held, hung or dead cell to `Evidence`. Each step that fails says so and costs only itself."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from crumplezone.reports.schema import Evidence, Exit, Fault, Frame, Mapping, Step, Thread
from crumplezone.sandbox import observe
from crumplezone.sandbox.classify import assertion, classify, fault_of
from crumplezone.sandbox.drain import Drain
from crumplezone.sandbox.elf import read_elf
from crumplezone.sandbox.launch import Process, import_path
from crumplezone.sandbox.pressure import oom_kills
from crumplezone.sandbox.procfs import Map, find_map, read_maps
from crumplezone.sandbox.sigframe import SignalFrame, mend_null_call, read_signal_frame
from crumplezone.sandbox.unwind import Stacks

_UNWIND_DEADLINE = 15.0  # seconds
_DEATH_DEADLINE = 5.0
_STOP_DEADLINE = 2.0
_TEXT_MAX = 64 * 1024
_STACKS_MAX = 8 * 1024 * 1024
_MAY_LOOK = (
    "reading another process needs its user id and a dumpable target, or CAP_SYS_PTRACE (ptrace(2)); "
    "in a container: --cap-add=SYS_PTRACE"
)
_MAY_TRACE = (
    "allow ptrace: kernel.yama.ptrace_scope at most 1, a seccomp profile that permits ptrace and "
    "process_vm_readv; in a container: --cap-add=SYS_PTRACE"
)


@dataclass
class Death:
    """What the supervisor knows when it notices that a cell is lost.

    Attributes:
        process: The cell's process.
        drain: Its log, stderr and samples.
        phase: "start" or "call".
        kills: The kernel's counters of OOM kills when it was started.
        held: It wrote to its fault pipe: it is inside its signal handler, or was a moment ago.
        condemned: It lives, and this is why it must not go on.
        at: CLOCK_MONOTONIC, nanoseconds.
    """

    process: Process
    drain: Drain
    phase: str
    kills: dict[str, int]
    held: bool = False
    condemned: tuple[Exit, str] | None = None
    at: int = field(default_factory=time.monotonic_ns)
    steps: list[Step] = field(default_factory=list)


@dataclass
class _Seen:
    """What was read while the cell was stopped."""

    frame: SignalFrame | None = None
    maps: list[Map] = field(default_factory=list)
    threads: list[Thread] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)
    stacks: list[Thread] = field(default_factory=list)
    build_ids: dict[str, str] = field(default_factory=dict)
    text: str = ""


@contextlib.contextmanager
def _step(death: Death, name: str, remedy: str = "") -> Iterator[list[str]]:
    """Run one step; what it raises becomes a line of the provenance, with what would have allowed it."""
    detail: list[str] = []
    start = time.perf_counter()
    ok = True
    try:
        yield detail
    except (OSError, ValueError, ImportError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        ok = False
        detail.append(f"{type(error).__name__}: {error}")
        if isinstance(error, FileNotFoundError | ProcessLookupError | ImportError):
            remedy = ""  # it is not there: no permission would help
    elapsed = round((time.perf_counter() - start) * 1000, 2)
    death.steps.append(Step(name, ok, elapsed, "; ".join(detail), "" if ok else remedy))


def begin(death: Death) -> Future[Evidence]:
    """Stop the cell now, and do the rest beside the caller, on a thread; the future always gets evidence."""
    if death.held or death.condemned:
        # faulthandler has restored SIG_DFL: a second faulting thread would kill the held process.
        death.process.signal(signal.SIGSTOP)
    death.steps += death.process.refused
    future: Future[Evidence] = Future()

    def run() -> None:
        try:
            future.set_result(_examine(death))
        except BaseException as error:
            future.set_exception(error)
            raise

    threading.Thread(target=run, name=f"autopsy-{death.process.pid}").start()
    return future


def _examine(death: Death) -> Evidence:
    process, seen = death.process, _Seen()
    if death.held or death.condemned:
        with _step(death, "stop"):
            _await_stop(process)
        if not _ended(process):
            _look(death, seen)
            _unwind(death, seen)
    if death.held:
        with _step(death, "faulthandler"):
            process.signal(signal.SIGCONT)
            seen.text = _release(process)
            if seen.frame is None and not _ended(process):
                death.condemned = (
                    Exit.PROTOCOL,
                    "the cell wrote to its fault pipe but did not die; killed by the supervisor",
                )
    with _step(death, "reap"):
        returncode = process.kill()
    death.drain.stop()
    try:
        return _evidence(death, seen, returncode)
    finally:
        process.close()


def _await_stop(process: Process) -> None:
    """Wait until every thread has stopped, but not for ever: one may be in uninterruptible sleep."""
    end = time.monotonic() + _STOP_DEADLINE
    # WSTOPPED is told once the whole group has stopped; /proc/PID/stat tells of the main thread only.
    flags = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PIDFD, process.pidfd, flags) is None:
        if time.monotonic() > end:
            raise ValueError("it did not stop: a thread is in uninterruptible sleep")
        time.sleep(0.0002)


def _ended(process: Process) -> bool:
    return bool(select.select([process.pidfd], [], [], 0)[0])


def _look(death: Death, seen: _Seen) -> None:
    """Everything that /proc has, within a few milliseconds."""
    pid = death.process.pid
    with _step(death, "maps", _MAY_LOOK):
        seen.maps = read_maps(pid)
    if death.held:
        with _step(death, "signal frame", _MAY_LOOK) as detail:
            seen.frame = read_signal_frame(pid, seen.maps)
            if seen.frame is None:
                detail.append("no signal frame found on any thread")
    with _step(death, "threads", _MAY_LOOK):
        seen.threads = observe.thread_list(pid, seen.maps)
    with _step(death, "memory and limits"):
        seen.memory, seen.limits = observe.memory(pid), observe.limits(pid)


def _unwind(death: Death, seen: _Seen) -> None:
    pid = death.process.pid
    if seen.frame:
        with _step(death, "call to nowhere", _MAY_LOOK) as detail:
            if mend_null_call(pid, seen.maps, seen.frame):
                detail.append("the saved program counter was set to the caller's, for the unwinder")
            else:
                detail.append("none")
    with _step(death, "stacks (pystack)", _MAY_TRACE):
        examined = _helper(pid)
        seen.stacks, seen.build_ids = examined.threads, examined.build_ids
        if examined.missing:
            raise ImportError(examined.error)
        if examined.error:
            raise ValueError(examined.error)


def _evidence(death: Death, seen: _Seen, code: int) -> Evidence:
    frame = seen.frame
    fault = frame.fault if frame else None if death.condemned else fault_of(code)
    stderr = death.drain.stderr_tail()
    kills = (death.kills, oom_kills())
    exit_kind, detail = _ending(death, code, fault, kills)
    is_abort = exit_kind == Exit.ABORT
    return Evidence(
        exit=exit_kind,
        pid=death.process.pid,
        phase=death.phase,
        returncode=code,
        fault=fault if is_abort or exit_kind in {Exit.SIGNAL, Exit.KILLED, Exit.OOM} else None,
        assertion=assertion(death.process.lines.arena.abort_note(), stderr) if is_abort else None,
        registers=frame.registers if frame else {},
        code_bytes=frame.code_bytes if frame else "",
        stack_bytes=frame.stack_bytes if frame else "",
        threads=_threads(seen),
        maps=_maps(seen),
        memory=seen.memory,
        limits=seen.limits,
        samples=death.drain.samples(death.at),
        flight=death.process.lines.arena.flight(death.at),
        kernel_kills={name: [kills[0].get(name, now), now] for name, now in kills[1].items()},
        faulthandler=seen.text,
        stderr_tail=stderr,
        log_tail=death.drain.log_tail(),
        peak_rss=max(filter(None, (seen.memory.get("VmHWM"), death.drain.peak_rss)), default=None),
        detail=detail,
        steps=death.steps,
    )


def _ending(
    death: Death, code: int, fault: Fault | None, kills: tuple[dict[str, int], dict[str, int]]
) -> tuple[Exit, str]:
    if death.drain.over_memory and not (death.condemned and death.condemned[0] == Exit.HANG):
        return Exit.OOM, "resident memory went over the cell's limit; killed by the supervisor"
    return death.condemned or classify(code, fault, death.phase, kills)


def _maps(seen: _Seen) -> list[Mapping]:
    return observe.records(seen.maps, seen.build_ids)


def _threads(seen: _Seen) -> list[Thread]:
    """What /proc knows of each thread, with the stacks of pystack; without those, the faulting place."""
    stacks = {thread.tid: thread for thread in seen.stacks}
    threads = []
    for thread in seen.threads or seen.stacks:
        stack = stacks.get(thread.tid, thread)
        crashed = seen.frame is not None and thread.tid == seen.frame.tid
        native = stack.native or ([_place(seen)] if crashed else [])
        threads.append(msgspec.structs.replace(thread, crashed=crashed, native=native, python=stack.python))
    return threads


def _place(seen: _Seen) -> Frame:
    """The frame that needs no unwinder: the program counter of the fault."""
    assert seen.frame is not None
    pc = int(seen.frame.registers.get("rip") or seen.frame.registers["pc"], 16)
    within = find_map(seen.maps, pc)
    if within is None:
        return Frame(offset=hex(pc))
    elf = read_elf(within.path)
    offset = elf.address(pc - within.start + within.offset)
    return Frame(module=within.path, build_id=elf.build_id, offset=hex(offset))


def _helper(pid: int) -> Stacks:
    command = [sys.executable, "-P", "-m", "crumplezone.sandbox.unwind", str(pid)]
    env = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run(
        command, capture_output=True, timeout=_UNWIND_DEADLINE, stdin=subprocess.DEVNULL, env=env, check=False
    )
    if done.returncode != 0 or len(done.stdout) > _STACKS_MAX:
        raise ValueError(
            f"helper ended with {done.returncode}: {done.stderr[-500:].decode(errors='replace')}"
        )
    return msgspec.json.decode(done.stdout, type=Stacks)


def _release(process: Process) -> str:
    """Drain the fault pipe: the handler writes the Python stacks, then dies of the true signal."""
    fd = process.lines.fault_fd
    read: list[bytes] = []

    def more() -> bool:
        data = os.read(fd, 65536)
        if sum(map(len, read)) < _TEXT_MAX:
            read.append(data)
        return bool(data)

    _until(process, fd, more)
    return b"".join(read)[:_TEXT_MAX].decode("utf-8", "replace")


def _until(process: Process, fd: int, more: Callable[[], bool]) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(process.pidfd, select.POLLIN)
    end = time.monotonic() + _DEATH_DEADLINE
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return
        ready = {each for each, _ in poller.poll(left * 1000)}
        if fd in ready:
            if not more():
                poller.unregister(fd)
        elif process.pidfd in ready:
            return
