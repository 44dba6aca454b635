"""From a held, hung or dead cell to `Evidence`. Each step that fails says so and costs only itself."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from crumplezone.reports.records.report import Evidence, Exit, Fault, Frame, Step, Thread
from crumplezone.sandbox.autopsy import observe
from crumplezone.sandbox.autopsy.cfi.native import native_stack
from crumplezone.sandbox.autopsy.classify import TAKEN, assertion, classify, fault_of, was_sent
from crumplezone.sandbox.autopsy.incident import Findings
from crumplezone.sandbox.autopsy.release import named_fault, release
from crumplezone.sandbox.autopsy.sigframe.frame import SignalFrame, mend_null_call, read_signal_frame
from crumplezone.sandbox.autopsy.stacks import take_stacks
from crumplezone.sandbox.autopsy.turns import FAMILIAR, TURNS, crash_key
from crumplezone.sandbox.process.cgroup import oom_kills
from crumplezone.sandbox.process.drain import Drain
from crumplezone.sandbox.process.process import Process
from crumplezone.sandbox.process.procfs import Map, SystemCall, current_calls, read_maps, sizes, states

_STOP_DEADLINE = 2.0  # seconds
_HEAD_START = 0.05  # seconds: the job that goes on has the processors first; what is stopped keeps
_AT_REST = {"T", "t", "Z", "X"}  # stopped, stopped by a tracer, ended
_MAY_LOOK = (
    "reading another process needs its user id and a dumpable target, or CAP_SYS_PTRACE (ptrace(2)); "
    "in a container: --cap-add=SYS_PTRACE"
)
_MAY_START = "more threads (ulimit -u, pids.max), more memory, or a call before the interpreter shuts down"
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
        phase: "start", "call" or "idle" of a cell, "run" of a guest.
        kills: The kernel's counters of OOM kills when it was started.
        held: It wrote to its fault pipe: it is inside its signal handler, or was a moment ago.
        condemned: It lives, and this is why it must not go on.
        at: CLOCK_MONOTONIC, nanoseconds.
        findings: What will be known of it.
    """

    process: Process
    drain: Drain
    phase: str
    kills: dict[str, int]
    held: bool = False
    condemned: tuple[Exit, str] | None = None
    at: int = field(default_factory=time.monotonic_ns)
    steps: list[Step] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)


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
    native: list[Frame] = field(default_factory=list)  # of the crashed thread, without the helper
    text: str = ""

    @property
    def fault(self) -> Fault | None:
        return self.frame.fault if self.frame else named_fault(self.text)


def _failed(name: str, error: Exception, remedy: str = "") -> Step:
    return Step(name, ok=False, detail=f"{type(error).__name__}: {error}", remedy=remedy)


@contextlib.contextmanager
def _step(death: Death, name: str, remedy: str = "") -> Iterator[list[str]]:
    """Run one step; what it raises becomes a line of the provenance, with what would have allowed it."""
    detail: list[str] = []
    start = time.perf_counter()
    failure = ""
    try:
        yield detail
    except Exception as error:  # noqa: BLE001 - an untrusted process can make a step fail in any way
        failure = f"{type(error).__name__}: {error}"
        if not isinstance(error, PermissionError):
            remedy = ""
    elapsed = round((time.perf_counter() - start) * 1000, 2)
    parts = [*detail, failure] if failure else detail
    death.steps.append(Step(name, not failure, elapsed, "; ".join(parts), remedy if failure else ""))


def begin(death: Death) -> Findings:
    """Stop the cell now, and do the rest beside the caller, on a thread; the future always gets evidence.

    Where there is no thread, or what the dead hold would pile up, the caller does what is quick.
    """
    if death.held or death.condemned:
        death.drain.watched = False  # from here on it is us who stop it
        if death.condemned:
            with contextlib.suppress(OSError):  # it has ended
                death.drain.stopped |= "T" in states(death.process.pid)
        death.process.signal(signal.SIGSTOP)
    death.steps += death.process.refused
    findings = death.findings
    crowded, counted = TURNS.crowded, contextlib.ExitStack()
    counted.enter_context(TURNS.autopsy())  # before its thread runs: the next cell may lack what it holds now

    def examine(in_haste: str = "") -> None:
        evidence = _autopsy(death, counted, in_haste=in_haste)
        findings.tell(evidence.exit)
        findings.set_result(evidence)

    if crowded:
        examine(crowded)
        return findings
    try:
        threading.Thread(target=examine, name=f"autopsy-{death.process.pid}").start()
    except (RuntimeError, MemoryError) as error:
        death.steps.append(_failed("autopsy", error, _MAY_START))
        examine("the caller waits")
    return findings


