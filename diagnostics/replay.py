"""Ask a recorded crash again: the same batch in fresh cells. No report is written of what they die of."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil

from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, InputError, ModelError, UsageError
from crumplezone.errors import check_integer as check
from crumplezone.reports import schema
from crumplezone.reports.schema import BatchRecord, Evidence, Held, Outcome, Report, Signature, Verdict
from crumplezone.reports.signature import sign
from crumplezone.reports.verdict import verdict_after
from crumplezone.workers.calls import Ask, Limits, RefusedError
from crumplezone.workers.columns import LLAMA_MAX_SEQ, Columns
from crumplezone.workers.embed_protocol import EmbedConfig
from crumplezone.workers.embed_runner import EmbedRunner
from crumplezone.workers.generation import STEPS
from crumplezone.workers.incident import environment
from crumplezone.workers.model import check_file, describe
from crumplezone.workers.protocol import BESIDE, CellConfig, Join
from crumplezone.workers.results import Sampling, check_sampling
from crumplezone.workers.runner import Runner

RUNS_MAX = 1000
TOKENS_MAX = 2**20
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}")
_NULL = re.compile(rf"pos|n_seq_id|seq_id|logits|seq_id\[({_INDEX.pattern})\]")
_INT32 = (-(2**31), 2**31 - 1)
_CONTEXT = {
    "n_ctx": (1, 2**24),  # llama.cpp clears this much memory before it looks at anything
    "n_batch": (1, _INT32[1]),
    "n_ubatch": (1, _INT32[1]),
    "n_seq_max": (1, LLAMA_MAX_SEQ),
    "n_threads": (1, 512),
    "n_gpu_layers": (-1, 2**20),
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


@dataclass(frozen=True)
class Run:
    """One repetition.

    Attributes:
        outcome: ``CRASHED``, ``REFUSED`` (a return code or an error) or ``OK``.
        detail: What it was refused with.
        evidence: Of the crash.
        signature: Of the crash.
        same: Whether it is the recorded crash.
    """

    outcome: Outcome
    detail: str = ""
    evidence: Evidence | None = None
    signature: Signature | None = None
    same: bool = False


@dataclass(frozen=True)
class Replayed:
    """What the repetitions showed.

    Attributes:
        replay: For the report.
        runs: One by one.
        verdict: Whose fault it is now known to be, or None.
        notes: How this machine differs from where it crashed, as far as that matters.
    """

    replay: schema.Replay
    runs: list[Run]
    verdict: Verdict | None
    notes: list[str]


def replay(
    report: Report, runs: int = 3, model: Path | None = None, deadline: float | None = 300.0
) -> Replayed:
    """Run a recorded batch again, each time in a fresh cell.

    Args:
        report: A crash; untrusted.
        runs: How often.
        model: The model file, if it is not where it was.
        deadline: Seconds until a native call counts as hung, or None.

    Raises:
        InputError: The report holds a number that may not be sent.
        UsageError: The report does not hold what a replay needs.
        ModelError: The model file is missing, or cannot be loaded.
    """
    check("runs", runs, 1, RUNS_MAX)
    recipe = read_recipe(report)
    path, notes = find_model(report, model)
    config = msgspec.structs.replace(recipe.config, model=str(path))
    done, versions = [], environment(None).versions
    for _ in range(runs):
        with contextlib.closing(new_runner(config, deadline)) as runner:
            done.append(run(runner, recipe.batch, report))
            if recipe.batch:
                versions = environment(runner.info).versions
    outcomes = [each.outcome for each in done]
    summary = schema.Replay(
        at=dt.datetime.now(dt.UTC).isoformat(),
        runs=runs,
        crashed=outcomes.count(Outcome.CRASHED),
        same=sum(each.same for each in done),
        versions=versions,
        refused=outcomes.count(Outcome.REFUSED),
    )
    verdict = verdict_after(report, summary)
    return Replayed(summary, done, verdict, notes + _other_versions(report, versions))


def new_runner(config: CellConfig, deadline: float | None) -> Runner | EmbedRunner:
    """A runner that keeps its crashes to itself and leaves this machine the memory that others use."""
    limits = Limits(deadline, psutil.virtual_memory().available)
    if isinstance(config, EmbedConfig):
        return EmbedRunner(config, limits, reporter=None)
    return Runner(config, limits, reporter=None)


def run(runner: Runner | EmbedRunner, batch: BatchRecord | None, report: Report) -> Run:
    """Send a batch once (None: load the model) and compare its crash, if it is one, with the recorded one.

    Raises:
        ModelError: The model or the context could not be made, and a batch was to be sent.
    """
    try:
        if batch is None:
            runner.start()
        elif isinstance(runner, EmbedRunner):
            _embed(runner, batch)
        elif batch.operation == "generate":
            _generate(runner, batch)
        else:
            encode = batch.operation == "encode"
            ask = Ask(logits=not encode, embeddings=encode or batch.embeddings, encode=encode)
            for place, held in enumerate(batch.held):
                runner.send(_held_columns(held), Ask(logits=False), runner.n_batch, fresh=place == 0)
            runner.send(columns_of(batch), ask, batch.chunk, fresh=not batch.held)
    except CellDied as died:
        return crashed(died.incident.evidence.result(), report)
    except (RefusedError, CellRefused) as refused:
        return Run(Outcome.REFUSED, str(refused))
    except CrumplezoneError as refused:
        if batch is None:
            return Run(Outcome.REFUSED, str(refused))
        raise
    return Run(Outcome.OK)


def columns_of(batch: BatchRecord) -> Columns:
    """A recorded batch as it was sent."""
    ids = sequences_of(batch)
    return Columns(
        tokens=np.array(batch.tokens, np.int32),
        embd=None,
        positions=np.array(batch.positions, np.int32),
        n_seq_id=np.array([len(each) for each in ids], np.int32),
        seq_ids=np.array([seq_id for each in ids for seq_id in each], np.int32),
        outputs=np.array(batch.outputs, np.bool_),
        nulls=frozenset(batch.nulls),
    )


def sequences_of(batch: BatchRecord) -> list[list[int]]:
    """The sequences of each token of a recorded batch. One of none has the id -1, and no more of them."""
    shared = [batch.shared.get(str(i)) for i in range(len(batch.seq_ids))]
    return [
        [] if first == -1 and more == [] else [first, *(more or [])]
        for first, more in zip(batch.seq_ids, shared, strict=True)
    ]


def _embed(runner: EmbedRunner, batch: BatchRecord) -> None:
    """The native call of an embedding, in the context that it had."""
    assert isinstance(runner.given, EmbedConfig)
    columns = columns_of(batch)
    rows = range(len(columns.sequences))
    runner.embed(runner.given, columns, np.empty((len(rows), runner.info.n_embd), np.float32), rows)


def _held_columns(held: Held) -> Columns:
    n = len(held.tokens)
    return Columns(
        tokens=np.array(held.tokens, np.int32),
        embd=None,
        positions=np.array(held.positions, np.int32),
        n_seq_id=np.ones(n, np.int32),
        seq_ids=np.full(n, held.seq_id, np.int32),
        outputs=np.zeros(n, np.bool_),
    )


def crashed(evidence: Evidence, report: Report) -> Run:
    """A run that crashed. The recorded crash is signed anew: its signature may be older, or missing."""
    signature = sign(msgspec.structs.replace(report, evidence=evidence, signature=None))
    same = signature.id == sign(report).id
    return Run(Outcome.CRASHED, "", evidence, signature, same)


def native_calls(batch: BatchRecord) -> int:
    """How many native calls a replay of `generate` makes: for what was there, and as many as were lost."""
    n_tokens = sum(len(each.tokens) for each in batch.generating)
    return math.ceil(n_tokens / min(batch.chunk, BESIDE)) + len(batch.generating) + STEPS


def sampling_of(each: schema.Generating) -> Sampling:
    """How the tokens of a sequence were drawn."""
    return Sampling(**{field.name: getattr(each, field.name) for field in dataclasses.fields(Sampling)})


def _generate(runner: Runner, batch: BatchRecord) -> None:
    """Prefill every sequence that was in flight, and go on from its last delivered token."""
    joins = [
        (
            Join(each.seq_id, len(each.tokens), sampling_of(each)),
            np.array(each.tokens, np.int32),
        )
        for each in batch.generating
    ]
    running = {each.seq_id for each in batch.generating}
    for step in range(native_calls(batch)):
        generated = runner.generate(joins if step == 0 else [], 1, batch.chunk, reset=step == 0)
        running -= {progress.seq_id for progress in generated.progress if progress.finished}
        if not running:
            return


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
    if report.context.get("kv_unified", False) is not False:
        raise InputError("context.kv_unified", report.context["kv_unified"], "must be false, as in all cells")
    fields: dict[str, object] = {"model": report.model.path if report.model else "", **sizes}
    kind: type[CellConfig] = CellConfig
    if report.batch:
        _check_batch(report.batch)
        if report.batch.operation == "embed":
            kind, fields["pooling"] = EmbedConfig, report.context.get("pooling")
            if fields["pooling"] not in ("mean", "cls", "last"):
                raise InputError("context.pooling", fields["pooling"], "must be 'mean', 'cls' or 'last'")
    config = msgspec.convert(fields, kind)
    return Recipe(config, report.batch)


def find_model(report: Report, model: Path | None) -> tuple[Path, list[str]]:
    """Where the model is, and a note if it is another than the recorded one.

    Raises:
        ModelError: It is not there, or is no model.
    """
    record = report.model or schema.ModelRecord("")
    if model is None and not record.path:
        raise ModelError("(none)", "the report names no model file; --model PATH names one")
    path = (model or Path(record.path)).absolute()
    try:
        check_file(path)
    except (ModelError, OSError, ValueError) as error:  # a hostile path may hold a NUL or be too long
        if model:
            raise
        problem = str(error).removeprefix(f"model {path}: ")
        raise ModelError(str(path), f"{problem}. --model PATH names where the model is now") from error
    found = describe(str(path), "").sha256
    if record.sha256 and found != record.sha256:
        return path, [f"the model is another: SHA-256 {found}, the recorded one {ascii(record.sha256)[:80]}"]
    return path, []


def _other_versions(report: Report, now: dict[str, str]) -> list[str]:
    then = report.environment.versions.get("llama.cpp", "")
    if not then or then == now["llama.cpp"]:
        return []
    return [f"llama.cpp is another: {now['llama.cpp']}, the recorded one {ascii(then)[:80]}"]


def _check_batch(batch: BatchRecord) -> None:
    if batch.cut:
        raise UsageError(
            f"the report was too large and keeps this batch without {batch.cut} tokens of its middle: "
            "it cannot be sent again"
        )
    if batch.operation == "generate":
        _check_generating(batch)
        return
    if batch.operation not in {"decode", "encode", "embed"}:
        limit = "must be 'decode', 'encode', 'embed' or 'generate'"
        raise InputError("batch.operation", batch.operation, limit)
    for name in ("shared", "nulls", "held") if batch.operation == "embed" else ():  # only whole texts
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
    check("len(batch.held)", len(batch.held), 0, 0 if batch.operation == "encode" else LLAMA_MAX_SEQ)
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
        check_sampling(each, f"{field}.")
    check("number of tokens in batch.generating", sum(len(s.tokens) for s in batch.generating), 1, TOKENS_MAX)


def _check_int32(field: str, values: Sequence[int]) -> None:
    if values and not (_INT32[0] <= min(values) and max(values) <= _INT32[1]):
        for i, value in enumerate(values):
            check(f"{field}[{i}]", value, *_INT32, " (int32)")
