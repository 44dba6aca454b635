"""Child side: the real ``llama_cpp.Llama``, with a journal and a replay. Only cells import this module.

Facts are those of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import os
import random
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import llama_cpp._utils
import llama_cpp.llama
import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_cache import LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from crumplezone.sandbox.child.loop import AbandonedError, Room
from crumplezone.workers.native import memory as native_memory
from crumplezone.workers.native.batch import BatchPacker, batch_arrays
from crumplezone.workers.native.grammar import make_grammar
from crumplezone.workers.native.llama.journal import CallJournal
from crumplezone.workers.native.llama.seed import loading_by, original
from crumplezone.workers.native.model import NativeLogs
from crumplezone.workers.protocol.llama import (
    Judge,
    Judged,
    LlamaCall,
    LlamaConfig,
    Process,
    common_prefix,
    question_shapes,
)

_ROWS = 32  # of logits at once: llama.cpp keeps room for the most that were ever asked for
utils: Any = llama_cpp._utils  # noqa: SLF001 - there is no other name


_stale: list[Any] = []  # never collected: they would close descriptors of others


def _reopen_null() -> None:
    """Where the original's output goes that it suppresses: the fork has closed what the zygote had."""
    _stale.extend((utils.outnull_file, utils.errnull_file))
    utils.outnull_file = open(os.devnull, "w")  # noqa: SIM115 - as the original has it
    utils.errnull_file = open(os.devnull, "w")  # noqa: SIM115 - likewise


class _Identity:
    """In the place of the modules ``uuid`` and ``time``: a call made again has the ids that it had."""

    def __init__(self, job: LlamaCall) -> None:
        self._created = job.created
        random.seed(job.identity)  # some chat formats make the ids of tool calls with it

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=random.getrandbits(128), version=4)

    def time(self) -> int:
        return self._created


