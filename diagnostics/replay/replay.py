"""Ask a recorded crash again: the same batch in fresh cells. No report is written of what they die of."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from crumplezone.diagnostics.replay.recipe import read_recipe
from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, ModelError
from crumplezone.errors import check_integer as check
from crumplezone.reports.analysis.same import is_same
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.analysis.verdict import verdict_after
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import (
    BatchRecord,
    Evidence,
    Held,
    Outcome,
    Report,
    Signature,
    Verdict,
)
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.process.cgroup import available_memory
from crumplezone.workers.batch.call import DecodeOptions, RefusedError
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.embed.client import EmbedClient
from crumplezone.workers.generate.flight.recovery import STEPS
from crumplezone.workers.incidents.environment import environment
from crumplezone.workers.model.file import check_file, describe
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.embed import EmbedConfig
from crumplezone.workers.protocol.generate.messages import BESIDE, OUTPUTS
from crumplezone.workers.protocol.generate.records import joining

RUNS_MAX = 1000


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
        with contextlib.closing(new_client(config, deadline)) as client:
            done.append(run(client, recipe.batch, report))
            if recipe.batch:
                versions = environment(client.info).versions
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


def new_client(config: CellConfig, deadline: float | None) -> DecodeClient | EmbedClient:
    """A client that keeps its crashes to itself and leaves this machine the memory that others use."""
    limits = Limits(deadline, available_memory())
    if isinstance(config, EmbedConfig):
        return EmbedClient(config, limits, reporter=None)
    return DecodeClient(config, limits, reporter=None)


def run(client: DecodeClient | EmbedClient, batch: BatchRecord | None, report: Report) -> Run:
    """Send a batch once (None: load the model) and compare its crash, if it is one, with the recorded one.

    Raises:
        ModelError: The model or the context could not be made, and a batch was to be sent.
    """
    try:
        if batch is None:
            client.start()
        elif isinstance(client, EmbedClient):
            _embed(client, batch)
        elif batch.operation == "generate":
            _generate(client, batch)
        else:
            encode, process = batch.operation == "encode", batch.operation == "process"
            ask = DecodeOptions(not encode, encode or batch.embeddings, encode=encode, process=process)
            for place, held in enumerate(batch.held):
                client.send(
                    _held_columns(held), DecodeOptions(logits=False), client.n_batch, fresh=place == 0
                )
            client.send(columns_of(batch), ask, batch.chunk, fresh=not batch.held)
    except CellDied as died:
        return crashed(Incident.of(died).evidence.result(), report)
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


def _embed(client: EmbedClient, batch: BatchRecord) -> None:
    """The native call of an embedding, in the context that it had."""
    assert isinstance(client.given, EmbedConfig)
    columns = columns_of(batch)
    rows = range(len(columns.sequences))
    client.embed(client.given, columns, np.empty((len(rows), client.info.n_embd), np.float32), rows)


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
    return Run(Outcome.CRASHED, "", evidence, signature, is_same(signature, sign(report)))


def native_calls(batch: BatchRecord) -> int:
    """How many native calls a replay of `generate` makes: for what was there, and as many as were lost."""
    n_tokens = sum(len(each.tokens) for each in batch.generating)
    return math.ceil(n_tokens / min(batch.chunk, BESIDE, OUTPUTS)) + len(batch.generating) + STEPS


def _generate(client: DecodeClient, batch: BatchRecord) -> None:
    """Prefill every sequence that was in flight, and go on from its last delivered token."""
    joins = [(joining(each), np.array(each.tokens, np.int32)) for each in batch.generating]
    running = {each.seq_id for each in batch.generating}
    for step in range(native_calls(batch)):
        generated = client.generate(joins if step == 0 else [], 1, batch.chunk, reset=step == 0)
        running -= {progress.seq_id for progress in generated.progress if progress.finished}
        if not running:
            return


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
