"""From a held, hung or dead cell to `Evidence`. Each step that fails says so and costs only itself."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from crumplezone.reports.schema import Assertion, Evidence, Exit, Fault, Step, Thread
from crumplezone.sandbox.drain import Drain
from crumplezone.sandbox.launch import Process, import_path
from crumplezone.sandbox.sigframe import SignalFrame, read_signal_frame, threads
from crumplezone.sandbox.unwind import Stacks

_UNWIND_DEADLINE = 15.0  # seconds
_DEATH_DEADLINE = 5.0
_TEXT_MAX = 64 * 1024
_STACKS_MAX = 8 * 1024 * 1024

_GGML = re.compile(r"^(?P<file>[^\n]*?):(?P<line>\d+): (?P<text>.*)$", re.DOTALL)
_TERMINATE = re.compile(r"terminate called[^\n]*(?:\n\s*what\(\):[^\n]*)?")
_GLIBC = re.compile(
    r"\*\*\* [^\n]* \*\*\*: terminated|(?:double free|free\(\)|malloc|realloc|corrupted|munmap_chunk)[^\n]*"
)


@dataclass
class Death:
    """What the supervisor knows when it notices that a cell is lost."""

    process: Process
    drain: Drain
    phase: str
    oom_kills: int  # the kernel's counter when the cell was started
    held: bool = False
    hang: bool = False
    protocol: str = ""  # how the cell broke the protocol
    steps: list[Step] = field(default_factory=list)
    frame: SignalFrame | None = None


def oom_kill_count() -> int:
    """How many processes the kernel has killed for memory (/proc/vmstat, Linux >= 4.13)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def _step(death: Death, name: str) -> Iterator[list[str]]:
    """Run one step; what it raises becomes a line of the provenance."""
    detail: list[str] = []
    start = time.perf_counter()
    ok = True
    try:
        yield detail
    except (OSError, ValueError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        ok = False
        detail.append(f"{type(error).__name__}: {error}")
    elapsed = round((time.perf_counter() - start) * 1000, 2)
    death.steps.append(Step(name, ok, elapsed, "; ".join(detail)))


def stop_and_look(death: Death) -> None:
    """The part of the autopsy that cannot wait: stop every thread, read the signal frame (about 1 ms)."""
    process = death.process
    # faulthandler has restored SIG_DFL: a second faulting thread would kill the held process.
    with _step(death, "stop"):
        process.signal(signal.SIGSTOP)
        os.waitid(os.P_PIDFD, process.pidfd, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if death.held:
        with _step(death, "signal frame") as detail:
            death.frame = read_signal_frame(process.pid)
            if death.frame is None:
                detail.append("no signal frame found on any thread")


def begin(death: Death) -> Future[Evidence]:
    """Do the rest of the autopsy beside the caller, on a thread; the future always gets evidence."""
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
    process = death.process
    stacks: list[Thread] = []
    peak: int | None = None
    if death.held or death.hang:
        with _step(death, "memory"):
            peak = _peak_rss(process.pid)
        with _step(death, "stacks (pystack)"):
            stacks = _stacks(process.pid)
        if not stacks:
            with _step(death, "threads (/proc)"):
                stacks = [Thread(tid, _comm(process.pid, tid)) for tid in threads(process.pid)]
    text = ""
    if death.held:
        with _step(death, "faulthandler"):
            process.signal(signal.SIGCONT)
            text = _release(process)
            if death.frame is None and not select.select([process.pidfd], [], [], 0)[0]:
                death.protocol = "the cell wrote to its fault pipe but did not die; killed by the supervisor"
    with _step(death, "reap"):
        returncode = process.kill()
    death.drain.stop()
    try:
        return _evidence(death, returncode, stacks, text, peak)
    finally:
        process.close()


def _evidence(death: Death, code: int, stacks: list[Thread], text: str, peak: int | None) -> Evidence:
    frame = death.frame
    fault = frame.fault if frame else _fault_from(code, death)
    stderr = death.drain.stderr_tail()
    exit_kind, detail = _classify(death, code, fault)
    tid = frame.tid if frame else None
    return Evidence(
        exit=exit_kind,
        pid=death.process.pid,
        phase=death.phase,
        returncode=code,
        fault=fault if exit_kind in {Exit.SIGNAL, Exit.ABORT, Exit.KILLED} else None,
        assertion=_assertion(death.process.lines.arena.abort_note(), stderr)
        if exit_kind == Exit.ABORT
        else None,
        registers=frame.registers if frame else {},
        code_bytes=frame.code_bytes if frame else "",
        threads=[msgspec.structs.replace(t, crashed=t.tid == tid) for t in stacks],
        faulthandler=text,
        stderr_tail=stderr,
        log_tail=death.drain.log_tail(),
        peak_rss=max(filter(None, (peak, death.drain.peak_rss)), default=None),
        detail=detail,
        steps=death.steps,
    )


def _fault_from(returncode: int, death: Death) -> Fault | None:
    if returncode >= 0 or death.hang or death.protocol:
        return None
    try:
        return Fault(-returncode, signal.Signals(-returncode).name)
    except ValueError:
        return Fault(-returncode, f"signal {-returncode}")


def _classify(death: Death, returncode: int, fault: Fault | None) -> tuple[Exit, str]:
    """How the cell ended, most certain knowledge first; and what that rests on."""
    if death.hang:
        return Exit.HANG, "no reply within the deadline; killed by the supervisor"
    if death.drain.over_memory:
        return Exit.OOM, "resident memory went over the cell's limit; killed by the supervisor"
    if death.protocol:
        return Exit.PROTOCOL, death.protocol
    if fault is None:
        if death.phase == "start":
            return Exit.FAILED_START, f"exited with status {returncode} before it was ready"
        return Exit.NATIVE_EXIT, f"exit({returncode}) in the middle of a request"
    if fault.signal == signal.SIGKILL and oom_kill_count() > death.oom_kills:
        return Exit.OOM, "SIGKILL, and the kernel's oom_kill counter rose meanwhile"
    if fault.signal in {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
        return Exit.KILLED, f"{fault.name} that the supervisor did not send"
    if fault.signal == signal.SIGABRT:
        return Exit.ABORT, ""
    return Exit.SIGNAL, ""


def _assertion(note: str, stderr: str) -> Assertion | None:
    if note:
        found = _GGML.match(note)
        if found:
            return Assertion(found["text"].strip(), "ggml", found["file"], int(found["line"]))
        return Assertion(note.strip(), "ggml")
    searches: tuple[tuple[str, re.Pattern[str]], ...] = (("terminate", _TERMINATE), ("glibc", _GLIBC))
    for source, pattern in searches:
        matches = pattern.findall(stderr)
        if matches:
            return Assertion(matches[-1].strip(), source)
    return None


def _stacks(pid: int) -> list[Thread]:
    command = [sys.executable, "-P", "-m", "crumplezone.sandbox.unwind", str(pid)]
    env = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run(
        command, capture_output=True, timeout=_UNWIND_DEADLINE, stdin=subprocess.DEVNULL, env=env, check=False
    )
    if done.returncode != 0 or len(done.stdout) > _STACKS_MAX:
        raise ValueError(
            f"helper ended with {done.returncode}: {done.stderr[-500:].decode(errors='replace')}"
        )
    stacks = msgspec.json.decode(done.stdout, type=Stacks)
    if stacks.error:
        raise ValueError(stacks.error)
    return stacks.threads


def _comm(pid: int, tid: int) -> str:
    return Path(f"/proc/{pid}/task/{tid}/comm").read_text(errors="replace").strip()


def _peak_rss(pid: int) -> int | None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


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
