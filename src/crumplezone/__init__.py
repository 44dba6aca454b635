"""A crumple zone for llama.cpp: decode in a supervised child, survive its crashes, keep the evidence.

Names are loaded when they are first used: a cell, which needs none of them, starts faster.
The modules beside `errors` and `lowlevel` are private.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crumplezone import errors as errors
    from crumplezone import lowlevel as lowlevel
    from crumplezone.errors import BatchError as BatchError
    from crumplezone.errors import BatchFullError as BatchFullError
    from crumplezone.errors import CellDied as CellDied
    from crumplezone.errors import CellRefused as CellRefused
    from crumplezone.errors import ContextError as ContextError
    from crumplezone.errors import CrumplezoneError as CrumplezoneError
    from crumplezone.errors import InputError as InputError
    from crumplezone.errors import MemoryLostError as MemoryLostError
    from crumplezone.errors import ModelError as ModelError
    from crumplezone.errors import NotShownError as NotShownError
    from crumplezone.errors import PositionError as PositionError
    from crumplezone.errors import QueueFullError as QueueFullError
    from crumplezone.errors import ReportError as ReportError
    from crumplezone.errors import SequenceError as SequenceError
    from crumplezone.errors import SequenceIdError as SequenceIdError
    from crumplezone.errors import ShortageError as ShortageError
    from crumplezone.errors import TokenError as TokenError
    from crumplezone.errors import UsageError as UsageError
    from crumplezone.workers.batch.batch import Batch as Batch
    from crumplezone.workers.batch.results import Result as Result
    from crumplezone.workers.batch.results import Rung as Rung
    from crumplezone.workers.chat.answers.deltas import ChatDelta as ChatDelta
    from crumplezone.workers.chat.answers.deltas import ToolCallDelta as ToolCallDelta
    from crumplezone.workers.chat.stream import ChatChoice as ChatChoice
    from crumplezone.workers.chat.stream import ChatCompletion as ChatCompletion
    from crumplezone.workers.chat.stream import ChatStream as ChatStream
    from crumplezone.workers.decoder import Decoder as Decoder
    from crumplezone.workers.embed.embedder import Embeddings as Embeddings
    from crumplezone.workers.generate.requests.completion import Completion as Completion
    from crumplezone.workers.generate.requests.request import Request as Request
    from crumplezone.workers.generate.requests.stream import Stream as Stream
    from crumplezone.workers.ladder.safe_batch import SafeBatchProcessor as SafeBatchProcessor
    from crumplezone.workers.llama.llama import Llama as Llama
    from crumplezone.workers.llama.objects import LlamaGrammar as LlamaGrammar
    from crumplezone.workers.llama.objects import LlamaPromptLookupDecoding as LlamaPromptLookupDecoding
    from crumplezone.workers.llama.objects import LlamaRAMCache as LlamaRAMCache
    from crumplezone.workers.llama.objects import LogitsProcessorList as LogitsProcessorList
    from crumplezone.workers.llama.objects import StoppingCriteriaList as StoppingCriteriaList
    from crumplezone.workers.model.file import embedded_model as embedded_model
    from crumplezone.workers.observe.events import CellLost as CellLost
    from crumplezone.workers.observe.events import FirstToken as FirstToken
    from crumplezone.workers.observe.events import NewTokens as NewTokens
    from crumplezone.workers.observe.events import ReportWritten as ReportWritten
    from crumplezone.workers.observe.events import RequestAdmitted as RequestAdmitted
    from crumplezone.workers.observe.events import RequestFinished as RequestFinished
    from crumplezone.workers.observe.events import RequestQueued as RequestQueued
    from crumplezone.workers.observe.events import RequestResumed as RequestResumed
    from crumplezone.workers.observe.health import CellHealth as CellHealth
    from crumplezone.workers.observe.stats import Stats as Stats
    from crumplezone.workers.protocol.generate.messages import Logprob as Logprob
    from crumplezone.workers.protocol.text import SpecialTokens as SpecialTokens

    __version__: str

# What a type checker reads above, for Python; tests/architecture/test_public_names.py compares the two.
_NAMES = {
    "errors": (
        *("BatchError", "BatchFullError", "CellDied", "CellRefused", "ContextError", "CrumplezoneError"),
        *("InputError", "MemoryLostError", "ModelError", "NotShownError", "PositionError"),
        *(
            "QueueFullError",
            "ReportError",
            "SequenceError",
            "SequenceIdError",
            "ShortageError",
            "TokenError",
            "UsageError",
        ),
    ),
    "workers.batch.batch": ("Batch",),
    "workers.chat.answers.deltas": ("ChatDelta", "ToolCallDelta"),
    "workers.chat.stream": ("ChatChoice", "ChatCompletion", "ChatStream"),
    "workers.decoder": ("Decoder",),
    "workers.embed.embedder": ("Embeddings",),
    "workers.generate.requests.request": ("Request",),
    "workers.generate.requests.stream": ("Stream",),
    "workers.llama.llama": ("Llama",),
    "workers.llama.objects": (
        *("LlamaGrammar", "LlamaPromptLookupDecoding", "LlamaRAMCache"),
        *("LogitsProcessorList", "StoppingCriteriaList"),
    ),
    "workers.model.file": ("embedded_model",),
    "workers.protocol.text": ("SpecialTokens",),
    "workers.batch.results": ("Result", "Rung"),
    "workers.generate.requests.completion": ("Completion",),
    "workers.ladder.safe_batch": ("SafeBatchProcessor",),
    "workers.observe.events": (
        *("CellLost", "FirstToken", "NewTokens", "ReportWritten"),
        *("RequestAdmitted", "RequestFinished", "RequestQueued", "RequestResumed"),
    ),
    "workers.observe.health": ("CellHealth",),
    "workers.observe.stats": ("Stats",),
    "workers.protocol.generate.messages": ("Logprob",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("errors", "lowlevel")

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"crumplezone.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"crumplezone.{name}")
    if name == "__version__":
        from importlib import metadata

        return metadata.version("crumplezone")
    raise AttributeError(f"module 'crumplezone' has no attribute {name!r}")


def __dir__() -> list[str]:
    ours = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *_MODULES, "__version__", *ours})
