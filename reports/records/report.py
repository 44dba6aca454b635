"""The crash report: what `report.json` holds. Everything is optional but identity and exit.

Addresses and registers are hexadecimal strings: JSON readers elsewhere lose 64-bit integers.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec

SCHEMA_VERSION = 1
Setting = int | float | bool | str | None | list[float]
"""A parameter of a model or context."""


class Exit(StrEnum):
    """How a cell ended."""

    SIGNAL = "signal"  # a fatal signal raised by native code: SIGSEGV, SIGBUS, SIGFPE, SIGILL, ...
    ABORT = "abort"  # SIGABRT: GGML_ASSERT, std::terminate, glibc's heap checks
    HANG = "hang"  # no reply within the deadline; killed by the supervisor
    OOM = "oom"  # killed for memory, by its limit or by the kernel
    KILLED = "killed"  # a signal from a stranger, or an exit status that somebody else took
    NATIVE_EXIT = "native_exit"  # exit(n) called by native code in the middle of a request
    FAILED_START = "failed_start"  # never became ready, for no reason above
    PROTOCOL = "protocol"  # alive, but closed its socket or sent what cannot be decoded; killed
    NON_FINITE = "non_finite"  # returned 0, but its logits or embeddings hold NaN or infinity; killed


class VerdictKind(StrEnum):
    """Whose fault a crash is, as far as the ladder and a replay have shown."""

    BATCH_ONLY = "batch-only"  # the safe path cured it: the sequences crash together, not alone
    INPUT = "input"  # a sequence crashes alone too
    FLAKY = "flaky"  # the native path passed when it was repeated, each time or now and then
    ENVIRONMENT = "environment"  # out of memory, a stranger's kill, or a cell that never became ready


class Outcome(StrEnum):
    """What one rung did with one job."""

    OK = "ok"
    CRASHED = "crashed"
    REFUSED = "refused"  # a return code or an error, the cell lives
    SKIPPED = "skipped"  # preflight knew that it would crash


class Frame(msgspec.Struct, frozen=True, omit_defaults=True):
    """One frame of a stack, innermost first. Native frames have an offset, Python frames a line."""

    symbol: str = ""
    module: str = ""  # native: path of the ELF file
    build_id: str = ""
    offset: str = ""  # native: offset into the ELF file's address space, hexadecimal
    file: str = ""
    line: int = 0


class Thread(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thread at the time of the crash."""

    tid: int
    name: str = ""
    crashed: bool = False
    doing: str = ""  # "futex", "read", or "running" outside the kernel
    pc: str = ""  # where: "libc.so.6+0x8a1c0"
    native: list[Frame] = []
    python: list[Frame] = []


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fatal signal."""

    signal: int
    name: str  # "SIGSEGV"
    code: int | None = None
    code_name: str = ""  # "SEGV_MAPERR"
    address: str | None = None  # the address that faulted
    access: str = ""  # read, write or exec (page faults)
    trap: str = ""  # "#PF"
    sender_pid: int | None = None  # for signals sent by a process
    sender_uid: int | None = None


class Assertion(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why the process aborted."""

    text: str
    source: str  # "ggml", "terminate" or "glibc"
    file: str = ""
    line: int = 0


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """Provenance: one step of gathering evidence, and whether it worked."""

    name: str
    ok: bool
    ms: float = 0.0
    detail: str = ""
    remedy: str = ""  # what would allow a step that was refused


