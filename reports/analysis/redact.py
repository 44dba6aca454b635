"""A report without what is private: prompts, token ids, paths and the content of memory.

Redaction is an allow-list. Every field of every struct of the schema has a rule in `RULES`; a field without
one is left out, so what is added to the schema later does not leak before somebody has thought about it.

Tokens and lines of text become keyed hashes. Those of one store can be compared with each other, so batch
shapes, repeated tokens and repeated messages stay visible; without the key they cannot be guessed, as a plain
hash of a small integer could be.
"""

from __future__ import annotations

import bisect
import hashlib
import hmac
import re
from typing import Any, TypeVar

import msgspec

from crumplezone.reports.analysis.messages import base_name, is_own, parted, shorten_paths
from crumplezone.reports.analysis.signature import VERSION
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Report

_MAX_FOLDERS = 256

# Before what an error quotes, "cell 12: crashed" and "create_completion: cell 12: crashed" are ours.
_TOLD = re.compile(r"(?:\w+: )?(?:cell \d+: )?(?:(?!: )[^\"'`])*")

VARIABLES = re.compile(
    r"(?:CUDA|HIP|ROCR|GGML_VK)_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|HSA_OVERRIDE_GFX_VERSION"
    r"|GGML_(?:BACKEND_PATH|CUDA_\w+|METAL_\w+|NO_BACKTRACE|SCHED_DEBUG)"
    r"|OMP_\w+|GOMP_\w+|KMP_\w+|(?:MKL|OPENBLAS|BLIS)_NUM_THREADS"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_\w+|LANG|LC_ALL"
)
"""Settings of the runtimes. Others, such as LLAMA_API_KEY or HF_TOKEN, may be secrets."""


def redact(report: Report, key: bytes) -> Report:
    """Make a report that can be shown to strangers. One that is redacted already is returned as it is.

    What stays: how the cell ended, stacks, code bytes, batch shape, context, versions, and the signature, so
    that redacted reports group with the others. Its tokens are no token ids: it cannot be replayed.

    Args:
        report: Any report.
        key: `KEY_BYTES` random bytes, see `redaction_key`. The same key gives the same hashes.
    """
    if report.redacted:
        return report
    signed = report.signature
    if signed and signed.version != VERSION:  # those of version 1 quote what() of an exception
        signed = msgspec.structs.replace(signed, key=[], title=signed.fault_class)
        report = msgspec.structs.replace(report, signature=signed)
    return msgspec.structs.replace(_Redactor(report, key).struct(report), redacted=True)


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _Redactor:
    """One redaction. Its public methods are the rules that `RULES` names: each takes a field's value."""

    def __init__(self, report: Report, key: bytes) -> None:
        self._key = key
        ranges = (_range(each.start, each.end) for each in report.evidence.maps)
        self._ranges = sorted(each for each in ranges if each)
        self._folders = _odd_folders(report)

    def struct(self, value: _Struct) -> _Struct:
        """Rebuild a struct from the fields that have a rule."""
        rules = RULES[type(value)].items()
        kept = {name: getattr(self, rule)(getattr(value, name)) for name, rule in rules if rule != "drop"}
        return type(value)(**kept)

    def keep(self, value: Any) -> Any:
        return value

    def structs(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.struct(each) for each in value]
        return value if value is None else self.struct(value)

    def base(self, path: str) -> str:
        return base_name(path)

    def text(self, text: str) -> str:
        return shorten_paths(self._folders.sub("", text) if self._folders else text)

    def spoken(self, text: str) -> str:
        """The text of an abort. Its signature stays the same."""
        own, rest = parted(text)
        return f"{own}\n{self._hashed(rest)}" if rest.strip() else own

    def told(self, text: str) -> str:
        """A sentence of ours, which may end in the message of an exception."""
        found = _TOLD.match(text)
        end = found.end() if found else 0
        return self.text(text[:end]) + (self._hashed(text[end:]) if text[end:].strip() else "")

    def texts(self, texts: list[str]) -> list[str]:
        return [self.text(text) for text in texts]

    def table(self, table: dict[str, Any]) -> dict[str, Any]:
        return {self.text(k): self.text(v) if isinstance(v, str) else v for k, v in table.items()}

    def lines(self, text: str) -> str:
        return "\n".join(map(self._line, text.split("\n")))

    def entries(self, texts: list[str]) -> list[str]:
        return [self.lines(text) for text in texts]

    def tokens(self, tokens: list[int]) -> list[int]:
        """Positive numbers of 31 bits in the place of token ids."""
        hashes = (int.from_bytes(self._hash("token", str(token))[:8]) for token in tokens)
        return [number % (2**31 - 1) + 1 for number in hashes]

    def addresses(self, registers: dict[str, str]) -> dict[str, str]:
        """The registers that point into a mapping; the others may hold data."""
        return {name: value for name, value in registers.items() if self._is_mapped(value)}

    def variables(self, table: dict[str, str]) -> dict[str, str]:
        known = {name: value for name, value in table.items() if VARIABLES.fullmatch(name)}
        return {name: ":".join(map(base_name, value.split(":"))) for name, value in known.items()}

    def _line(self, line: str) -> str:
        return self.text(line) if not line or is_own(line) else self._hashed(line)

    def _hashed(self, text: str) -> str:
        return f"{self._hash('line', text).hex()[:12]} ({len(text)} characters)"

    def _is_mapped(self, value: str) -> bool:
        number = _number(value)
        place = bisect.bisect_right(self._ranges, number, key=lambda each: each[0]) - 1
        return place >= 0 and number < self._ranges[place][1]

    def _hash(self, kind: str, text: str) -> bytes:
        return hmac.digest(self._key, f"{kind}:{text}".encode("utf-8", "surrogatepass"), hashlib.sha256)


