"""A recorded crash as a Python file that needs nothing but llama-cpp-python: for an upstream report.

Whatever comes from the report goes into the file as a number or escaped: a hostile report can neither add a
line nor name an encoding.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from crumplezone.diagnostics.replay import (
    Run,
    crashed,
    find_model,
    native_calls,
    read_recipe,
    sampling_of,
    sequences_of,
)
from crumplezone.errors import CellDied, CellRefused
from crumplezone.reports.schema import BatchRecord, Exit, Outcome, Report
from crumplezone.reports.signature import sign
from crumplezone.sandbox import script as cell
from crumplezone.sandbox.cell import Cell, CellSpec
from crumplezone.workers.embed_protocol import EmbedConfig
from crumplezone.workers.protocol import BESIDE, CellConfig
from crumplezone.workers.results import COLDEST

_WIDTH = 100
_VALUE_MAX = 200
_NON_FINITE = "NaN or infinity in output"
_WIDTHS = {
    "logits": "vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))",
    "embeddings": "model_n_embd_out(model)",
}

_LOAD = Template("""\
$imports
import llama_cpp

MODEL = sys.argv[1] if len(sys.argv) > 1 else $model

llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.n_gpu_layers = $n_gpu_layers
model = llama_cpp.llama_model_load_from_file(MODEL.encode(), params)
if not model:
    sys.exit(f"{MODEL}: llama.cpp cannot load it. Usage: {sys.argv[0]} MODEL.gguf")

params = llama_cpp.llama_context_default_params()
params.n_ctx = $n_ctx
params.n_batch = $n_batch
params.n_ubatch = $n_ubatch
params.n_seq_max = $n_seq_max
params.n_threads = params.n_threads_batch = $n_threads
params.kv_unified = False
params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_$pooling
context = llama_cpp.llama_init_from_model(model, params)
if not context:
    sys.exit("llama.cpp cannot make the context")
""")

_CALL = Template('''

def $operation(rows$parameter):
    """One native call."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, $width)
    batch.n_tokens = len(rows)
    for i, (token, position, $ids, output) in enumerate(rows):
        batch.token[i] = token
        batch.pos[i] = position
$sequences
        batch.logits[i] = output
$nulls    rc = llama_cpp.llama_$operation(context, batch)
    llama_cpp.llama_batch_free(batch)
    if rc:
        sys.exit(f"no crash: llama_$operation returned {rc}")
$finite

''')

_FINITE = Template("""\
    for i, row in enumerate(rows):
        if row[3]:
            values = llama_cpp.llama_get_$row
            if not all(map(math.isfinite, values[:$width])):
                sys.exit(f"$says {i}")
""")

_ONE = """\
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq_id"""

_SEVERAL = """\
        batch.n_seq_id[i] = len(seq_ids)
        for j, seq_id in enumerate(seq_ids):
            batch.seq_id[i][j] = seq_id"""

_NULLS = Template("""\
    if nulls:
$lines
""")

_HELD = Template("""\
# What the memory holds before, sequence by sequence: token, position, sequence, output
HELD = [
$held
]

for rows in HELD:
    for begin in range(0, len(rows), $n_batch):
        decode(rows[begin : begin + $n_batch])

""")

_WHOLE = Template("""\
# token, position, $ids, output
BATCH = [
$batch
]

${embeddings}$operation(BATCH$argument)
""")

_CHUNKS = Template("""\
# token, position, $ids, output
BATCH = [
$batch
]
CHUNK = $chunk  # tokens per native call

${embeddings}for begin in range(0, len(BATCH), CHUNK):
    $operation(BATCH[begin : begin + CHUNK])
""")

_GREEDY = '''\
def sample(row, seq_id):
    """The likeliest token."""
    return max(range(n_vocab), key=llama_cpp.llama_get_logits_ith(context, row).__getitem__)


'''

_SAMPLED = Template('''\
SAMPLING = {  # by sequence
$sampling
}