class Mapping(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of /proc/PID/maps."""

    start: str  # hexadecimal
    end: str
    perms: str
    offset: str = "0x0"
    path: str = ""
    build_id: str = ""


class Sample(msgspec.Struct, frozen=True):
    """What the cell used at one moment."""

    ms: float  # before the end, so the last is near 0
    rss: int  # bytes
    cpu: float  # seconds of processor time since it started


class Phase(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of the flight recorder: what the cell did, in its own words."""

    name: str  # "validate", "build", "decode", "copy", "sample", ...
    count: int = 0  # tokens, rows or bytes, as the phase counts
    ms: float = 0.0  # its beginning, before the end of the cell
    took: float | None = None  # milliseconds; None: it had not ended


class Evidence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was read from a held or dead cell."""

    exit: Exit
    pid: int
    phase: str = "call"  # "start", "call" or "idle"; "run" of a program under `exec` or pytest
    returncode: int | None = None  # as in subprocess: -n for signal n
    fault: Fault | None = None
    assertion: Assertion | None = None
    registers: dict[str, str] = {}
    code_bytes: str = ""  # sixteen bytes at the program counter, hexadecimal
    stack_bytes: str = ""  # from the stack pointer up, hexadecimal
    threads: list[Thread] = []
    maps: list[Mapping] = []
    memory: dict[str, int] = {}  # /proc/PID/status: "VmRSS", "VmPeak", ... in bytes
    limits: dict[str, str] = {}  # /proc/PID/limits, the soft ones: {"Max stack size": "8388608 bytes"}
    samples: list[Sample] = []  # oldest first
    flight: list[Phase] = []  # oldest first
    kernel_kills: dict[str, list[int]] = {}  # counters of OOM kills: [at the start, at the end]
    faulthandler: str = ""
    stderr_tail: str = ""
    log_tail: list[str] = []
    peak_rss: int | None = None  # bytes
    detail: str = ""
    steps: list[Step] = []


class Generating(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence in the middle of `Decoder.generate`: all that is needed to do it again."""

    seq_id: int
    tokens: list[int]  # the prompt and what had been delivered
    max_tokens: int  # still to come
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int = 0
    n_prompt: int = 0  # of the tokens, those of the prompt; 0: all (and in reports before 0.3)
    min_tokens: int = 0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    samplers: tuple[str, ...] = (
        "penalties",
        "dry",
        "top_n_sigma",
        "top_k",
        "typical_p",
        "top_p",
        "min_p",
        "xtc",
        "temperature",
    )
    grammar: str = ""
    grammar_lazy: bool = False
    grammar_triggers: tuple[str, ...] = ()
    stops: list[str] = []
    stop_tokens: list[int] = []
    logprobs: int = -1
    prompt_logprobs: bool = False


class Held(msgspec.Struct, frozen=True):
    """What the memory held of one sequence: tokens and their positions (parallel lists)."""

    seq_id: int
    tokens: list[int]
    positions: list[int]


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """The batch that was being decoded, token by token (parallel lists of equal length)."""

    tokens: list[int]
    positions: list[int]
    seq_ids: list[int]
    outputs: list[bool]
    operation: str = "decode"  # decode, process, encode, embed or generate
    chunk: int = 0  # most tokens per native call; 0: all in one
    embeddings: bool = False  # whether hidden states were asked for
    generating: list[Generating] = []  # for generate, which starts from more than this batch
    shared: dict[str, list[int]] = {}  # by index: the further sequences of a token that belongs to several
    nulls: list[str] = []  # fields of llama_batch that were NULL: "pos", "seq_id[3]", ...
    n_embd: int = 0  # the batch had vectors of this size instead of tokens; they are not kept
    held: list[Held] = []  # what the memory held before, if it was made of plain tokens
    cut: int = 0  # tokens left out of the middle, as the report would have been too large
    passes: list[int] = []  # tokens of each compute pass ("ubatch") that llama.cpp cuts it into
    held_more: bool = False  # it held something else too: copies, shifts, saved states, vectors


class ModelRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """The model file."""

    path: str
    size: int | None = None  # bytes
    sha256: str = ""
    description: str = ""


class LadderStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """One rung tried for one job."""

    rung: str  # native, safe or token
    outcome: Outcome
    sequences: list[int] = []
    detail: str = ""
    ms: float = 0.0


class Environment(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where it happened."""

    versions: dict[str, str] = {}  # crumplezone, llama-cpp-python, llama.cpp, python, kernel
    cpu: str = ""
    cpu_flags: list[str] = []
    system_info: str = ""  # llama_print_system_info()
    variables: dict[str, str] = {}  # environment variables that llama.cpp and its runtimes read


class Signature(msgspec.Struct, frozen=True, omit_defaults=True):
    """What makes two crashes the same."""

    id: str  # SHA-256 of version, fault class and key, hexadecimal
    fault_class: str  # "SIGSEGV", "abort", "hang", "oom", ...
    key: list[str] = []  # the normalised assertion, or up to three normalised frames; "...": cut short
    title: str = ""  # for people: "SIGSEGV in llama_context::encode"
    confidence: str = "high"  # "low": made of Python frames only, or of nothing but the class
    version: int = 1  # of the algorithm
    place: str = ""  # the innermost frame that counts: "libllama.so+0x22daa0 BUILD-ID", if both are known


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose fault it is, and what that rests on."""

    kind: VerdictKind
    because: str  # "every sequence got its result on the rung safe"


class Replay(msgspec.Struct, frozen=True, omit_defaults=True):
    """The recorded batch run again in fresh cells."""

    at: str  # UTC, ISO 8601
    runs: int
    crashed: int
    same: int  # of those that crashed, how many with the same signature
    versions: dict[str, str] = {}
    refused: int = 0  # neither crashed nor passed


class Minimal(msgspec.Struct, frozen=True, omit_defaults=True):
    """The smallest batch and context found that still crash with the same signature."""

    batch: BatchRecord
    context: dict[str, Setting]
    at: str  # UTC, ISO 8601
    tests: int  # how many candidates were run


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One crash. ``id`` is also the name of its directory in the store."""

    id: str
    crashed_at: str  # UTC, ISO 8601
    evidence: Evidence
    written_at: str = ""
    schema_version: int = SCHEMA_VERSION
    rung: str = "native"  # the rung that crashed
    batch: BatchRecord | None = None
    context: dict[str, Setting] = {}
    model: ModelRecord | None = None
    environment: Environment = Environment()
    ladder: list[LadderStep] = []
    result: str = ""  # how the job ended: "cured by safe", "sequence 3 quarantined", ...
    blamed: list[int] = []  # sequences shown to crash alone
    caller: list[Frame] = []  # the supervisor's Python stack at the call
    command: list[str] = []  # of a program: its arguments, the first is its name
    signature: Signature | None = None
    verdict: Verdict | None = None  # None: nothing has shown it
    replays: list[Replay] = []
    minimal: Minimal | None = None
    redacted: bool = False
    same_as: str = ""  # in a storm: the id of the full report that this one only counts towards


# Written by `msgspec.json.format`, one number a line. No string of JSON holds a line feed.
_NUMBERS = re.compile(rb"\[(?>\n +(?:-?[\d.eE+-]+|true|false|null),?)++\n *\]")


def encode(report: Report) -> bytes:
    """Encode a report as indented JSON, UTF-8, each list of numbers on one line.

    Raises:
        UnicodeEncodeError: It holds what UTF-8 does not have, see `utf8`.
    """
    indented = msgspec.json.format(msgspec.json.encode(report), indent=1)
    return _NUMBERS.sub(lambda found: found[0].translate(None, b" \n"), indented)


def utf8(report: Report) -> Report:
    r"""A report that can be encoded, with ``\udc80`` for the byte 0x80.

    Paths, arguments and variables are bytes that need not be UTF-8, see `os.fsdecode`.
    """
    try:
        msgspec.json.encode(report)
    except UnicodeEncodeError:
        return msgspec.convert(_escaped(msgspec.to_builtins(report)), Report)
    return report


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {_escaped(name): _escaped(each) for name, each in value.items()}
    return value


def decode(data: bytes) -> Report:
    """Decode `report.json`.

    Raises:
        msgspec.DecodeError: It is not JSON, or not a report (`msgspec.ValidationError`).
    """
    return msgspec.json.decode(data, type=Report)
