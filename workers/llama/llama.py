"""`Llama`: ``llama_cpp.Llama`` 0.3.36 with its native half in a supervised cell."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from crumplezone.errors import (
    CrumplezoneError,
    InputError,
    ModelError,
    ShortageError,
    UsageError,
    check_integer,
)
from crumplezone.reports.store.store import directory_of
from crumplezone.workers.cells.factory import Cells, Start
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.llama.calls.client import decoded
from crumplezone.workers.llama.calls.session import Session
from crumplezone.workers.llama.completions import Completions, Criteria, Processors, task_of
from crumplezone.workers.llama.facts import Facts
from crumplezone.workers.llama.objects import LlamaState, capacity_of, lookup_of
from crumplezone.workers.model.file import check_file, located
from crumplezone.workers.model.hub import download
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import INT32_MAX, Token
from crumplezone.workers.protocol.llama import LlamaConfig

_OWN = ("reports", "deadline", "memory_limit", "redact", "start", "spares")
_DEFAULT_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
_KEPT = ["model_path", "tensor_split", "kv_overrides", "last_n_tokens_size", "lora_base", "lora_scale"]
_KEPT += ["lora_path", "spm_infill", "verbose", "n_threads", "n_threads_batch"]
_POINTER = "is a native object in the cell's memory"
ABSENT = {
    "ctx": f"{_POINTER}; use n_ctx(), eval() and save_state()",
    "model": f"{_POINTER}; use metadata, n_vocab(), n_embd()",
    "_ctx": f"{_POINTER}; use n_ctx(), eval() and save_state()",
    "_model": f"{_POINTER}; use metadata, n_vocab(), n_embd(), tokenize()",
    "_batch": f"{_POINTER}; use crumplezone.Batch with crumplezone.Decoder",
    "batch": f"{_POINTER}; use crumplezone.Batch with crumplezone.Decoder",
    "_sampler": f"{_POINTER}; pass the sampling parameters to the call",
    "model_params": f"{_POINTER}; use __getstate__(), the constructor's parameters",
    "context_params": f"{_POINTER}; use __getstate__(), the constructor's parameters",
    "tokenizer_": "lives in the cell; use tokenizer()",
}


class Llama(Facts, Completions):
    """``llama_cpp.Llama`` that no crash, hang or kill of its native code takes down.

    The parameters that are not described here are those of ``llama_cpp.Llama``.

    Args:
        model_path: Path of a GGUF file.
        chat_handler: Not supported: code cannot be sent to the cell. Give a ``chat_format`` by name.
        draft_model: None, or a `LlamaPromptLookupDecoding`.
        tokenizer: Not supported: code cannot be sent to the cell. The model's own is used.
        verbose: Whether the cell's llama.cpp talks. It talks to the logger ``llama.cpp``, never to stderr.
        reports: The report store; None for ``$CRUMPLEZONE_REPORTS`` or the XDG state directory.
        deadline: Seconds without a sign of life (a token, a piece of the prompt) until a call counts as
            hung, or None.
        memory_limit: Bytes of memory, resident or shared with this process, above which the cell is killed,
            or None.
        redact: Keep token ids, prompt text and paths out of the reports.
        start: How its cells are started: "zygote" (forked from a process that has loaded the model), "spawn"
            (each loads it), or "auto": "spawn" with layers to offload, and where forking is not safe.
        spares: Warm cells that wait to take over from one that dies, each with a context of its own. None: 1,
            but 0 where each would load the model again, with ``logits_all``, or if the context takes more
            than 512 MiB; the logger ``crumplezone`` says so.
        kwargs: Ignored, as in the original.

    Raises:
        ModelError: The file is missing or no model. It is a ValueError too, as the original's.
        InputError: A parameter cannot be sent.
        UsageError: An object was passed whose code would have to run in the cell.
    """

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int = 0,
        split_mode: int = 1,  # LLAMA_SPLIT_MODE_LAYER
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        seed: int = _DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = -1,  # LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
        pooling_type: int = -1,  # LLAMA_POOLING_TYPE_UNSPECIFIED
        attention_type: int = -1,  # LLAMA_ATTENTION_TYPE_UNSPECIFIED
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        reports: str | Path | None = None,
        deadline: float | None = 300.0,
        memory_limit: int | None = None,
        redact: bool = False,
        start: Start = "auto",
        spares: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            name: value for name, value in locals().items() if name not in {"self", "kwargs", "__class__"}
        }
        own = {name: given.pop(name) for name in _OWN}
        _refuse_code(given.pop("chat_handler"), given.pop("tokenizer"))
        lookup = lookup_of(given.pop("draft_model"))
        check_integer("n_ctx", n_ctx, 0, INT32_MAX)
        for name in ("n_batch", "n_ubatch"):
            check_integer(name, given[name], 1, INT32_MAX)
        given["n_threads"] = n_threads or max(multiprocessing.cpu_count() // 2, 1)
        given["n_threads_batch"] = n_threads_batch or multiprocessing.cpu_count()
        self._parameters = dict(task_of("", given).args)
        self._rest = own | {"draft_model": draft_model}
        limits = Limits(deadline, memory_limit)
        path = located(model_path)
        _check_model(path)
        lora = {"lora_path": str(located(lora_path))} if lora_path else {}  # as the model's
        config = LlamaConfig(str(path), self._parameters | lora, lookup)
        reporter = Reporter(directory_of(reports), redacted=redact)
        cells = Cells.of(config, limits, reporter, start, spares, "llama")
        self._session = Session(config, cells, spares)
        self._cache: Any = None
        self.n_batch = self._info.cell.n_batch
        self.numa = int(numa)
        self.draft_model = draft_model
        self.chat_handler = None
        vars(self).update({name: self._parameters[name] for name in _KEPT})

    # State.

    @property
    def n_tokens(self) -> int:
        """How many tokens are evaluated. A smaller number forgets the ones behind it."""
        return len(self._session.snapshot.tokens)

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        check_integer("n_tokens", n_tokens, 0, self.n_tokens, ", the number of evaluated tokens")
        del self._session.snapshot.tokens[n_tokens:]

    @property
    def input_ids(self) -> npt.NDArray[np.intc]:
        """The evaluated tokens, int32, shape (n_ctx,), zeros behind them. A copy."""
        ids = np.zeros(self.n_ctx(), np.intc)
        ids[: self.n_tokens] = self._session.snapshot.tokens
        return ids

    @property
    def scores(self) -> npt.NDArray[np.single]:
        """Logits of the evaluated tokens, float32, shape (n_ctx, n_vocab); zeros without ``logits_all``."""
        try:
            scores = np.zeros((self._info.n_rows, self.n_vocab()), np.single)
        except (MemoryError, ValueError) as error:  # numbers of the cell's
            raise ShortageError(f"{self._info.n_rows} rows of scores", error) from error
        raw = self._session.call(task_of("scores_bytes", {}), bytes)
        if len(raw) % scores[:1].nbytes or len(raw) > scores.nbytes:
            raise CrumplezoneError(f"the cell sent {len(raw)} bytes of scores: it cannot be trusted")
        rows = np.frombuffer(raw, np.single).reshape(-1, self.n_vocab())
        scores[: len(rows)] = rows
        return scores

    @property
    def eval_tokens(self) -> deque[int]:
        """The evaluated tokens."""
        return deque(self._session.snapshot.tokens, maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of the evaluated tokens; without ``logits_all`` one row."""
        maxlen = self.n_ctx() if self._parameters["logits_all"] or self.draft_model else 1
        return deque(self.scores[: self.n_tokens].tolist(), maxlen=maxlen)

    @property
    def chat_format(self) -> str | None:
        """Name of the chat format."""
        return self._session.snapshot.chat_format

    @chat_format.setter
    def chat_format(self, chat_format: str | None) -> None:
        if chat_format not in {None, *self._info.chat_formats}:
            known = ", ".join(self._info.chat_formats)
            raise InputError("chat_format", chat_format, f"must be one of {known}")
        self._session.snapshot.chat_format = chat_format

    @property
    def cache(self) -> Any:
        """What `set_cache` was given."""
        return self._cache

    def set_cache(self, cache: Any) -> None:
        """Keep the states of finished prompts in a `LlamaRAMCache`, or None: no longer."""
        self._session.snapshot.cache, self._cache = capacity_of(cache), cache

    def set_seed(self, seed: int) -> None:
        """Set the random seed."""
        check_integer("seed", seed, -(2**63), 2**64 - 1)
        self._session.snapshot.seed = int(seed)

    def reset(self) -> None:
        """Forget the evaluated tokens."""
        self._session.call(task_of("reset", {}), bytes)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens behind those that are evaluated."""
        self._session.call(task_of("eval", {"tokens": list(tokens)}), bytes)

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Processors = None,
        grammar: Any = None,
        idx: int | None = None,
    ) -> int:
        """Draw a token from the logits of the last evaluated one."""
        token: int = self._session.call(task_of("sample", locals()), decoded(Token))
        return token

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Processors = None,
        stopping_criteria: Criteria = None,
        grammar: Any = None,
    ) -> Generator[int, list[int] | None, None]:
        """Draw tokens behind a prompt, without end. Tokens that are sent in are evaluated too."""
        arguments = locals()
        arguments["tokens"] = list(tokens)
        return self._session.stream(task_of("generate", arguments), decoded(Token))

    def save_state(self) -> LlamaState:
        """The evaluated tokens with llama.cpp's memory of them."""
        raw = self._session.call(task_of("state_bytes", {}), bytes)
        snapshot = self._session.snapshot
        scores = self.scores[: self.n_tokens]
        return LlamaState(self.input_ids, scores, self.n_tokens, raw, len(raw), snapshot.seed)

    def load_state(self, state: LlamaState) -> None:
        """Go back to a state. After a crash its tokens are evaluated again.

        Raises:
            InputError: It does not fit the context.
        """
        check_integer("n_tokens", state.n_tokens, 0, self.n_ctx(), ", the context")
        scores = (
            np.ascontiguousarray(state.scores, np.single) if self._parameters["logits_all"] else np.zeros(0)
        )
        arguments = {
            "llama_state": bytes(state.llama_state),
            "input_ids": np.asarray(state.input_ids)[: state.n_tokens],
            "scores": scores.tobytes(),
        }
        self._session.call(task_of("set_state", arguments), bytes)
        self.set_seed(state.seed)

    # Life.

    @property
    def pid(self) -> int | None:
        """Process id of the cell, or None while there is none."""
        return next(iter(self.processes["cell"]), None)

    @property
    def processes(self) -> dict[str, list[int]]:
        """Process ids: of the "zygote", the "cell" and the "spares"."""
        return self._session.processes

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes and kills that were noticed so far are on disk."""
        self._session.flush_reports()

    def close(self) -> None:
        """End the cell and finish the reports. Idempotent, and from within a call as `Decoder.close`."""
        self._session.close()

    def __getstate__(self) -> dict[str, Any]:
        snapshot = self._session.snapshot
        now = {"seed": snapshot.seed, "chat_format": snapshot.chat_format}
        return self._parameters | self._rest | now | {"numa": self.numa, "chat_handler": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Llama.__init__(self, **state)

    if not TYPE_CHECKING:  # a type checker is to see that they are missing

        def __getattr__(self, name: str) -> Any:
            if name in ABSENT:
                raise AttributeError(f"Llama.{name} {ABSENT[name]}")
            raise AttributeError(f"'Llama' object has no attribute {name!r}")

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: list[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A `Llama` of a file in a Hugging Face repository; ``kwargs`` go to the constructor.

        Raises:
            ImportError: huggingface_hub is not installed.
            InputError: A name or pattern fits no file, or several.
        """
        path = download(
            repo_id,
            [filename or "", *(additional_files or [])],
            local_dir=local_dir,
            local_dir_use_symlinks=local_dir_use_symlinks,
            cache_dir=cache_dir,
        )
        return cls(model_path=path, **kwargs)


def _check_model(path: Path) -> None:
    """Refuse what is certainly no model; where there is no file, in the original's words."""
    try:
        check_file(path)
    except ModelError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        problem = str(error).partition(": ")[2]
        raise ModelError(str(path), f"Model path does not exist: {path}; {problem}") from error


def _refuse_code(chat_handler: object, tokenizer: object) -> None:
    if chat_handler is not None:
        raise UsageError("a chat_handler is code, which is not sent to the cell: pass chat_format, a name")
    if tokenizer is not None:
        raise UsageError("a tokenizer is code, which is not sent to the cell: the model's own is used")