def _number(text: str) -> int:
    try:
        return int(text[:32], 16)
    except ValueError:
        return -1


def _range(start: str, end: str) -> tuple[int, int] | None:
    first, last = _number(start), _number(end)
    return (first, last) if 0 <= first < last else None


def _odd_folders(report: Report) -> re.Pattern[str] | None:
    """Directories that `shorten_paths` cannot see in a text, such as those with a space in their name."""
    evidence = report.evidence
    stacks = [
        report.caller,
        *(stack for thread in evidence.threads for stack in (thread.native, thread.python)),
    ]
    paths = {path for stack in stacks for frame in stack for path in (frame.file, frame.module)}
    paths |= {mapping.path for mapping in evidence.maps}
    paths |= {found.path for found in [report.model] if found}
    folders = {path.rpartition("/")[0] for path in paths if shorten_paths(path) != base_name(path)}
    longest_first = sorted(folders - {"", "."}, key=len, reverse=True)[:_MAX_FOLDERS]
    return (
        re.compile("|".join(rf"{re.escape(folder)}/+" for folder in longest_first)) if longest_first else None
    )


def _fields(**rules: str) -> dict[str, str]:
    return {field: rule for rule, fields in rules.items() for field in fields.split()}


RULES: dict[type[msgspec.Struct], dict[str, str]] = {
    schema.Frame: _fields(keep="build_id offset line", base="module file", text="symbol"),
    schema.Thread: _fields(keep="tid name crashed doing", base="pc", structs="native python"),
    schema.Fault: _fields(
        keep="signal name code code_name address access trap sender_pid", drop="sender_uid"
    ),
    schema.Assertion: _fields(keep="source line", base="file", spoken="text"),
    schema.Step: _fields(keep="name ok ms", text="detail remedy"),
    schema.Mapping: _fields(keep="start end perms offset build_id", base="path"),
    schema.Sample: _fields(keep="ms rss cpu"),
    schema.Phase: _fields(keep="name count ms took"),
    schema.Evidence: _fields(
        keep="exit pid phase returncode code_bytes memory limits peak_rss",
        structs="fault assertion threads maps samples flight steps",
        text="detail",
        table="kernel_kills",
        lines="faulthandler stderr_tail",
        entries="log_tail",
        addresses="registers",
        drop="stack_bytes",
    ),
    schema.Generating: _fields(
        keep="seq_id max_tokens temperature top_k top_p min_p seed "
        "repeat_penalty frequency_penalty presence_penalty penalty_last_n n_prompt min_tokens "
        "dynatemp_range dynatemp_exponent typical_p top_n_sigma xtc_probability xtc_threshold "
        "dry_multiplier dry_base dry_allowed_length dry_penalty_last_n mirostat_mode mirostat_tau "
        "mirostat_eta ignore_eos samplers grammar_lazy logprobs prompt_logprobs",
        tokens="tokens",
        drop="dry_sequence_breakers logit_bias grammar grammar_triggers stops stop_tokens",
    ),
    schema.Held: _fields(keep="seq_id positions", tokens="tokens"),
    schema.BatchRecord: _fields(
        keep="positions seq_ids outputs operation chunk embeddings shared nulls n_embd cut passes held_more",
        tokens="tokens",
        structs="generating held",
    ),
    schema.ModelRecord: _fields(keep="size sha256 description", base="path"),
    schema.LadderStep: _fields(keep="rung outcome sequences ms", told="detail"),
    schema.Environment: _fields(keep="cpu cpu_flags system_info", table="versions", variables="variables"),
    schema.Signature: _fields(keep="id fault_class confidence version", texts="key", text="title place"),
    schema.Verdict: _fields(keep="kind", text="because"),
    schema.Replay: _fields(keep="at runs crashed same refused", table="versions"),
    schema.Minimal: _fields(keep="at tests", structs="batch", table="context"),
    schema.Report: _fields(
        keep="id crashed_at written_at schema_version rung blamed redacted same_as",
        structs="evidence batch model environment ladder caller signature verdict replays minimal",
        table="context",
        told="result",
        entries="command",
    ),
}
"""The rule of each field of the schema: a method of `_Redactor`, or "drop"."""
