"""What people read: the report as plain text.

Most strings of a report come from the crashed child. `printable` keeps them from writing to the terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from crumplezone.reports.analysis.frames import interrupted, meaningful
from crumplezone.reports.analysis.stack import crashed_thread, frame_name, signal_name, top_frame
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import Evidence, Exit, Frame, Report

# Caps keep a hostile report from becoming an endless page.
_MAX_FRAMES = 128
_MAX_THREADS = 64
_MAX_SEQUENCES = 64
_MAX_REGISTERS = 128
_MAX_MODULES = 128
_MAX_PHASES = 16
_MAX_SAMPLES = 8
_STACK_BYTES = 128
_EDGE_TOKENS = 4
# Of /proc/PID/status and /proc/PID/limits, what tells of a crash; report.json has them all.
_SIZES = ("VmPeak", "VmSize", "VmHWM", "VmRSS", "VmSwap", "VmStk")
_LIMITS = ("Max address space", "Max data size", "Max stack size", "Max locked memory", "Max processes")

_ENDINGS = {
    Exit.HANG: "The cell did not reply within its deadline and was killed",
    Exit.OOM: "The cell was killed for memory",
    Exit.KILLED: "The cell was killed from outside",
    Exit.NATIVE_EXIT: "Native code called exit() in the middle of a request",
    Exit.FAILED_START: "The cell never became ready",
    Exit.NON_FINITE: "The cell answered with NaN or infinity and was killed",
    Exit.PROTOCOL: "The cell closed its socket or sent what cannot be decoded, and was killed",
}
_OF_PROGRAMS = {
    Exit.HANG: "The program did not end in time and was killed",
    Exit.OOM: "The program was killed for memory",
    Exit.KILLED: "The program was killed from outside",
    Exit.NATIVE_EXIT: "Native code called exit()",
}


_PHASES = {"start": "starting", "idle": "waiting for work"}
_COMMAND_MAX = 200  # characters of a command line in a summary


def summary(report: Report) -> str:
    """One paragraph: what happened, where, on which rung, and how it ended."""
    frame = top_frame(report)
    where = f" in {frame_name(frame)}" if frame else ""
    parts = [f"{_ending(report.evidence, signal_name(report))}{where}.", f"It was {_doing(report)}."]
    if report.result:
        parts.append(f"Result: {report.result}.")
    return printable(" ".join(parts))


def _doing(report: Report) -> str:
    if report.evidence.phase == "run":
        command = shlex.join(report.command) or "a program"
        return f"running {command if len(command) <= _COMMAND_MAX else command[:_COMMAND_MAX] + '...'}"
    return f"{_PHASES.get(report.evidence.phase, 'serving a request')} on the {report.rung} rung"


def render(report: Report) -> str:
    """The whole of report.txt."""
    lines = [f"Crash report {printable(report.id)}", f"Crashed at {printable(report.crashed_at)}"]
    for title, body in sections(report):
        lines += ["", title, "-" * len(title), *(body or ["(not recorded)"])]
    return "\n".join(lines) + "\n"


def sections(report: Report) -> Iterator[tuple[str, list[str]]]:
    """The parts of report.txt: title and printable lines, none for what is not recorded."""
    for title, section in _SECTIONS:
        yield title, list(section(report))


def _ending(evidence: Evidence, signal: str) -> str:
    if evidence.exit is Exit.ABORT and evidence.assertion:
        found = evidence.assertion
        place = f" at {found.file}:{found.line}" if found.file else ""
        return f"Aborted: {found.text}{place}"
    if evidence.exit in (Exit.SIGNAL, Exit.ABORT):
        name = signal or ("SIGABRT" if evidence.exit is Exit.ABORT else "A fatal signal")
        return name + _fault_details(evidence)
    detail = f" ({evidence.detail})" if evidence.detail else ""
    cause = f" by {signal}" if evidence.exit is Exit.KILLED and signal else ""
    if evidence.exit is Exit.NATIVE_EXIT and evidence.returncode is not None:
        cause = f" with code {evidence.returncode}"
    of_programs = _OF_PROGRAMS if evidence.phase == "run" else {}
    return f"{of_programs.get(evidence.exit, _ENDINGS[evidence.exit])}{cause}{detail}"


def _fault_details(evidence: Evidence) -> str:
    fault = evidence.fault
    if fault is None:
        return ""
    code = f" ({fault.code_name})" if fault.code_name else ""
    access = f"{fault.access} of address" if fault.access else "address"
    return f"{code}, {access} {fault.address}" if fault.address is not None else code


def _pairs(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Lines of "name: value", without those that are not known."""
    return [f"{printable(name)}: {printable(str(value))}" for name, value in pairs if value not in (None, "")]


def _block(text: str) -> list[str]:
    return (
        [printable(line.expandtabs(4)) for line in text.rstrip().replace("\r\n", "\n").split("\n")]
        if text
        else []
    )


def _more(shown: int, total: int) -> list[str]:
    return [f"... and {total - shown} more"] if total > shown else []


