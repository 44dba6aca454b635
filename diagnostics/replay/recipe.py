"""What a report says of its batch and context, checked before anything of it is done again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from crumplezone.errors import InputError, UsageError
from crumplezone.errors import check_integer as check
from crumplezone.reports.records.report import BatchRecord, Report
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ
from crumplezone.workers.model.parameters import PARAMETERS, check_parameters
from crumplezone.workers.protocol.config import INT32_MAX, CellConfig
from crumplezone.workers.protocol.embed import EmbedConfig
from crumplezone.workers.protocol.generate.records import check_generating

TOKENS_MAX = 2**20
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}")
_NULL = re.compile(rf"pos|n_seq_id|seq_id|logits|seq_id\[({_INDEX.pattern})\]")
_INT32 = (-INT32_MAX - 1, INT32_MAX)
_CONTEXT = {
    "n_ctx": (1, 2**24),  # llama.cpp clears this much memory before it looks at anything
    "n_batch": (1, INT32_MAX),
    "n_ubatch": (1, INT32_MAX),
    "n_seq_max": (1, LLAMA_MAX_SEQ),
    "n_threads": (1, 512),
    "n_gpu_layers": (-1, 2**20),
}
_HAS_NOT = {  # what batches of an operation never have
    "decode": (),
    "process": ("shared", "nulls"),
    "encode": ("held",),
    "embed": ("shared", "nulls", "held"),  # only whole texts
}


@dataclass(frozen=True)
class Recipe:
    """All that is needed to do a crash again, read from a report and checked.

    Attributes:
        config: Model and context.
        batch: What is sent; None to only load the model.
    """

    config: CellConfig
    batch: BatchRecord | None


def read_recipe(report: Report) -> Recipe:
    """What a report says of its batch and context, with every number in bounds.

    A token or a sequence that llama.cpp does not have is no reason to refuse: it may be why it crashed.

    Raises:
        InputError: Names the first number that is out of bounds.
        UsageError: The report does not hold what a replay needs.
    """
    if report.redacted:
        raise UsageError(
            "this report is redacted: its token ids are hashes, so its batch cannot be sent again. "
            "Ask whoever wrote it to do so, or for a report written without redaction."
        )
    if report.batch is None and report.same_as:
        raise UsageError(
            f"this report only counts towards {report.same_as!a} (a storm): use that one instead"
        )
    if report.batch is None and report.evidence.phase != "start":
        raise UsageError("this report holds no batch: its cell was not decoding, there is nothing to repeat")
    sizes = {name: report.context.get(name) for name in _CONTEXT}
    for name, value in sizes.items():
        check(f"context.{name}", value, *_CONTEXT[name])
    given = {name: value for name, value in report.context.items() if name in PARAMETERS}  # if it names them
    check_parameters(given, "context.")
    fields: dict[str, object] = {"model": report.model.path if report.model else "", **sizes, **given}
    kind: type[CellConfig] = CellConfig
    if report.batch:
        _check_batch(report.batch)
        if report.batch.operation == "embed":
            kind, fields["pooling"] = EmbedConfig, report.context.get("pooling")
            if fields["pooling"] not in ("mean", "cls", "last"):
                raise InputError("context.pooling", fields["pooling"], "must be 'mean', 'cls' or 'last'")
    config = msgspec.convert(fields, kind)
    return Recipe(config, report.batch)


def _check_batch(batch: BatchRecord) -> None:
    if batch.cut:
        raise UsageError(
            f"the report was too large and keeps this batch without {batch.cut} tokens of its middle: "
            "it cannot be sent again"
        )
    if batch.operation == "generate":
        _check_generating(batch)
        return
    if batch.operation not in _HAS_NOT:
        limit = f"must be {', '.join(_HAS_NOT)} or generate"
        raise InputError("batch.operation", batch.operation, limit)
    for name in _HAS_NOT[batch.operation]:
        check(f"len(batch.{name})", len(getattr(batch, name)), 0, 0)
    n_tokens = len(batch.tokens)
    check("len(batch.tokens)", n_tokens, 1, TOKENS_MAX)
    check("batch.chunk", batch.chunk, 0, TOKENS_MAX)
    for name in ("positions", "seq_ids", "outputs"):
        if len(getattr(batch, name)) != n_tokens:
            limit = f"must be {n_tokens}, as there are tokens"
            raise InputError(f"len(batch.{name})", len(getattr(batch, name)), limit)
    for name in ("tokens", "positions", "seq_ids"):
        _check_int32(f"batch.{name}", getattr(batch, name))
    _check_unusual(batch, n_tokens)
    check("len(batch.held)", len(batch.held), 0, LLAMA_MAX_SEQ)
    for i, held in enumerate(batch.held):
        field = f"batch.held[{i}]"
        check(f"len({field}.tokens)", len(held.tokens), 1, TOKENS_MAX)
        check(f"len({field}.positions)", len(held.positions), len(held.tokens), len(held.tokens))
        check(f"{field}.seq_id", held.seq_id, *_INT32)
        _check_int32(f"{field}.tokens", held.tokens)
        _check_int32(f"{field}.positions", held.positions)


def _check_unusual(batch: BatchRecord, n_tokens: int) -> None:
    if batch.n_embd:
        raise UsageError("this batch had vectors instead of tokens: reports do not keep them")
    if batch.held_more:
        raise UsageError("the memory held copies, shifts or saved states: reports do not keep those")
    check("len(batch.shared)", len(batch.shared), 0, n_tokens)
    for index, seq_ids in batch.shared.items():
        if not _INDEX.fullmatch(index) or int(index) >= n_tokens:
            raise InputError("batch.shared", index, f"must be indices below {n_tokens}")
        check(f"len(batch.shared[{index}])", len(seq_ids), 0, LLAMA_MAX_SEQ)
        _check_int32(f"batch.shared[{index}]", seq_ids)
    for name in batch.nulls:
        if not _NULL.fullmatch(name):
            raise InputError("batch.nulls", name, "must be pos, n_seq_id, seq_id, logits or seq_id[INDEX]")
        if "[" in name and int(name[7:-1]) >= n_tokens:
            raise InputError("batch.nulls", name, f"must be an index below {n_tokens}")


def _check_generating(batch: BatchRecord) -> None:
    for name in ("shared", "nulls", "held"):  # of a batch that is sent as it is
        check(f"len(batch.{name})", len(getattr(batch, name)), 0, 0)
    check("len(batch.generating)", len(batch.generating), 1, LLAMA_MAX_SEQ)
    check("batch.chunk", batch.chunk, 1, TOKENS_MAX)
    seen = set()
    for i, each in enumerate(batch.generating):
        field = f"batch.generating[{i}]"
        check(f"{field}.seq_id", each.seq_id, *_INT32)
        if each.seq_id in seen:
            raise InputError(f"{field}.seq_id", each.seq_id, "must not come twice")
        seen.add(each.seq_id)
        check(f"len({field}.tokens)", len(each.tokens), 1, TOKENS_MAX)
        _check_int32(f"{field}.tokens", each.tokens)
        check_generating(each, field)
    check("number of tokens in batch.generating", sum(len(s.tokens) for s in batch.generating), 1, TOKENS_MAX)


def _check_int32(field: str, values: Sequence[int]) -> None:
    if values and not (_INT32[0] <= min(values) and max(values) <= _INT32[1]):
        for i, value in enumerate(values):
            check(f"{field}[{i}]", value, *_INT32, " (int32)")
