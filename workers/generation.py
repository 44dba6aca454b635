"""Supervisor side of `Decoder.generate`: prompts in, completions out, crashes in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, InputError, SequenceError
from crumplezone.reports.schema import BatchRecord, Outcome
from crumplezone.sandbox.cell import Cell
from crumplezone.workers.calls import RefusedError
from crumplezone.workers.incident import Case, Reporter
from crumplezone.workers.protocol import Generated, Join, Progress
from crumplezone.workers.results import Completion, Rung, Sampling
from crumplezone.workers.runner import Runner
from crumplezone.workers.safe import Descent

STEPS = 16  # native calls per control message: what a crash can cost is that much decoding again
_SEED_STRIDE = 1_000_003  # prompts draw from different noise, each the same on every run and rung


@dataclass
class _Running:
    """A prompt in flight and everything it has produced so far."""

    index: int
    prompt: str
    prompt_tokens: npt.NDArray[np.int32]
    max_tokens: int
    produced: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)

    def take(self, progress: Progress) -> None:
        """Add what came back."""
        self.produced += progress.tokens
        self.text += progress.text

    def done(
        self, reason: str, rung: Rung, error: CrumplezoneError | None = None, reports: tuple[str, ...] = ()
    ) -> Completion:
        """As the caller gets it."""
        text = self.text.decode("utf-8", "replace")
        return Completion(self.index, self.prompt, text, self.produced, reason, rung, error, reports)

    def join(self, seq_id: int, sampling: Sampling) -> tuple[Join, npt.NDArray[np.int32]]:
        """Ask to continue from the last token that was delivered."""
        tokens = np.concatenate([self.prompt_tokens, np.array(self.produced, np.int32)])
        seed = (sampling.seed * _SEED_STRIDE + self.index) % 2**63
        left = self.max_tokens - len(self.produced)
        return Join(seq_id, len(tokens), left, sampling.temperature, seed), tokens


class Generation:
    """One `Decoder.generate`: a queue of prompts over the sequences of a native cell.

    Args:
        native: The native rung.
        descent: The safe rungs, or None to fail with the native rung.
        reporter: Where crashes go.
        sampling: The same for every prompt.
    """

    def __init__(
        self, native: Runner, descent: Descent | None, reporter: Reporter, sampling: Sampling
    ) -> None:
        self._native, self._descent, self._reporter = native, descent, reporter
        self._sampling = sampling
        self._refusal = ""  # why no cell can be had
        self._running: dict[int, _Running] = {}
        self._known_to: Cell | None = None  # the cell that has the running sequences

    def run(self, prompts: list[tuple[int, str]]) -> Generator[Completion, None, None]:
        """Yield completions as they finish."""
        queue = deque(prompts)
        free = list(range(self._native.config.n_seq_max))[::-1]
        while queue or self._running:
            joins = []
            while queue and free:
                admitted = self._admit(*queue.popleft())
                if isinstance(admitted, Completion):
                    yield admitted
                    continue
                seq_id = free.pop()
                self._running[seq_id] = admitted
                joins.append(admitted.join(seq_id, self._sampling))
            if self._running:
                for completion, seq_id in self._advance(joins):
                    free.append(seq_id)
                    yield completion

    def _cell(self) -> Cell:
        """The running cell.

        Raises:
            CrumplezoneError: None can be had. What was refused once is not asked for again.
        """
        if not self._refusal:
            try:
                return self._native.start()
            except CrumplezoneError as error:
                self._refusal = str(error)
        raise CrumplezoneError(self._refusal)

    def _admit(self, index: int, prompt: str) -> _Running | Completion:
        def failed(error: CrumplezoneError, *reports: str) -> Completion:
            return Completion(index, prompt, "", [], "error", Rung.NATIVE, error, reports)

        try:
            try:
                tokens = self._tokenize(prompt)
            except CellDied as died:  # perhaps of something older than this prompt: a new cell will tell
                self._report_tokenizer(index, died, "the tokenizer was asked again in a new cell")
                tokens = self._tokenize(prompt)
            n_ctx_seq = self._native.info.n_ctx_seq
            if not 0 < len(tokens) < n_ctx_seq:
                limit = f"the context holds {n_ctx_seq} tokens per sequence, one of them to generate"
                raise InputError(f"number of tokens of prompt {index}", len(tokens), limit)
        except CellDied as died:
            path = self._report_tokenizer(
                index, died, f"prompt {index} crashes the tokenizer and failed alone"
            )
            return failed(SequenceError(index, "llama.cpp died while tokenising it", path), path)
        except (CellRefused, InputError) as refused:
            return failed(refused)
        except (CrumplezoneError, OSError) as refused:  # no cell, or no memory for its arena
            return failed(SequenceError(index, str(refused)))
        return _Running(index, prompt, tokens, min(self._sampling.max_tokens, n_ctx_seq - len(tokens)))

    def _tokenize(self, prompt: str) -> npt.NDArray[np.int32]:
        self._cell()
        return self._native.tokenize(prompt)

    def _report_tokenizer(self, index: int, died: CellDied, result: str) -> str:
        config, info = self._native.config, self._native.info
        return self._reporter.file_lone(died.incident, "tokenize", result, config, info, [index])

    def _advance(self, joins: list[tuple[Join, npt.NDArray[np.int32]]]) -> Iterator[tuple[Completion, int]]:
        start = time.perf_counter()
        try:
            generated = self._generate(joins)
        except (RefusedError, CrumplezoneError, OSError) as error:  # also: no native cell could be had
            yield from self._descend(error, (time.perf_counter() - start) * 1000)
            return
        for progress in generated.progress:
            running = self._running[progress.seq_id]
            running.take(progress)
            if progress.finished:
                del self._running[progress.seq_id]
                yield running.done(progress.finished, Rung.NATIVE), progress.seq_id

    def _generate(self, joins: list[tuple[Join, npt.NDArray[np.int32]]]) -> Generated:
        cell = self._cell()
        reset = cell is not self._known_to
        if reset:  # it has none of the running sequences, or those of something else
            joins = [running.join(seq_id, self._sampling) for seq_id, running in self._running.items()]
            self._known_to = cell
        return self._native.generate(joins, STEPS, self._native.info.n_batch, reset=reset)

    def _descend(self, error: Exception, ms: float) -> Iterator[tuple[Completion, int]]:
        """Finish every sequence in flight on the safe rungs, from its last delivered token."""
        case = Case()
        indices = [running.index for running in self._running.values()]
        if isinstance(error, CellDied):
            joins = [running.join(seq_id, self._sampling) for seq_id, running in self._running.items()]
            batch = self._native.last_batch(self._native.info.n_batch, joins)
            config, info = self._native.config, self._native.known
            self._reporter.add(case, error.incident, Rung.NATIVE, batch, config, info)
            case.step(Rung.NATIVE, Outcome.CRASHED, indices, str(error), ms)
        else:
            case.step(Rung.NATIVE, Outcome.REFUSED, indices, str(error), ms)
        self._known_to = None  # the safe rungs run in the same kind of cell, or in this very one
        finished = 0
        try:
            for seq_id, running in list(self._running.items()):
                del self._running[seq_id]
                completion = self._finish_safely(running, case, error)
                finished += completion.error is None
                yield completion, seq_id
        finally:
            case.result = f"{finished} of {len(indices)} prompts in flight finished by {Rung.SAFE}"
            self._reporter.file(case, self._native.config, self._native.info)

    def _finish_safely(self, running: _Running, case: Case, native_error: Exception) -> Completion:
        paths = tuple(case.reports)
        if self._descent is None:
            problem = CrumplezoneError(f"prompt {running.index}: {native_error}; safe_fallback is off")
            return running.done("error", Rung.NATIVE, problem, paths)

        runner = self._descent.runner

        def work(chunk: int) -> str:
            joins = [running.join(0, self._sampling)]
            while True:
                (progress,) = runner.generate(joins, STEPS, chunk, reset=bool(joins)).progress
                running.take(progress)
                if progress.finished:
                    return progress.finished
                joins = []

        def batch(chunk: int) -> BatchRecord:
            return runner.last_batch(chunk, [running.join(0, self._sampling)])

        reason, rung, error = self._descent.attempt(running.index, case, work, batch)
        paths = tuple(case.reports)
        return running.done(reason or "error", rung, error, paths)
