"""A whole job in tokens/s: 64 prompts x 64 greedy tokens, with and without a prefix that they share.

`Decoder.generate` and `crumplezone run` against the same engine in one process, against llama.cpp's own
server, and against ``llama_cpp.Llama`` in a loop. All are loaded and warm, but for `crumplezone run`, which
pays for its start and its model within its time. Every round has other prompts, so that no side profits from
what it remembers of the last. Narrower widths are given fewer of the prompts, and the loop a few: what counts
is tokens/s.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import model
from benchmarks.pairing import alternate, ratio
from benchmarks.peer import Peer, PeerError
from benchmarks.rows import JOB_ENGINE, JOB_LLAMA, JOB_LLAMA_WIDE, JOB_SERVER, Aim, Plan, Row, Yield
from benchmarks.server import Server, features
from crumplezone import Decoder

QUANTS = ("Q4_1", "Q4_0", "F16")
OWN = 0  # the width that the engine itself chooses
TRAPS = ("Q4_1", "Q8_0")  # where a wrong one is slower than one prompt at a time
WIDTHS = {OWN: 32, 1: 8, 4: 16, 16: 64}  # sequences at a time: how many of the prompts
WIDEST = max(WIDTHS)
LOOP = 8  # prompts of one round of the loop
MAX_TOKENS = 64
N_CTX_SEQ = 512
PREFIX_WORDS = 215  # of the text below; SmolLM2 makes 256 tokens of them, give or take a few

_SUBJECTS = ("river", "lighthouse", "violin", "glacier", "market", "bridge", "orchard", "comet")
_FORMS = ("story", "letter", "recipe", "lecture", "review", "diary", "speech", "riddle")
_TEXT = (
    "You are a patient writer who answers every request in plain words and whole sentences. Say first "
    "what the thing is, then where it is found, then why anybody should care, and end with a detail that "
    "few people know. Do not repeat yourself, do not ask questions, and keep away from lists. Where a "
    "number helps, give one, and say in which unit it is. Where a name helps, give one, and say whose it is. "
)

Side = Callable[[list[str]], tuple[int, float]]


def prompts(number: int, *, shared: bool) -> list[str]:
    """The 64 prompts of a round; with a prefix that all of them share, if that is wanted."""
    head = ""
    if shared:
        words = (f"Session {number}. " + _TEXT * 4).split()
        head = " ".join(words[:PREFIX_WORDS]) + "\n\n"
    return [
        f"{head}Round {number}: write a long {form} about a {subject}, please. It begins like this:"
        for form in _FORMS
        for subject in _SUBJECTS
    ]


@dataclass(frozen=True)
class Case:
    """One configuration: what every side of it runs."""

    quant: str
    width: int
    shared: bool

    def __str__(self) -> str:
        width = f"width {self.width}" if self.width else "own width"
        return f"{self.quant}, {width}{', 256-token prefix' if self.shared else ''}"


def rows(plan: Plan) -> Iterator[Yield]:
    """Rows of each case: against each of the other sides."""
    cases = [Case(quant, width, shared=False) for quant in QUANTS for width in WIDTHS if width]
    cases += [Case(quant, WIDEST, shared=True) for quant in QUANTS]
    cases += [Case(quant, OWN, shared=False) for quant in TRAPS]
    for case in cases:
        if plan.quick and case != Case("Q4_0", 16, shared=False):
            continue
        with ExitStack() as stack:
            yield from _case(plan, case, stack)
    if plan.quick:
        yield Row("job", "the other models and widths", None, "x", note="left out of a quick run")


def _case(plan: Plan, case: Case, stack: ExitStack) -> Iterator[Row]:
    path = model(case.quant, plan.cache)
    sides: dict[str, Side] = {"generate": _decoder(plan, case, path, stack)}
    notes: dict[str, str] = {}
    for name, make in _OTHERS.items():
        if case.width == OWN and name != "loop":  # the others have no choice of their own
            continue
        try:
            sides[name], notes[name] = make(plan, case, path, stack)
        except PeerError as error:
            yield Row("job", f"generate / {name}: {case}", None, "x", note=str(error))
    if case.width == WIDEST and not case.shared:
        sides["run"] = functools.partial(_run, case, path)
    speeds = _measure(plan, case, sides)
    for name, aim, ours in _comparisons(case):
        if name in speeds and ours in speeds:
            found = ratio(speeds[ours], speeds[name])
            ours_tps, theirs_tps = statistics.median(speeds[ours]), statistics.median(speeds[name])
            note = f"{ours_tps:.0f} / {theirs_tps:.0f} tokens/s{notes[name]}"
            data = {ours: ours_tps, name: theirs_tps}
            yield Row("job", f"{ours} / {name}: {case}", found, "x", aim, note, data)


def _comparisons(case: Case) -> Iterator[tuple[str, Aim, str]]:
    wide = case.width == WIDEST and case.quant in ("Q4_0", "F16")
    loop = JOB_LLAMA_WIDE if wide else JOB_LLAMA
    yield "engine", JOB_ENGINE, "generate"
    yield "server", JOB_SERVER, "generate"
    yield "loop", loop, "generate"
    yield "server", JOB_SERVER, "run"
    yield "loop", loop, "run"


def _measure(plan: Plan, case: Case, sides: dict[str, Side]) -> dict[str, list[float]]:
    """Tokens/s of each side, round by round."""
    rounds = dict.fromkeys(sides, 0)

    def once(name: str) -> float:
        rounds[name] += 1
        count = (LOOP if name == "loop" else WIDTHS[case.width]) // (2 if plan.quick else 1)
        made, seconds = sides[name](prompts(rounds[name], shared=case.shared)[:count])
        return made / seconds

    for name, side in sides.items():
        if name != "run":
            side(prompts(0, shared=case.shared)[: case.width or LOOP])  # warm up
    box = plan.box(20)
    return dict(zip(sides, alternate([functools.partial(once, name) for name in sides], box), strict=True))


def _decoder(plan: Plan, case: Case, path: Path, stack: ExitStack) -> Side:
    reports = stack.enter_context(tempfile.TemporaryDirectory())
    decoder = stack.enter_context(
        Decoder(
            path,
            n_ctx=case.width * N_CTX_SEQ,
            n_seq_max=case.width,
            n_threads=plan.threads if case.width else 0,
            reports=reports,
        )
    )

    def side(texts: list[str]) -> tuple[int, float]:
        start = time.perf_counter()
        made = sum(len(each.tokens) for each in decoder.generate(texts, max_tokens=MAX_TOKENS))
        return made, time.perf_counter() - start

    return side


def _engine(plan: Plan, case: Case, path: Path, stack: ExitStack) -> tuple[Side, str]:
    peer = stack.enter_context(Peer("side_engine", path, case.width, N_CTX_SEQ, plan.threads))
    return functools.partial(_ask, peer), ""


def _loop(plan: Plan, _: Case, path: Path, stack: ExitStack) -> tuple[Side, str]:
    peer = stack.enter_context(Peer("side_llama", path, N_CTX_SEQ, plan.threads))
    return functools.partial(_ask, peer), ""


def _ask(peer: Peer, texts: list[str]) -> tuple[int, float]:
    made, seconds = peer.ask("complete", prompts=texts, max_tokens=MAX_TOKENS)
    return made, seconds


def _server(plan: Plan, case: Case, path: Path, stack: ExitStack) -> tuple[Side, str]:
    server = Server(stack, path, case.width, N_CTX_SEQ, plan.threads)
    package, built_for = server.about()
    differs = _differences(built_for)
    return functools.partial(
        server.complete, max_tokens=MAX_TOKENS
    ), f"; xllamacpp {package} wheel, {differs}"


@functools.cache
def _own_features() -> frozenset[str]:
    with tempfile.TemporaryDirectory() as reports, Decoder(model("Q4_1", Path()), reports=reports) as decoder:
        return frozenset(features(decoder.info.system_info))


def _differences(theirs: set[str]) -> str:
    """How the server's build differs from ours, as both tell."""
    ours = _own_features()
    if ours == theirs:
        return "same instruction sets"
    return f"without {sorted(ours - theirs)}, with {sorted(theirs - ours)}"


_OTHERS = {"engine": _engine, "server": _server, "loop": _loop}


def _run(case: Case, path: Path, texts: list[str]) -> tuple[int, float]:
    """`crumplezone run` as a command, from its start to its end."""
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory, "prompts.jsonl"), Path(directory, "out.jsonl")
        source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        command = [str(Path(sys.executable).with_name("crumplezone")), "run"]
        options = {
            "--prompts": source,
            "--out": out,
            "--model": path,
            "--max-tokens": MAX_TOKENS,
            "--n-seq-max": case.width,
            "--n-ctx": case.width * N_CTX_SEQ,
            "--reports": Path(directory, "reports"),
        }
        command += [str(part) for option in options.items() for part in option]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        return sum(json.loads(line)["n_tokens"] for line in out.read_text().splitlines()), seconds