class ReplayableLlama(original.Llama):  # type: ignore[misc] # an Any, see above
    """The real one, with a journal and a replay."""

    n_tokens: int

    def __init__(self, config: LlamaConfig, room: Room, native_logs: NativeLogs, model: Any = None) -> None:
        self.journal = CallJournal(room.ask)
        self._room, self._native_logs = room, native_logs
        self._job: LlamaCall | None = None
        self._history: list[int] | None = None  # evaluated in another cell, and not yet here
        self._generation = -1
        self._forced: deque[int] = deque()
        self._abandoned: AbandonedError | None = None
        self._saved: tuple[list[int], bytes] = [], b""
        self._ahead: list[int] = []  # what the memory holds, be n_tokens less
        self._greedy = self._mirostat = False  # of the sampler of the running call
        self._sampler_made = False  # before, what is evaluated is history
        self._passed = 0  # forced tokens over which the sampler was moved
        parameters = dict(config.parameters)
        if config.lookup:
            parameters["draft_model"] = LlamaPromptLookupDecoding(*config.lookup)
        if model:
            _reopen_null()
        with loading_by(lambda **_: model) if model else nullcontext():
            super().__init__(**parameters | {"model_path": config.model})
        self.model_path = parameters["model_path"]

    def begin(self, job: LlamaCall, saved: bytes = b"") -> None:
        """Stand as the supervisor's `Llama` stands. ``saved``: a state of ``job.saved``."""
        self._saved, self._ahead = (job.saved, saved), []
        self._greedy = self._mirostat = self._sampler_made = False
        self._passed = 0
        self._job, self._history = job, job.history
        if job.history is not None:
            super().reset()
        elif job.n_tokens < self.n_tokens and (self._is_recurrent or self._is_hybrid):
            self._history = self.input_ids[: job.n_tokens].tolist()  # such a memory cannot be cut
            super().reset()
        elif job.n_tokens < self.n_tokens:
            self.n_tokens, self._requires_eval = job.n_tokens, True
        self._seed, self.chat_format = job.seed, job.chat_format
        self._generation, self._abandoned = -1, None
        self._forced = deque()
        if job.cache is None:
            self.cache = None
        elif self.cache is None or self.cache.capacity_bytes != job.cache:
            self.cache = LlamaRAMCache(job.cache)
        original.uuid = original.time = _Identity(job)

    # What the original calls, in the order in which it does.

    def generate(  # noqa: D102 - the original's
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        assert self._job is not None
        self._generation += 1
        if self._generation < len(self._job.forced):
            self._forced = deque(self._job.forced[self._generation])
        if not kwargs.get("reset", True):
            self.catch_up(logits=False)
        yield from super().generate(tokens, *args, **kwargs)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler_made = True
        self._greedy = kwargs.get("temp") == 0.0
        self._mirostat = bool(kwargs.get("mirostat_mode")) and not self._greedy
        if kwargs.get("grammar") is not None:
            self._compile(kwargs["grammar"])
        return super()._init_sampler(*args, **kwargs)

    def _compile(self, grammar: Any) -> None:
        self.journal.tell("grammar")
        with self._room.recorder.phase("grammar", len(grammar._grammar)):  # noqa: SLF001 - the original's
            texts = grammar._grammar, grammar._root  # noqa: SLF001 - there is no other name
            sampler = make_grammar(self._model.vocab, self._native_logs, *texts)
        C.llama_sampler_free(sampler)
        self.journal.tell()

    def reset(self) -> None:  # noqa: D102 - the original's
        self._history, self._ahead = None, []
        super().reset()

    def eval(self, tokens: Sequence[int]) -> None:  # noqa: D102 - the original's
        self.catch_up(logits=not tokens)
        held = self._held(tokens)
        if held:
            self.journal.evaluating(self.n_tokens, tokens[:held])
            self.input_ids[self.n_tokens : self.n_tokens + held] = tokens[:held]
            self.n_tokens += held
            if held == len(tokens):
                return
            tokens = tokens[held:]
        # Pieces of n_batch, as the original cuts them, so that each native call is told of before it runs.
        for i in range(0, max(len(tokens), 1), self.n_batch):
            piece = tokens[i : i + self.n_batch]
            self.journal.evaluating(self.n_tokens, piece)
            with self._room.recorder.phase("decode", len(piece)):
                super().eval(piece)

    def _held(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the memory holds already, by a state of before a crash."""
        if self._saved[1] and self._sampler_made:
            self._ahead = self._restored(tokens)
            self._saved = [], b""
        ahead = self._ahead[self.n_tokens :]
        held = common_prefix(ahead, tokens)
        if held < min(len(ahead), len(tokens)):  # what comes is not what came before the crash
            self._ahead = []
        return held

    def _restored(self, tokens: Sequence[int]) -> list[int]:
        """Load the state as far as these tokens, and those that are drawn again, are the same.

        The last one is always computed, for its logits. A part of a prompt is of use only behind a history,
        which is computed again in any case: in pieces of other sizes, rounding differs.
        """
        known, state = self._saved
        wanted = [*tokens, *self._forced]
        usable = min(common_prefix(known, wanted), len(wanted) - 1)
        begin = len(tokens) - 1  # from where on tokens were drawn
        assert self._job is not None
        if self.n_tokens or usable <= 0 or (usable <= begin and not self._job.history):
            return []
        if (self._is_recurrent or self._is_hybrid) and (usable < len(known) or begin < usable):
            return []  # such a memory cannot be cut
        if begin < usable:
            if self._mirostat:  # whose noise depends on the very digits of all logits before
                return []
            if not self._draw_again(state, begin, wanted[begin:usable]):
                return []
        return known[:usable] if self._load(state, usable) else []

    def _load(self, state: bytes, n_tokens: int) -> bool:
        memory = C.llama_get_memory(self._ctx.ctx)
        with self._room.recorder.phase("restore", n_tokens):
            done = native_memory.load(self._ctx.ctx, memory, 0, np.frombuffer(state, np.uint8))
            return done and bool(C.llama_memory_seq_rm(memory, 0, n_tokens, -1))

    def _draw_again(self, state: bytes, begin: int, behind: list[int]) -> bool:
        """Move the sampler as it moved when it drew a token behind each of these.

        Noise wants their logits, which some large native calls give as well. What these leave in the memory
        is rounded otherwise than it was, so the state has to be loaded behind them. False if that cannot be.
        """
        if self._greedy:
            self._passed = len(behind)
            for token in list(self._forced)[: self._passed]:
                self._sampler.accept(token)
            return True
        if not self._load(state, begin):
            return False
        self._passed = len(behind)
        size = min(_ROWS, self.n_batch)
        for i in range(0, len(behind), size):
            piece = behind[i : i + size]
            self._batch.set_batch(batch=piece, n_past=begin + i, logits_all=True)
            with self._room.recorder.phase("decode", len(piece)):
                self._ctx.decode(self._batch)
            for row in range(len(piece)):
                self._again(self._forced[i + row], row)
            self.journal.breathe()
        return True

    def catch_up(self, *, logits: bool = True) -> None:
        """Evaluate what another cell had evaluated; ``logits``: those of its last token are needed."""
        history, self._history = self._history, None
        if history and (logits or not self._took(history)):
            self.eval(history)

    def _took(self, history: list[int]) -> bool:
        """Whether all of it was in the saved state. Behind a part, the rest would be rounded otherwise."""
        known, state = self._saved
        n_tokens = len(history)
        cut = len(known) > n_tokens and (self._is_recurrent or self._is_hybrid)
        if not state or cut or common_prefix(known, history) < n_tokens or not self._load(state, n_tokens):
            return False
        self.journal.evaluating(0, history)
        self.input_ids[:n_tokens] = history
        self.n_tokens, self._saved = n_tokens, ([], b"")
        return True

    def embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002, D102 - the original's
        return super().embed(input if isinstance(input, str) else self._breathing(input), *args, **kwargs)

    def _breathing(self, texts: list[str]) -> Iterator[str]:
        for text in texts:
            self.journal.breathe()
            yield text

    def sample(self, *args: Any, **kwargs: Any) -> int:  # noqa: D102 - the original's
        self.catch_up()
        if self._forced:
            if self._passed:
                self._passed -= 1
            else:
                idx = kwargs.get("idx")
                self._again(self._forced[0], -1 if idx is None else idx - self.n_tokens)
            self.journal.breathe()
            return self._forced.popleft()
        with self._room.recorder.phase("sample", self.n_tokens):
            token = int(super().sample(*args, **kwargs))
        if self._abandoned:  # ctypes prints what a logits processor raises, and goes on
            raise self._abandoned
        self.journal.drew(max(self._generation, 0), token)
        return token

    def _again(self, token: int, row: int) -> None:
        """`llama_sampler_sample`, but of a token that is known: noise and penalties move as they did."""
        logits = self._ctx.get_logits_ith(row)
        self._candidates.copy_logits(np.ctypeslib.as_array(logits, (self._n_vocab,)))
        self._candidates.candidates.selected = -1
        C.llama_sampler_apply(self._sampler.sampler, ctypes.byref(self._candidates.candidates))
        self._sampler.accept(token)

    # The caller's callbacks.

    def process(self, input_ids: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> Any:
        """Logits processors. A token of the replay has been through them."""
        if self._forced or self._abandoned:
            return logits
        try:
            self._put(logits, input_ids)
            self._room.ask(Process(len(input_ids), self.journal.take()))
        except AbandonedError as error:
            self._abandoned = error
            return logits
        answered, _ = self._room.arena.arrays(question_shapes(self._n_vocab, 0))
        return answered

    def judge(self, input_ids: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> bool:
        """Stopping criteria. They let every token of the replay pass; of the last one that is not certain."""
        if self._forced:
            return False
        self._put(logits, input_ids)
        answer = self._room.ask(Judge(len(input_ids), self.journal.take()))
        return msgspec.msgpack.decode(answer, type=Judged).stop

    def _put(self, logits: npt.NDArray[np.single], input_ids: npt.NDArray[np.intc]) -> None:
        into, ids = self._room.arena.arrays(question_shapes(self._n_vocab, len(input_ids)))
        into[:], ids[:] = logits, input_ids

    # What the supervisor calls and the original has under no name.

    def warm(self) -> None:
        """Decode a token and forget it, see `Warm`."""
        memory = C.llama_get_memory(self._ctx.ctx)
        if memory and not (self.context_params.embeddings or C.llama_model_has_encoder(self.model)):
            one = batch_arrays(1)  # the struct points into it
            C.llama_decode(self._ctx.ctx, BatchPacker().pack(one, 0, 1))
            C.llama_memory_clear(memory, False)

    def scores_bytes(self) -> bytes:
        """Rows of scores, float32; none without ``logits_all``, which leaves them unwritten."""
        self.catch_up()
        return self._scores.tobytes() if self._logits_all else b""

    def state_bytes(self) -> bytes:
        """The state of llama.cpp."""
        self.catch_up()
        return bytes(self.save_state().llama_state)

    def set_state(self, llama_state: bytes, input_ids: list[int], scores: bytes) -> None:
        """`load_state`, of parts."""
        n_tokens = len(input_ids)
        ids = np.zeros_like(self.input_ids)
        ids[:n_tokens] = input_ids
        rows = np.frombuffer(scores, np.single).reshape(-1, self._n_vocab)
        if not len(rows):
            rows = np.zeros_like(self.scores[:n_tokens])
        state = original.LlamaState(ids, rows, n_tokens, llama_state, len(llama_state), self._seed)
        self.load_state(state)

    def load_state(self, state: Any) -> None:  # noqa: D102 - the original's; a cache calls it too
        self._history = None
        super().load_state(state)
        self.journal.evaluating(0, state.input_ids[: state.n_tokens].tolist())

    def metadata_items(self) -> dict[str, str]:
        """The model's metadata."""
        return dict(self.metadata)
