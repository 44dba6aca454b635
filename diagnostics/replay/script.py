"""A recorded crash as a Python file that needs nothing but llama-cpp-python: for an upstream report.

Whatever comes from the report goes into the file as a number or escaped: a hostile report can neither add a
line nor name an encoding.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from crumplezone.diagnostics.replay import templates
from crumplezone.diagnostics.replay.recipe import read_recipe
from crumplezone.diagnostics.replay.replay import (
    Run,
    crashed,
    find_model,
    native_calls,
    sequences_of,
)
from crumplezone.errors import CellDied, CellRefused
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import BatchRecord, Exit, Outcome, Report
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.child import script as cell
from crumplezone.workers.model.parameters import PARAMETERS
from crumplezone.workers.protocol.config import (
    CACHE_TYPES,
    DEVICES_MAX,
    FLASH_ATTENTION,
    LOAD_MODES,
    ROPE_SCALING,
    SPLIT_MODES,
    CellConfig,
    ModelFile,
)
from crumplezone.workers.protocol.embed import EmbedConfig
from crumplezone.workers.protocol.generate.messages import BESIDE
from crumplezone.workers.protocol.generate.records import joining
from crumplezone.workers.protocol.generate.sampling import COLDEST

_ENUMS: dict[str, dict[Any, int]] = {
    "type_k": CACHE_TYPES,
    "type_v": CACHE_TYPES,
    "flash_attn": FLASH_ATTENTION,
    "rope_scaling_type": ROPE_SCALING,
    "split_mode": SPLIT_MODES,
}
_FIELDS = {"flash_attn": "flash_attn_type"}  # where llama.cpp has another name
_ELSEWHERE = {"kv_unified", "use_mmap", "use_mlock"}
_WIDTH = 100
_VALUE_MAX = 200
_NON_FINITE = "NaN or infinity in output"
_WIDTHS = {
    "logits": "vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))",
    "embeddings": "model_n_embd_out(model)",
}


def script(report: Report, model: Path | None = None) -> str:
    """Write a Python file that does what crashed, with the native calls that were made.

    Args:
        report: A crash; untrusted.
        model: The model file that the script opens by default; None: the recorded one.

    Returns:
        Its text, ASCII.

    Raises:
        InputError: The report holds a number that may not be sent.
        UsageError: The report does not hold what it takes.
    """
    recipe = read_recipe(report)
    batch = recipe.batch
    values = recipe.config.parameters()
    # "NONE": a row per token, whatever the file asks for
    pooling = recipe.config.pooling.upper() if isinstance(recipe.config, EmbedConfig) else "NONE"
    values["pooling"] = pooling
    values["model"] = ascii(str(model) if model else recipe.config.model)
    non_finite = batch is not None and report.evidence.exit == Exit.NON_FINITE
    sampled = batch is not None and _sampled(batch)
    values["loading"], values["context"] = _unusual(recipe.config)
    process = batch is not None and batch.operation == "process"
    used = {
        "ctypes": process or sampled or "ctypes" in values["loading"],
        "math": non_finite,
        "sys": True,
    }
    imports = "".join(f"import {name}\n" for name, needed in used.items() if needed)
    text = _header(report) + "\n" + templates.LOAD.substitute(values, imports=imports)
    if batch is None:
        return text + '\nprint("no crash")\n'
    operation = batch.operation if batch.operation in ("encode", "process") else "decode"
    rows = "embeddings" if _has_embeddings(batch) else "logits"
    width = f"llama_cpp.llama_{_WIDTHS[rows]}"
    row = "embeddings_seq(context, row[2])" if pooling != "NONE" else f"{rows}_ith(context, i)"
    finite = templates.FINITE.substitute(row=row, width=width, says=_NON_FINITE) if non_finite else ""
    text += _call(batch, operation, finite)
    text += _generate(batch) if batch.generating else _decode(batch, operation, recipe.config)
    return text + 'print("no crash")\n'


def check(text: str, report: Report, model: Path | None = None, deadline: float | None = 300.0) -> Run:
    """Run a script in a cell, and compare its crash with the recorded one.

    Args:
        text: Of `script`.
        report: The same report.
        model: The model file, if it is not where it was.
        deadline: Seconds until the script counts as hung, or None.

    Raises:
        ModelError: The model file is missing.
    """
    path, _ = find_model(report, model)
    with tempfile.TemporaryDirectory(prefix="crumplezone-") as directory:
        file = Path(directory) / "crash.py"
        file.write_text(text, encoding="ascii")
        running = Cell(CellSpec(cell.TARGET, cell.ScriptConfig(str(file), [str(path)])))
        try:
            status = running.call(cell.RunScript(), cell.Finished, deadline).status
        except CellDied as died:
            return crashed(Incident.of(died).evidence.result(), report)
        except CellRefused as refused:
            return Run(Outcome.REFUSED, f"{refused.kind}: {refused}")
        finally:
            running.close()
    if status == 0:
        return Run(Outcome.OK)
    same = report.evidence.exit == Exit.NON_FINITE and str(status).startswith(_NON_FINITE)
    return Run(Outcome.REFUSED, str(status), same=same)


def _header(report: Report) -> str:
    """Comments. The first two lines are ours: there, a comment can declare an encoding (PEP 263)."""
    signature, versions, model = sign(report), report.environment.versions, report.model
    facts: dict[str, str] = {
        "crash": signature.title,
        "signature": signature.id,
        "seen": report.crashed_at,
        "model": f"{Path(model.path).name}, SHA-256 {model.sha256 or 'unknown'}" if model else "unknown",
        "cpu": report.environment.cpu,
        **{name: versions[name] for name in ("llama.cpp", "python", "kernel") if name in versions},
    }
    lines = [
        "# A crash of llama.cpp. This file needs nothing but llama-cpp-python:",
        "#",
        "#     python crash.py MODEL.gguf",
        "#",
        *(f"# {name + ':':<12}{_escaped(value)}" for name, value in facts.items() if value),
    ]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value[:_VALUE_MAX].encode("unicode_escape").decode("ascii")


def _has_embeddings(batch: BatchRecord) -> bool:
    return batch.embeddings or batch.operation == "encode"


def _unusual(config: CellConfig) -> tuple[str, str]:
    """Of the model and of the context: what is not the default. An older llama.cpp may not know all of it."""
    usual = {field.name: field.default for field in msgspec.structs.fields(CellConfig)}
    set_in: dict[bool, list[str]] = {True: [], False: []}
    for name in CellConfig.__struct_fields__:
        value = getattr(config, name)
        if name in PARAMETERS and value != usual[name] and name not in _ELSEWHERE:
            set_in[name in ModelFile.__struct_fields__].append(f"params.{_setting(name, value)}\n")
    mode = config.use_mmap, config.use_mlock
    if mode != (True, False):
        set_in[True].append(
            f"params.load_mode = {LOAD_MODES[mode]}  # use_mmap {mode[0]}, use_mlock {mode[1]}\n"
        )
    return "".join(set_in[True]), "".join(set_in[False])


def _setting(name: str, value: Any) -> str:
    if name in _ENUMS:
        return f"{_FIELDS.get(name, name)} = {_ENUMS[name][value]}  # {value}"
    if name == "tensor_split":
        return f"{name} = (ctypes.c_float * {DEVICES_MAX})(*{list(value)})"
    return f"{name} = {value!r}"


def _call(batch: BatchRecord, operation: str, finite: str) -> str:
    """The function that makes a native call. It knows of shared tokens and NULL only where there are any."""
    if operation == "process":
        return templates.PROCESS.substitute(finite=finite)
    lines = [f"        batch.{name} = None" for name in batch.nulls]
    return templates.CALL.substitute(
        operation=operation,
        parameter=", nulls=False" if lines else "",
        width=max(1, *map(len, sequences_of(batch))) if batch.shared else 1,
        ids="seq_ids" if batch.shared else "seq_id",
        sequences=templates.SEVERAL if batch.shared else templates.ONE,
        nulls=templates.NULLS.substitute(lines="\n".join(lines)) if lines else "",
        finite=finite,
    )


def _decode(batch: BatchRecord, operation: str, config: CellConfig) -> str:
    embeddings = _has_embeddings(batch)  # every token is an output then, as in the cell
    columns = (batch.tokens, batch.positions, _ids(batch), batch.outputs)
    rows = [f"({t}, {p}, {s}, {int(o or embeddings)})" for t, p, s, o in zip(*columns, strict=True)]
    shape = templates.CHUNKS if 0 < batch.chunk < len(rows) else templates.WHOLE
    return _held(batch, operation, min(config.n_batch, config.n_ctx)) + shape.substitute(
        batch=_wrapped(rows),
        chunk=batch.chunk,
        operation=operation,
        embeddings="llama_cpp.llama_set_embeddings(context, True)\n" if embeddings else "",
        ids="sequences" if batch.shared else "sequence",
        argument=", nulls=True" if batch.nulls else "",
    )


def _ids(batch: BatchRecord) -> Sequence[int | tuple[int, ...]]:
    return [tuple(each) for each in sequences_of(batch)] if batch.shared else batch.seq_ids


def _held(batch: BatchRecord, operation: str, n_batch: int) -> str:
    if not batch.held:
        return ""
    sequences = []
    for held in batch.held:
        seq_id = f"({held.seq_id},)" if batch.shared else held.seq_id
        rows = [f"({t}, {p}, {seq_id}, 0)" for t, p in zip(held.tokens, held.positions, strict=True)]
        sequences.append(f"    [\n{_wrapped(rows, 8)}\n    ],")
    return templates.HELD.substitute(held="\n".join(sequences), operation=operation, n_batch=n_batch)


def _generate(batch: BatchRecord) -> str:
    joins = [joining(each) for each in batch.generating]
    sampling = [f"    {join.seq_id}: {dataclasses.asdict(join.sampling)!a}," for join in joins]
    sequences = [f"    {s.seq_id}: [\n{_wrapped(map(str, s.tokens), 8)}\n    ]," for s in batch.generating]
    return templates.GENERATE.substitute(
        sequences="\n".join(sequences),
        left=", ".join(f"{each.seq_id}: {each.max_tokens}" for each in batch.generating),
        chunk=batch.chunk,
        beside=BESIDE,
        calls=native_calls(batch),
        sample=templates.SAMPLED.substitute(
            sampling="\n".join(sampling),
            prompts=", ".join(f"{join.seq_id}: {join.n_prompt}" for join in joins),
            coldest=COLDEST,
        )
        if _sampled(batch)
        else templates.GREEDY,
    )


def _sampled(batch: BatchRecord) -> bool:
    """Whether a token may be other than the likeliest."""
    return not all(joining(each).sampling.plain for each in batch.generating)


def _wrapped(items: Iterable[str], indent: int = 4) -> str:
    """Items in lines that end with commas."""
    lines, line = [], ""
    for item in items:
        if line and len(line) + len(item) + 2 > _WIDTH - indent:
            lines.append(line)
            line = ""
        line += f"{' ' if line else ''}{item},"
    return "\n".join(" " * indent + line for line in [*lines, line])