def _autopsy(death: Death, counted: contextlib.ExitStack, *, in_haste: str) -> Evidence:
    """Examine it, and end it.

    Args:
        death: Of what.
        counted: Among those that there are, until it is ended.
        in_haste: Why the caller waits for it, so without what takes longer than some milliseconds.
    """
    seen = _Seen()
    with counted:
        try:
            _examine(death, seen, in_haste=in_haste)
        except Exception as error:  # noqa: BLE001 - it is ended and reported whatever was found in it
            death.steps.append(_failed("autopsy", error))
        return _end(death, seen)


def _examine(death: Death, seen: _Seen, *, in_haste: str) -> None:
    process = death.process
    if not (death.held or death.condemned):
        return
    if not in_haste:
        death.findings.wanted.wait(_HEAD_START)
    with _step(death, "stop"):
        _await_stop(process)
        death.drain.stop()  # what it said is read, and no more will come
        process.lines.silence()
    if not process.ended:
        _look(death, seen)
        _look_closely(death, seen, in_haste=in_haste)
    elif death.held:
        death.steps.append(Step("hold", ok=False, detail="it ended before it could be looked at"))
    if death.held:
        with _step(death, "faulthandler"):
            seen.text = release(process, seen.frame.tid if seen.frame else None)


def _end(death: Death, seen: _Seen) -> Evidence:
    """End and reap the cell, and say what is known of it."""
    process, code = death.process, None
    try:
        code = _reap(death, seen)
        death.drain.stop()
        return _evidence(death, seen, code)
    except Exception as error:  # noqa: BLE001 - as above
        death.steps.append(_failed("evidence", error))
        fault = seen.fault or fault_of(code)
        kind, why = death.condemned or classify(code, fault, death.phase, ({}, {}), process.pid)
        return Evidence(kind, process.pid, death.phase, code, fault, detail=why, steps=death.steps)
    finally:
        process.kill()
        process.close()


def _reap(death: Death, seen: _Seen) -> int | None:
    """End it if it lives. The return code of a cell that was parked after a fatal signal is that signal's."""
    had_ended, code = death.process.ended, None
    with _step(death, "reap") as detail:
        code = death.process.kill()
        if death.held and not had_ended:
            if seen.fault is None:
                what = "the cell wrote to its fault pipe but did not die; killed by the supervisor"
                death.condemned = Exit.PROTOCOL, what
                return code
            detail.append("parked after its signal, which is its return code; killed by the supervisor")
            return -seen.fault.signal
        if code is None:
            raise ChildProcessError(TAKEN)
        if death.held and (seen.fault is None or code != -seen.fault.signal):
            name = seen.fault.name if seen.fault else "a fatal signal"
            raise ValueError(f"it was held for {name}, but came to its end before, with return code {code}")
    return code


def _await_stop(process: Process) -> None:
    """Wait until every thread has stopped, but not for ever: one may be in uninterruptible sleep."""
    end = time.monotonic() + _STOP_DEADLINE
    # waitid(2) would tell of the whole group at once, but only of our own children.
    with contextlib.suppress(FileNotFoundError):  # it ended, and was reaped
        while not (states(process.pid) <= _AT_REST or process.ended):
            if time.monotonic() > end:
                raise ValueError("it did not stop: somebody continues it, or it is in uninterruptible sleep")
            time.sleep(0.0002)