def _frames(frames: list[Frame]) -> list[str]:
    lines = [f"#{i:<3} {frame_name(frame)}" for i, frame in enumerate(frames[:_MAX_FRAMES])]
    return lines + _more(_MAX_FRAMES, len(frames))


def _fault(report: Report) -> list[str]:
    evidence, fault, assertion = report.evidence, report.evidence.fault, report.evidence.assertion
    pairs: list[tuple[str, object]] = [("exit", evidence.exit.value), ("return code", evidence.returncode)]
    if fault:
        pairs += [("signal", f"{fault.name} ({fault.signal})"), ("code", fault.code_name or fault.code)]
        pairs += [("address", fault.address), ("access", fault.access), ("trap", fault.trap)]
        pairs += [("sent by process", fault.sender_pid), ("of user", fault.sender_uid)]
    if assertion:
        place = f"{assertion.file}:{assertion.line}" if assertion.file else ""
        pairs += [("assertion", assertion.text), ("from", assertion.source), ("at", place)]
    pairs += [("code bytes", evidence.code_bytes), ("detail", evidence.detail)]
    pairs += [("program", shlex.join(report.command))]
    pairs += [("process", evidence.pid), ("phase", evidence.phase), ("peak memory, bytes", evidence.peak_rss)]
    return _pairs(pairs)


def _native(report: Report) -> list[str]:
    thread = crashed_thread(report)
    return _frames(interrupted(thread.native)) if thread else []


def _python(report: Report) -> list[str]:
    crashed = crashed_thread(report)
    lines = _frames(crashed.python) if crashed else []
    if not lines and report.evidence.faulthandler:
        lines = ["From faulthandler:", *_block(report.evidence.faulthandler)]
    others = [thread for thread in report.evidence.threads if thread is not crashed]
    if others:
        lines.append("Other threads:")
    for thread in others[:_MAX_THREADS]:
        # One that only waits in a runtime, as idle workers do, is shown where it waits.
        native = next(chain(meaningful(thread.native), thread.native), None)
        inner = [native, next(iter(thread.python), None)]
        stacks = " < ".join(frame_name(frame) for frame in inner if frame) or "??"
        doing = printable(f" [{thread.doing}]") if thread.doing else ""
        lines.append(f"  {thread.tid} {printable(thread.name)}{doing}: {stacks}")
    lines += _more(_MAX_THREADS, len(others))
    if report.caller:
        lines += ["Caller, in the supervisor:", *_frames(report.caller)]
    return lines


def _registers(report: Report) -> list[str]:
    registers = list(report.evidence.registers.items())
    cells = [printable(f"{name:<7} {value:<18}") for name, value in registers[:_MAX_REGISTERS]]
    lines = ["  ".join(cells[i : i + 4]).rstrip() for i in range(0, len(cells), 4)]
    lines += _more(_MAX_REGISTERS, len(registers))
    stack = report.evidence.stack_bytes[: 2 * _STACK_BYTES]
    rows = [stack[i : i + 64] for i in range(0, len(stack), 64)]
    return lines + [printable(f"stack+{32 * n:<3} {row}") for n, row in enumerate(rows)]


def _modules(report: Report) -> list[str]:
    """Those in the stack of the crashed thread; report.json has every mapping."""
    thread = crashed_thread(report)
    wanted = {frame.module for frame in thread.native} if thread else set()
    found = {
        m.path: f"{m.start:<14} {m.build_id or '(no build-id)'} {m.path}"
        for m in report.evidence.maps
        if "x" in m.perms and m.path in wanted
    }
    return [printable(line) for line in list(found.values())[:_MAX_MODULES]] + _more(_MAX_MODULES, len(found))


def _memory(report: Report) -> list[str]:
    evidence = report.evidence
    lines = _pairs((f"{name}, bytes", evidence.memory.get(name)) for name in _SIZES)
    lines += _pairs((name, evidence.limits.get(name)) for name in _LIMITS)
    for name, counts in list(evidence.kernel_kills.items())[:_MAX_SAMPLES]:
        lines.append(printable(f"OOM kills counted by {name}: {' then '.join(map(str, counts[:2]))}"))
    for sample in evidence.samples[-_MAX_SAMPLES:]:
        lines.append(f"{sample.ms:9.1f} ms before: {sample.rss >> 20} MB, {sample.cpu:.2f} s of processor")
    return lines


def _flight(report: Report) -> list[str]:
    lines = []
    for phase in report.evidence.flight[-_MAX_PHASES:]:
        took = "did not end" if phase.took is None else f"took {phase.took:.3f} ms"
        lines.append(printable(f"{phase.ms:12.3f} ms before: {phase.name:<12} {phase.count:>9}  {took}"))
    return lines


