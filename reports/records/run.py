"""The record of a diagnostic run, what its `run.json` holds: which cases were run, and how each ended."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from crumplezone.reports.records.llama import CacheType, FlashAttention, Pooling
from crumplezone.reports.records.report import Environment, ModelRecord, Signature

Path = Literal["decode", "process", "encode", "embed", "safe"]


class Ending(StrEnum):
    """How one case of a run ended."""

    PASS = "pass"  # noqa: S105 - no password
    MISMATCH = "mismatch"  # the native text is not that of the safe path
    CRASH = "crash"  # a fatal signal, an abort, an exit, or NaN in what it returned
    HANG = "hang"  # a native call, or the start of a cell, took longer than the deadline
    OOM = "oom"  # over the case's memory limit, or killed by the kernel for memory
    REFUSED = "refused"  # by our validation or by llama.cpp's return code; the cell lived
    ERROR = "error"  # of the infrastructure: nothing is known of the case


class News(StrEnum):
    """What a case's ending is against the baseline."""

    EXPECTED = "expected"  # it passed, as it should
    KNOWN = "known"  # it failed, as the baseline says
    NEW = "new"  # it failed, and the baseline does not say so
    FIXED = "fixed"  # it passed, and the baseline says that it fails
    UNKNOWN = "unknown"  # an error of the infrastructure: it is neither


class Shape(msgspec.Struct, frozen=True):
    """What is asked of llama.cpp in one case; names and meanings are those of ``llama_context_params``."""

    path: Path = "decode"  # llama_decode, llama_process, llama_encode, pooled embeddings, SafeBatchProcessor
    sequences: int = 1
    tokens: int = 1  # over all sequences
    n_batch: int = 2048
    n_ubatch: int = 512
    kv_unified: bool = False
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    flash_attn: FlashAttention = "auto"
    n_threads: int = 2
    pooling: Pooling = "model"


class CaseRecord(msgspec.Struct, frozen=True):
    """One case and its ending."""

    id: str  # the same in every run: "SmolLM2-135M-Q4_1 encode 3x10"
    model: str  # the file's name, as `RunRecord.models` has its path
    shape: Shape
    ending: Ending
    news: News = News.EXPECTED
    detail: str = ""  # what it died of, what differs, why it was refused
    signature: Signature | None = None  # of a crash, a hang or an OOM
    report: str = ""  # id of the crash report, in `reports/` beside `run.json`
    ms: float = 0.0
    peak_rss: int | None = None  # bytes
    text: str = ""  # what the native path generated
    safe_text: str = ""  # what the safe path generated, where it is another

    @property
    def title(self) -> str:
        """Of its signature; empty without one."""
        return self.signature.title or self.signature.fault_class if self.signature else ""

    @property
    def more(self) -> str:
        """The detail without the title, which it begins with."""
        return self.detail.removeprefix(self.title).lstrip("; ")


class Fixed(msgspec.Struct, frozen=True):
    """A failure of the baseline that the run should have met, and did not."""

    signature: str  # empty: a case that was expected to fail without one
    title: str  # of the signature, or how the case was expected to end
    cases: list[str]  # that it was expected in, and that passed


class RunRecord(msgspec.Struct, frozen=True):
    """One diagnostic run."""

    started_at: str  # UTC, ISO 8601
    planned: int  # cases of this run or shard
    cases: list[CaseRecord] = []
    ended_at: str = ""
    complete: bool = False  # False: it was interrupted
    shard: str = ""  # "2/4"
    models: list[ModelRecord] = []
    environment: Environment = Environment()
    baseline: str = ""  # its file
    fixed: list[Fixed] = []
    schema_version: int = 1


def decode(data: bytes) -> RunRecord:
    """Decode `run.json`.

    Raises:
        msgspec.DecodeError: It is not JSON, or not the record of a run (`msgspec.ValidationError`).
    """
    return msgspec.json.decode(data, type=RunRecord)


def encode(run: RunRecord) -> bytes:
    """As indented JSON, UTF-8."""
    return msgspec.json.format(msgspec.json.encode(run), indent=1)


def grouped(cases: Iterable[CaseRecord]) -> list[list[CaseRecord]]:
    """Cases with one signature together, each of the others alone, in the order in which they come."""
    groups: dict[str, list[CaseRecord]] = {}
    for place, case in enumerate(cases):
        groups.setdefault(case.signature.id if case.signature else f"case {place}", []).append(case)
    return list(groups.values())