def sample(row, seq_id):
    """Draw by llama.cpp's own samplers. The noise depends on seed and position alone."""
    how = SAMPLING[seq_id]
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(name, *values):
        llama_cpp.llama_sampler_chain_add(chain, getattr(llama_cpp, f"llama_sampler_init_{name}")(*values))

    penalties = how["repeat_penalty"], how["frequency_penalty"], how["presence_penalty"]
    add("penalties", n_vocab, how["penalty_last_n"], *penalties)
    for token in SEQUENCES[seq_id]:
        llama_cpp.llama_sampler_accept(chain, token)
    if how["temperature"] < $coldest:
        add("greedy")
    else:
        digest = hashlib.blake2b(f"{how['seed']} {position[seq_id]}".encode(), digest_size=4).digest()
        add("top_k", how["top_k"])
        add("top_p", how["top_p"], 1)
        add("min_p", how["min_p"], 1)
        add("temp", how["temperature"])
        add("dist", min(int.from_bytes(digest, "little"), llama_cpp.LLAMA_DEFAULT_SEED - 1))
    token = llama_cpp.llama_sampler_sample(chain, context, row)
    llama_cpp.llama_sampler_free(chain)
    return token


''')

_GENERATE = Template("""\
# The sequences that were being continued, with their tokens so far, and how many more each may get.
SEQUENCES = {
$sequences
}
LEFT = {$left}
CHUNK = $chunk  # most tokens per native call
BESIDE = $beside  # most of them from prompts, if it also generates

vocab = llama_cpp.llama_model_get_vocab(model)
n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
pending = {seq_id: list(tokens) for seq_id, tokens in SEQUENCES.items()}
position = dict.fromkeys(SEQUENCES, 0)


${sample}for _ in range($calls):
    rows, ends = [], {}
    n = sum(len(tokens) == 1 for tokens in pending.values())  # sequences that generate: they come first
    room = min(CHUNK, n + BESIDE) if n else CHUNK
    for seq_id in sorted(pending, key=lambda seq_id: len(pending[seq_id]) > 1):
        tokens = pending[seq_id][: room - len(rows)]
        del pending[seq_id][: len(tokens)]
        for token in tokens:
            rows.append((token, position[seq_id], seq_id, 0))
            position[seq_id] += 1
        if tokens and not pending[seq_id]:
            rows[-1] = (*rows[-1][:3], 1)
            ends[seq_id] = len(rows) - 1
    decode(rows)
    for seq_id, row in ends.items():
        token = sample(row, seq_id)
        pending[seq_id] = [token]
        SEQUENCES[seq_id].append(token)
        LEFT[seq_id] -= 1
        if llama_cpp.llama_vocab_is_eog(vocab, token) or not LEFT[seq_id]:
            del pending[seq_id]
    if not pending:
        break
""")


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
    values = {name: getattr(recipe.config, name) for name in CellConfig.__struct_fields__}
    # "NONE": a row per token, whatever the file asks for
    pooling = recipe.config.pooling.upper() if isinstance(recipe.config, EmbedConfig) else "NONE"
    values["pooling"] = pooling
    values["model"] = ascii(str(model) if model else recipe.config.model)
    non_finite = batch is not None and report.evidence.exit == Exit.NON_FINITE
    sampled = batch is not None and _sampled(batch)
    imports = ["import hashlib\n"] * sampled + ["import math\n"] * non_finite + ["import sys\n"]
    text = _header(report) + "\n" + _LOAD.substitute(values, imports="".join(imports))
    if batch is None:
        return text + '\nprint("no crash")\n'
    operation = "encode" if batch.operation == "encode" else "decode"
    rows = "embeddings" if _has_embeddings(batch) else "logits"
    width = f"llama_cpp.llama_{_WIDTHS[rows]}"
    row = "embeddings_seq(context, row[2])" if pooling != "NONE" else f"{rows}_ith(context, i)"
    finite = _FINITE.substitute(row=row, width=width, says=_NON_FINITE) if non_finite else ""
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
        runner = Cell(CellSpec(cell.TARGET, cell.ScriptConfig(str(file), [str(path)])))
        try:
            status = runner.call(cell.RunScript(), cell.Finished, deadline).status
        except CellDied as died:
            return crashed(died.incident.evidence.result(), report)
        except CellRefused as refused:
            return Run(Outcome.REFUSED, f"{refused.kind}: {refused}")
        finally:
            runner.close()
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


def _call(batch: BatchRecord, operation: str, finite: str) -> str:
    """The function that makes a native call. It knows of shared tokens and NULL only where there are any."""
    lines = [f"        batch.{name} = None" for name in batch.nulls]
    return _CALL.substitute(
        operation=operation,
        parameter=", nulls=False" if lines else "",
        width=max(1, *map(len, sequences_of(batch))) if batch.shared else 1,
        ids="seq_ids" if batch.shared else "seq_id",
        sequences=_SEVERAL if batch.shared else _ONE,
        nulls=_NULLS.substitute(lines="\n".join(lines)) if lines else "",
        finite=finite,
    )


def _decode(batch: BatchRecord, operation: str, config: CellConfig) -> str:
    embeddings = _has_embeddings(batch)  # every token is an output then, as in the cell
    columns = (batch.tokens, batch.positions, _ids(batch), batch.outputs)
    rows = [f"({t}, {p}, {s}, {int(o or embeddings)})" for t, p, s, o in zip(*columns, strict=True)]
    shape = _CHUNKS if 0 < batch.chunk < len(rows) else _WHOLE
    return _held(batch, min(config.n_batch, config.n_ctx)) + shape.substitute(
        batch=_wrapped(rows),
        chunk=batch.chunk,
        operation=operation,
        embeddings="llama_cpp.llama_set_embeddings(context, True)\n" if embeddings else "",
        ids="sequences" if batch.shared else "sequence",
        argument=", nulls=True" if batch.nulls else "",
    )


def _ids(batch: BatchRecord) -> Sequence[int | tuple[int, ...]]:
    return [tuple(each) for each in sequences_of(batch)] if batch.shared else batch.seq_ids


def _held(batch: BatchRecord, n_batch: int) -> str:
    if not batch.held:
        return ""
    sequences = []
    for held in batch.held:
        seq_id = f"({held.seq_id},)" if batch.shared else held.seq_id
        rows = [f"({t}, {p}, {seq_id}, 0)" for t, p in zip(held.tokens, held.positions, strict=True)]
        sequences.append(f"    [\n{_wrapped(rows, 8)}\n    ],")
    return _HELD.substitute(held="\n".join(sequences), n_batch=n_batch)


def _generate(batch: BatchRecord) -> str:
    sampling = [f"    {s.seq_id}: {dataclasses.asdict(sampling_of(s))}," for s in batch.generating]
    sequences = [f"    {s.seq_id}: [\n{_wrapped(map(str, s.tokens), 8)}\n    ]," for s in batch.generating]
    return _GENERATE.substitute(
        sequences="\n".join(sequences),
        left=", ".join(f"{each.seq_id}: {each.max_tokens}" for each in batch.generating),
        chunk=batch.chunk,
        beside=BESIDE,
        calls=native_calls(batch),
        sample=_SAMPLED.substitute(sampling="\n".join(sampling), coldest=COLDEST)
        if _sampled(batch)
        else _GREEDY,
    )


def _sampled(batch: BatchRecord) -> bool:
    """Whether a token may be other than the likeliest."""
    return not all(sampling_of(each).plain for each in batch.generating)


def _wrapped(items: Iterable[str], indent: int = 4) -> str:
    """Items in lines that end with commas."""
    lines, line = [], ""
    for item in items:
        if line and len(line) + len(item) + 2 > _WIDTH - indent:
            lines.append(line)
            line = ""
        line += f"{' ' if line else ''}{item},"
    return "\n".join(" " * indent + line for line in [*lines, line])