def _verdict(report: Report) -> list[str]:
    signature, verdict, minimal = report.signature, report.verdict, report.minimal
    pairs: list[tuple[str, object]] = []
    if signature:
        pairs += [
            ("signature", signature.id),
            ("title", signature.title),
            ("confidence", signature.confidence),
        ]
    if verdict:
        pairs += [("verdict", verdict.kind.value), ("because", verdict.because)]
    pairs += [("counts towards", report.same_as), ("redacted", "yes" if report.redacted else "")]
    lines = _pairs(pairs)
    for replay in report.replays[-_MAX_SAMPLES:]:
        same = f", {replay.same} with this signature" if replay.crashed else ""
        lines.append(printable(f"replayed {replay.at}: crashed {replay.crashed} of {replay.runs}{same}"))
    if minimal:
        owners = [g.seq_id for g in minimal.batch.generating for _ in g.tokens] or minimal.batch.seq_ids
        shape = f"{len(owners)} tokens in {len(set(owners))} sequences"
        lines.append(printable(f"minimised {minimal.at}: {shape}, after {minimal.tests} tests"))
    return lines


def _edges(tokens: list[int]) -> str:
    if len(tokens) <= 2 * _EDGE_TOKENS:
        return " ".join(map(str, tokens))
    first, last = tokens[:_EDGE_TOKENS], tokens[-_EDGE_TOKENS:]
    return f"{_edges(first)} ... {_edges(last)}"


def _batch(report: Report) -> list[str]:
    batch = report.batch
    if batch is None:
        return []
    columns = (batch.seq_ids, batch.tokens, batch.positions, batch.outputs)
    lines = [f"{printable(batch.operation)} of {len(batch.tokens)} tokens"]
    if batch.cut:
        lines.append(f"The record is cut: {batch.cut} of its tokens are left out of its middle.")
    if len({len(column) for column in columns}) > 1:
        lines.append("The record is damaged: its lists differ in length; what they share is shown.")
    sequences: dict[int, list[tuple[int, int, bool]]] = {}
    for seq_id, *row in zip(*columns, strict=False):
        sequences.setdefault(seq_id, []).append((row[0], row[1], bool(row[2])))
    for seq_id, rows in list(sequences.items())[:_MAX_SEQUENCES]:
        positions = [position for _, position, _ in rows]
        wanted = sum(output for _, _, output in rows)
        span = f"positions {min(positions)}..{max(positions)}"
        tokens = _edges([token for token, _, _ in rows])
        lines.append(f"sequence {seq_id}: n={len(rows)}, {span}, outputs {wanted}, tokens {tokens}")
    lines += _more(_MAX_SEQUENCES, len(sequences))
    return lines + _pairs([("tokens per compute pass", _edges(batch.passes))])


def _ladder(report: Report) -> list[str]:
    lines = []
    for step in report.ladder:
        sequences = f" sequences {_edges(step.sequences)}" if step.sequences else ""
        detail = f": {step.detail}" if step.detail else ""
        lines.append(
            printable(f"{step.rung:<7} {step.outcome.value:<8} {step.ms:9.1f} ms{sequences}{detail}")
        )
    blamed = _edges(report.blamed)
    return lines + _pairs([("sequences that crash alone", blamed), ("result", report.result)])


def _model(report: Report) -> list[str]:
    model = report.model
    if model is None:
        return []
    sizes = ("size, bytes", model.size)
    return _pairs([("path", model.path), sizes, ("sha256", model.sha256), ("description", model.description)])


def _environment(report: Report) -> list[str]:
    found = report.environment
    flags = " ".join(found.cpu_flags)
    pairs: list[tuple[str, object]] = [*found.versions.items(), ("cpu", found.cpu), ("cpu flags", flags)]
    return _pairs([*pairs, ("llama.cpp system info", found.system_info)])


def _stderr(report: Report) -> list[str]:
    lines = _block(report.evidence.stderr_tail)
    if log := report.evidence.log_tail:
        told = [entry for entry in log if not entry.startswith("DEBUG ")]  # of a graph there are hundreds
        debug = len(log) - len(told)
        lines.append(f"Log, less {debug} records of DEBUG (report.json has them):" if debug else "Log:")
        lines += [line for entry in told for line in _block(entry)]
    return lines


def _provenance(report: Report) -> list[str]:
    lines = []
    for step in report.evidence.steps:
        detail = f": {step.detail}" if step.detail else ""
        lines.append(printable(f"{'ok' if step.ok else 'failed':<6} {step.ms:9.1f} ms  {step.name}{detail}"))
        if step.remedy:
            lines.append(printable(f"{'':<20}what would allow it: {step.remedy}"))
    return lines + _pairs([("written at", report.written_at)])


_SECTIONS: tuple[tuple[str, Callable[[Report], Iterable[str]]], ...] = (
    ("Summary", lambda report: [summary(report)]),
    ("Verdict", _verdict),
    ("Fault", _fault),
    ("Native stack", _native),
    ("Python stack", _python),
    ("Registers", _registers),
    ("Modules", _modules),
    ("Memory", _memory),
    ("Flight recorder", _flight),
    ("Batch", _batch),
    ("Ladder", _ladder),
    ("Context", lambda report: _pairs(report.context.items())),
    ("Model", _model),
    ("Environment", _environment),
    ("stderr tail", _stderr),
    ("Provenance", _provenance),
)
