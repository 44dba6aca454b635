"""``crumplezone demo``: the main job on real weights, and a real crash."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from crumplezone.cli.output import is_quiet, to_type
from crumplezone.reports.formats import text
from crumplezone.reports.printable import printable
from crumplezone.reports.store.store import Store
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.results import Result
from crumplezone.workers.decoder import Decoder
from crumplezone.workers.model.file import embedded_model

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Once upon a time, in a village by the sea,",
    "To make a cup of tea, first",
    "The opposite of hot is",
    "A segmentation fault happens when",
    "The largest planet in the solar system is",
)


def show(model: Path | None, reports: Path | None) -> None:
    """Run the demo and print it.

    Raises:
        ModelError: The model is missing or cannot be loaded.
    """
    console = Console(highlight=False)
    path = model or embedded_model()
    with Decoder(path, n_seq_max=len(PROMPTS), preflight=False, reports=reports) as decoder:
        found = decoder.processes
        loader = (found["zygote"] or found["memory"])[0]
        loaded = f"{path.name}: {decoder.info.description}, loaded by process {loader}"
        console.print(Text(printable(loaded)))
        _generate(console, decoder)
        sequences = [decoder.tokenize(prompt) for prompt in PROMPTS]
        console.print("\nNow the same prompts through llama_encode, with preflight off.")
        start = time.perf_counter()
        result = decoder.encode(Batch.of(sequences))
        seconds = time.perf_counter() - start
        decoder.flush_reports()
    _embeddings(console, result, seconds)
    for report in result.reports:
        directory = Path(report)
        summary = text.summary(Store(directory.parent).read(directory.name))
        console.print(Panel(Text(summary), title="What happened", border_style="red"))
        console.print(f"Report: {report}", markup=False, soft_wrap=True)
        if not is_quiet():
            read = to_type(f"triage show {directory.name}", reports)
            console.print(f"Read it with: {read}", markup=False, soft_wrap=True)


def _generate(console: Console, decoder: Decoder) -> None:
    table = Table("prompt", "completion", "rung", title="Eight prompts in one native batch")
    start = time.perf_counter()
    tokens = 0
    for done in decoder.generate(PROMPTS, max_tokens=24):
        tokens += len(done.tokens)
        table.add_row(Text(str(done.prompt)), Text(printable(" ".join(done.text.split()))), done.rung)
    seconds = time.perf_counter() - start
    console.print(table)
    console.print(f"{tokens} tokens in {seconds:.1f} s")


def _embeddings(console: Console, result: Result, seconds: float) -> None:
    table = Table(
        "prompt", "embedding (last token)", "rung", title=f"The results, all the same, after {seconds:.1f} s"
    )
    for seq_id, prompt in enumerate(PROMPTS):
        row = result.embeddings(seq_id)
        numbers = ", ".join(f"{value:+.3f}" for value in row[:4])
        table.add_row(Text(prompt), f"[{numbers}, ...] ({len(row)})".replace("[", "\\["), result.rung(seq_id))
    console.print(table)
