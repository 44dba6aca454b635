"""A crumple zone for llama.cpp: decode in a supervised child, survive its crashes, keep the evidence.

Names are loaded when they are first used: a cell, which needs none of them, starts faster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crumplezone.workers.batch.batch import Batch as Batch
    from crumplezone.workers.batch.results import Result as Result
    from crumplezone.workers.batch.results import Rung as Rung
    from crumplezone.workers.decoder import Decoder as Decoder
    from crumplezone.workers.embed.embedder import Embeddings as Embeddings
    from crumplezone.workers.generate.completion import Completion as Completion
    from crumplezone.workers.generate.jobs import Stream as Stream
    from crumplezone.workers.ladder.safe_batch import SafeBatchProcessor as SafeBatchProcessor
    from crumplezone.workers.llama.llama import Llama as Llama
    from crumplezone.workers.llama.objects import LlamaGrammar as LlamaGrammar
    from crumplezone.workers.llama.objects import LlamaPromptLookupDecoding as LlamaPromptLookupDecoding
    from crumplezone.workers.llama.objects import LlamaRAMCache as LlamaRAMCache
    from crumplezone.workers.llama.objects import LogitsProcessorList as LogitsProcessorList
    from crumplezone.workers.llama.objects import StoppingCriteriaList as StoppingCriteriaList
    from crumplezone.workers.model.file import embedded_model as embedded_model

_HOMES = {
    "Batch": "batch.batch",
    "Completion": "generate.completion",
    "Decoder": "decoder",
    "Embeddings": "embed.embedder",
    "Llama": "llama.llama",
    "LlamaGrammar": "llama.objects",
    "LlamaPromptLookupDecoding": "llama.objects",
    "LlamaRAMCache": "llama.objects",
    "LogitsProcessorList": "llama.objects",
    "StoppingCriteriaList": "llama.objects",
    "Result": "batch.results",
    "Rung": "batch.results",
    "SafeBatchProcessor": "ladder.safe_batch",
    "Stream": "generate.jobs",
    "embedded_model": "model.file",
}

__all__ = [
    "Batch",
    "Completion",
    "Decoder",
    "Embeddings",
    "Llama",
    "LlamaGrammar",
    "LlamaPromptLookupDecoding",
    "LlamaRAMCache",
    "LogitsProcessorList",
    "Result",
    "Rung",
    "SafeBatchProcessor",
    "StoppingCriteriaList",
    "Stream",
    "embedded_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"crumplezone.workers.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'crumplezone' has no attribute {name!r}")
