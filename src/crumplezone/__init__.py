"""A crumple zone for llama.cpp: decode in a supervised child, survive its crashes, keep the evidence.

Names are loaded when they are first used: a cell, which needs none of them, starts faster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crumplezone.workers.batch import Batch as Batch
    from crumplezone.workers.decoder import Decoder as Decoder
    from crumplezone.workers.embedding import Embeddings as Embeddings
    from crumplezone.workers.jobs import Stream as Stream
    from crumplezone.workers.llama import Llama as Llama
    from crumplezone.workers.llama_objects import LlamaGrammar as LlamaGrammar
    from crumplezone.workers.llama_objects import LlamaPromptLookupDecoding as LlamaPromptLookupDecoding
    from crumplezone.workers.llama_objects import LlamaRAMCache as LlamaRAMCache
    from crumplezone.workers.llama_objects import LogitsProcessorList as LogitsProcessorList
    from crumplezone.workers.llama_objects import StoppingCriteriaList as StoppingCriteriaList
    from crumplezone.workers.model import embedded_model as embedded_model
    from crumplezone.workers.results import Completion as Completion
    from crumplezone.workers.results import Result as Result
    from crumplezone.workers.results import Rung as Rung
    from crumplezone.workers.safe import SafeBatchProcessor as SafeBatchProcessor

_HOMES = {
    "Batch": "batch",
    "Completion": "results",
    "Decoder": "decoder",
    "Embeddings": "embedding",
    "Llama": "llama",
    "LlamaGrammar": "llama_objects",
    "LlamaPromptLookupDecoding": "llama_objects",
    "LlamaRAMCache": "llama_objects",
    "LogitsProcessorList": "llama_objects",
    "StoppingCriteriaList": "llama_objects",
    "Result": "results",
    "Rung": "results",
    "SafeBatchProcessor": "safe",
    "Stream": "jobs",
    "embedded_model": "model",
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
