"""The smallest batch and context that still crash in the same way, found by lithium."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
from lithium.strategies import Minimize, ReductionIterator
from lithium.testcases import TestcaseLine

from crumplezone.diagnostics.replay.candidate import Candidate
from crumplezone.diagnostics.replay.recipe import read_recipe
from crumplezone.diagnostics.replay.replay import Run, find_model, new_client, run
from crumplezone.errors import CrumplezoneError, NotShownError, UsageError, check_integer
from crumplezone.reports.records.report import Evidence, Outcome, Report
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.embed.client import EmbedClient
from crumplezone.workers.model.parameters import PARAMETERS
from crumplezone.workers.protocol.config import CTX_PAD, CellConfig

_SURE = 3  # runs that all crash alike: it is no flaky crash
_MEASURE = 10  # runs to measure a flaky one
_TRIES_MAX = 30  # per candidate; enough for one that crashes in 1 of 10 runs
_MISSED = 0.05  # how often a candidate that would crash may be taken for one that does not
_USUAL = {  # llama.cpp's own
    field.name: field.default for field in msgspec.structs.fields(CellConfig) if field.name in PARAMETERS
}

_replace = msgspec.structs.replace


@dataclass(frozen=True)
class Minimised:
    """What is left.

    Attributes:
        report: The report with what is left of its batch and context, and the evidence of that crash.
        tests: Runs that it took.
        steps: What was taken away, for people: ``"tokens: 64 to 1"``.
        crashed: Of the first runs, made to measure it, how many showed the recorded crash.
        measured: How many those were.
        complete: False if it was interrupted or ran out of tests: something smaller may exist.
    """

    report: Report
    tests: int
    steps: list[str]
    crashed: int
    measured: int
    complete: bool


def minimise(
    report: Report,
    model: Path | None = None,
    *,
    tests_max: int = 500,
    deadline: float | None = 300.0,
    on_progress: Callable[[Minimised], None] | None = None,
) -> Minimised:
    """Take sequences, tokens, outputs and context away for as long as the signature stays the same.

    A flaky crash is measured first; each candidate is then tried often enough to be 95 % sure. ctrl-C ends
    the search and gives the best so far.

    Args:
        report: A crash; untrusted.
        model: The model file, if it is not where it was.
        tests_max: Most runs.
        deadline: Seconds until a native call counts as hung, or None.
        on_progress: Called with the best so far, whenever there is a better one.

    Raises:
        InputError: The report holds a number that may not be sent.
        UsageError: The report does not hold what a replay needs.
        ModelError: The model file is missing, or cannot be loaded.
        NotShownError: The crash did not happen again.
    """
    check_integer("tests_max", tests_max, 1, 10**6)
    recipe = read_recipe(report)
    if recipe.batch is None:
        raise UsageError("this crash happened while the model was loaded: there is no batch to minimise")
    path, _ = find_model(report, model)
    start = Candidate(_replace(recipe.config, model=str(path)), recipe.batch)
    search = _Search(report, start, start, tests_max, deadline, on_progress)
    with contextlib.closing(search):
        return search.run()


class _EnoughError(Exception):
    """The tests are used up."""


@dataclass
class _Search:
    """The best candidate so far, and the cell that the next is tried in."""

    report: Report
    start: Candidate
    best: Candidate
    tests_max: int
    deadline: float | None
    on_progress: Callable[[Minimised], None] | None
    evidence: Evidence | None = None
    tests: int = 0
    crashed: int = 0
    measured: int = 0
    tries: int = 1
    complete: bool = False
    _failed: set[bytes] = field(default_factory=set)
    _client: DecodeClient | EmbedClient | None = None

    def run(self) -> Minimised:
        """Measure, then reduce until nothing more can go."""
        with contextlib.suppress(KeyboardInterrupt, _EnoughError):
            self._measure()
            before = None
            while before != self.best:  # less context can make fewer tokens enough, and the other way round
                before = self.best
                for reduce in _STAGES:
                    reduce(self)
            self.complete = True
        return self.result()

    def close(self) -> None:
        """End the cell."""
        if self._client:
            self._client.close()

    def result(self) -> Minimised:
        """The best so far."""
        then, now = _sizes(self.start), _sizes(self.best)
        report = _replace(
            self.report,
            batch=self.best.batch,
            context={k: v for k, v in self.report.context.items() if k not in PARAMETERS} | self.best.context,
            evidence=self.evidence or self.report.evidence,
        )
        steps = [f"{what}: {then[what]} to {now[what]}" for what in now if now[what] != then[what]]
        return Minimised(report, self.tests, steps, self.crashed, self.measured, complete=self.complete)

    def _measure(self) -> None:
        """How often it crashes at all, each time in a fresh cell."""
        others: list[str] = []
        while self.measured < _MEASURE and not self.crashed == self.measured == _SURE:
            self._new_client(self.best.config)
            tried = self._test(self.best)
            self.measured += 1
            if tried.same:
                self.crashed += 1
                self.evidence = tried.evidence
            else:
                others.append(tried.signature.title if tried.signature else tried.detail or "passed")
        if not self.crashed:
            seen = ", ".join(sorted({ascii(other) for other in others}))
            raise NotShownError(
                f"the crash did not happen again: 0 of {self.measured} runs showed it ({seen}). "
                "Minimise it where it happens: same llama.cpp, model file and machine."
            )
        if self.crashed < self.measured:
            missed = math.log(1 - self.crashed / self.measured)
            self.tries = min(math.ceil(math.log(_MISSED) / missed), _TRIES_MAX)

    def better(self, candidate: Candidate) -> bool:
        """Keep a candidate if it shows the same crash."""
        if candidate.key in self._failed:
            return False
        for _ in range(self.tries):
            tried = self._try(candidate)
            if tried.same:
                break
        else:
            self._failed.add(candidate.key)
            return False
        self.best, self.evidence = candidate, tried.evidence
        if self.on_progress:
            self.on_progress(self.result())
        return True

    def lithium(self, n_parts: int, build: Callable[[list[int]], Candidate | None]) -> None:
        """Let lithium take away parts of the best candidate.

        Args:
            n_parts: How many it has.
            build: Makes a candidate of those parts alone, by index; None if there can be none.
        """
        testcase = TestcaseLine()
        testcase.split_parts(b"".join(b"%d\n" % i for i in range(n_parts)))
        reduction = cast(ReductionIterator, Minimize().reduce(testcase))  # which its annotation hides
        for attempt in reduction:
            candidate = build([int(part) for part in attempt.parts])
            reduction.feedback(candidate is not None and self.better(candidate))

    def _try(self, candidate: Candidate) -> Run:
        """Every run starts from empty memory, so a cell that has only passed can be used again."""
        client = self._client
        if client is None or client.config != candidate.config or self.tries > 1:
            client = self._new_client(candidate.config)
        used = client.pid is not None
        try:
            tried = self._test(candidate)
            if used and tried.outcome == Outcome.CRASHED:  # of what the cell did before, perhaps
                tried = self._test(candidate)
        except CrumplezoneError as error:  # no context can be made with these parameters
            return Run(Outcome.REFUSED, str(error))
        return tried

    def _new_client(self, config: CellConfig) -> DecodeClient | EmbedClient:
        self.close()
        self._client = new_client(config, self.deadline)
        return self._client

    def _test(self, candidate: Candidate) -> Run:
        if self.tests >= self.tests_max:
            raise _EnoughError
        self.tests += 1
        assert self._client is not None
        return run(self._client, candidate.batch, self.report)


def _sizes(candidate: Candidate) -> dict[str, int]:
    outputs = sum(candidate.batch.outputs)
    counts = {"sequences": len(candidate.seq_ids), "tokens": candidate.n_tokens, "outputs": outputs}
    held = {"held tokens": sum(len(each.tokens) for each in candidate.batch.held)}
    return counts | held | candidate.context


def _memory(search: _Search) -> None:
    """Put what the memory held in front of the batch, or forget it. Where that cures it, it stays."""
    if search.best.batch.held and not search.better(search.best.merged()):
        search.better(search.best.forgotten())


def _unusual(search: _Search) -> None:
    """Let tokens belong to one sequence only, and pointers lead somewhere."""
    nulls = search.best.batch.nulls
    if nulls:
        search.lithium(len(nulls), lambda kept: search.best.with_batch(nulls=[nulls[i] for i in kept]))
    shared = list(search.best.batch.shared.items())
    if shared:
        search.lithium(len(shared), lambda kept: search.best.with_batch(shared=dict(shared[i] for i in kept)))


def _sequences(search: _Search) -> None:
    start = search.best
    owners = start.owners

    def build(kept: list[int]) -> Candidate | None:
        ids = {start.seq_ids[i] for i in kept}
        return start.only([i for i, owner in enumerate(owners) if owner in ids])

    search.lithium(len(start.seq_ids), build)
    if search.best.all_ids != list(range(len(search.best.all_ids))):
        search.better(search.best.renumbered())


def _tokens(search: _Search) -> None:
    start = search.best
    search.lithium(start.n_tokens, start.only)


def _outputs(search: _Search) -> None:
    start, batch = search.best, search.best.batch
    if batch.embeddings or batch.operation == "encode":  # the cell makes every token an output
        return
    marked = [i for i, output in enumerate(batch.outputs) if output]

    def build(kept: list[int]) -> Candidate:
        outputs = [False] * len(batch.outputs)
        for i in kept:
            outputs[marked[i]] = True
        return start.with_batch(outputs=outputs)

    search.lithium(len(marked), build)


def _context(search: _Search) -> None:
    """Bring each number down, to the least that the batch fills or twice that, and choose what is usual."""
    best = search.best
    n_seq = min(max(0, *best.all_ids) + 1, best.config.n_seq_max)
    n_call = min(best.n_tokens, best.batch.chunk or best.n_tokens)
    least = {
        "n_gpu_layers": 0,
        "n_threads": 1,
        "n_seq_max": n_seq,
        "n_ctx": CTX_PAD * n_seq,
        "n_batch": n_call if n_call <= best.config.n_batch else 1,
        "n_ubatch": 1,
    }
    for name, value in least.items():
        for size in _doubling(value, getattr(search.best.config, name)):
            if search.better(_with(search.best, name, size)):
                break
    if search.best.config != (usual := _replace(search.best.config, **_USUAL)):
        if search.better(Candidate(usual, search.best.batch)):
            return
        for name, default in _USUAL.items():
            if getattr(search.best.config, name) != default:
                search.better(_with(search.best, name, default))


def _doubling(least: int, now: int) -> Iterator[int]:
    if now < 0:  # n_gpu_layers: all of them
        yield least
    while least < now:
        yield least
        least = 2 * least or now


def _with(candidate: Candidate, name: str, value: object) -> Candidate:
    config, batch = _replace(candidate.config, **{name: value}), candidate.batch
    if name == "n_batch" and isinstance(value, int):
        config = _replace(config, n_ubatch=min(config.n_ubatch, value))
        if batch.generating:
            batch = _replace(batch, chunk=min(batch.chunk, value))
    return Candidate(config, batch)


_STAGES = (_memory, _unusual, _sequences, _tokens, _outputs, _context)