def _look(death: Death, seen: _Seen) -> None:
    """Everything that /proc has, within a few milliseconds."""
    pid = death.process.pid
    calls: dict[int, SystemCall | None] = {}
    with _step(death, "maps", _MAY_LOOK):
        seen.maps = read_maps(pid)
    with _step(death, "system calls"):
        calls = current_calls(pid)
    if death.held:
        with _step(death, "signal frame", _MAY_LOOK) as detail:
            seen.frame = read_signal_frame(pid, calls, seen.maps)
            if seen.frame is None:
                detail.append("no signal frame found on any thread")
    if death.condemned or seen.frame:  # whatever else is found
        death.findings.tell(_ending(death, None, seen.fault, (death.kills, death.kills))[0])
    if seen.frame:
        with _step(death, "callers", _MAY_LOOK) as detail:
            seen.native, ended = native_stack(pid, seen.maps, seen.frame)
            detail.append(f"{len(seen.native)} frames of the crashed thread, for want of pystack's")
            detail += [f"ended: {ended}"] if ended else []
    with _step(death, "threads", _MAY_LOOK):
        seen.threads = observe.thread_list(pid, calls, seen.maps)
    with _step(death, "memory and limits"):
        seen.memory, seen.limits = sizes(pid), observe.limits(pid)


def _look_closely(death: Death, seen: _Seen, *, in_haste: str) -> None:
    """What takes a helper, unless that has to be left out."""
    key = crash_key(seen.fault, _threads(seen))
    refusal = in_haste or FAMILIAR.refusal(key)
    if seen.fault and was_sent(seen.fault, death.process.pid):
        # Nor does it wait for a helper who is to know whether it was killed.
        refusal = refusal or "another process sent its signal, which its stacks do not explain"
    if not refusal:
        with TURNS.turn() as refusal:
            if not refusal:
                FAMILIAR.count(key)  # whatever comes of it: what fails at one crash fails at its equals
                _unwind(death, seen)
    if refusal:
        death.steps.append(Step("stacks (pystack)", ok=False, detail=f"left out: {refusal}"))


def _unwind(death: Death, seen: _Seen) -> None:
    pid = death.process.pid
    if seen.frame:
        with _step(death, "call to nowhere", _MAY_LOOK) as detail:
            if mend_null_call(pid, seen.maps, seen.frame):
                detail.append("the saved program counter was set to the caller's, for the unwinder")
            else:
                detail.append("none")
    with _step(death, "stacks (pystack)", _MAY_TRACE):
        taken = take_stacks(pid)
        seen.stacks, seen.build_ids = taken.threads, taken.build_ids
        if taken.error:
            refused = taken.refused and not death.process.ended  # the kernel refuses what has ended, too
            kind = ImportError if taken.missing else PermissionError if refused else ValueError
            raise kind(taken.error)


def _evidence(death: Death, seen: _Seen, code: int | None) -> Evidence:
    frame = seen.frame
    fault = seen.fault or (None if death.condemned else fault_of(code))
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
        maps=observe.records(seen.maps, seen.build_ids),
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
    death: Death, code: int | None, fault: Fault | None, kills: tuple[dict[str, int], dict[str, int]]
) -> tuple[Exit, str]:
    if death.drain.over_memory and not (death.condemned and death.condemned[0] == Exit.HANG):
        return Exit.OOM, "resident memory went over the cell's limit; killed by the supervisor"
    if death.drain.stopped and not (death.condemned and death.condemned[0] != Exit.HANG):
        return Exit.KILLED, "another process had stopped it (SIGSTOP); killed by the supervisor"
    return death.condemned or classify(code, fault, death.phase, kills, death.process.pid)


def _threads(seen: _Seen) -> list[Thread]:
    """What /proc knows of each thread, with pystack's stacks, or else what was found of the crashed one's."""
    stacks = {thread.tid: thread for thread in seen.stacks}
    threads = []
    for thread in seen.threads or seen.stacks:
        stack = stacks.get(thread.tid, thread)
        crashed = seen.frame is not None and thread.tid == seen.frame.tid
        native = stack.native or (seen.native if crashed else [])
        threads.append(msgspec.structs.replace(thread, crashed=crashed, native=native, python=stack.python))
    return threads
