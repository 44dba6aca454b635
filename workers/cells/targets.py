"""What the cells and zygotes of each kind run. Named as strings: nobody imports `workers.native`."""

from __future__ import annotations

from typing import Literal

Kind = Literal["decode", "embed", "text", "width", "llama"]
Seed = Literal["context", "llama"]

TARGETS: dict[Kind, str] = {
    "decode": "crumplezone.workers.native.decode_cell:DecodeCell",
    "embed": "crumplezone.workers.native.embed_cell:EmbedCell",
    "text": "crumplezone.workers.native.text.cell:TextCell",
    "width": "crumplezone.workers.native.width_cell:WidthCell",
    "llama": "crumplezone.workers.native.llama.cell:LlamaCell",
}
"""Tests plant a poisoned cell here, and nowhere else."""

SEEDS: dict[Seed, str] = {
    "context": "crumplezone.workers.native.model:preload",
    "llama": "crumplezone.workers.native.llama.seed:preload",
}
"""What a zygote loads: the model of a `CellConfig`, or that of a ``llama_cpp.Llama``."""
