"""Kill storms: random signals to every process of ours, while prompts, sessions, streams and embeddings run.

`make storm` runs six seeds of two minutes each. KILL, SEGV, ABRT, BUS, FPE, ILL, TERM, HUP and STOP go to
cells, spares, zygotes and unwinding helpers, those that are starting too. Nothing may fail, every text must
be what it is without a storm, and nothing may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from crumplezone import Batch, Decoder, Llama, SafeBatchProcessor, embedded_model
from crumplezone.reports.store.store import Store

_SIGNALS = {
    signal.SIGKILL: 50, signal.SIGSEGV: 14, signal.SIGABRT: 6, signal.SIGBUS: 5, signal.SIGFPE: 3,
    signal.SIGILL: 3, signal.SIGTERM: 6, signal.SIGSTOP: 8, signal.SIGHUP: 3,
}  # fmt: skip
_ALL_AT_ONCE = 0.15  # of the times, every process is hit
_USUAL = 12  # processes: with fewer, fewer are hit, or the last one would be hit all the time
_GOES_ON = 0.7  # of those that are stopped
_STOPPED = 1.5  # seconds, at most
_DEADLINE = 30.0  # seconds of a call
_LEFT = 10.0  # seconds in which processes may end after everything is closed
_WORDS = ("hello world", "the world", "a hello", "tell the tale", "one two three", "in the town")


def strike(root: int, seed: int, mean: float, seconds: float) -> Counter[str]:
    """Send signals to the descendants of a process, until it ends or the time is over.

    Args:
        root: Its process id.
        seed: Of what is hit when, and by what.
        mean: Seconds between two of them, where the usual number of processes runs.
        seconds: At most.
    """
    rng, end, sent = random.Random(seed), time.monotonic() + seconds, Counter[str]()
    process, stopped = psutil.Process(root), list[tuple[float, psutil.Process]]()
    with contextlib.suppress(psutil.Error):  # it has ended
        while (now := time.monotonic()) < end:
            for due, victim in list(stopped):
                if due <= now:
                    _send(victim, signal.SIGCONT)
                    stopped.remove((due, victim))
            victims = [each for each in process.children(recursive=True) if each.pid != os.getpid()]
            hit = victims if rng.random() < _ALL_AT_ONCE else _one_of(victims, rng)
            for victim in hit:
                (signum,) = rng.choices(list(_SIGNALS), list(_SIGNALS.values()))
                _send(victim, signum)
                sent[signum.name] += 1
                if signum == signal.SIGSTOP and rng.random() < _GOES_ON:
                    stopped.append((now + rng.random() * _STOPPED, victim))
            time.sleep(min(rng.expovariate(1 / mean), 10 * mean))
    for _, victim in stopped:
        _send(victim, signal.SIGCONT)
    return sent


def _one_of(victims: list[psutil.Process], rng: random.Random) -> list[psutil.Process]:
    place = rng.randrange(max(len(victims), _USUAL))
    return victims[place : place + 1]


def _send(process: psutil.Process, signum: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):  # it has ended
        process.send_signal(signum)


class Work:
    """What runs in a storm: each kind of it gives the same every time.

    Args:
        model: Path of a model.
        reports: The report store.
        prompts: How many are completed in a round.
    """

    def __init__(self, model: str, reports: Path, prompts: int) -> None:
        common: dict[str, Any] = {"n_threads": 1, "reports": reports, "deadline": _DEADLINE}
        self._stack = contextlib.ExitStack()
        enter = self._stack.enter_context
        self._decoder = enter(Decoder(model, n_ctx=1024, n_seq_max=4, workers=2, **common))
        self._memory = enter(Decoder(model, n_ctx=512, n_seq_max=2, start="spawn", **common))
        self._safe = enter(SafeBatchProcessor(model, n_threads=1, reports=reports, deadline=_DEADLINE))
        self._llama: Any = Llama(model, n_ctx=256, verbose=False, **common)
        self._stack.callback(self._llama.close)
        self._prompts = [f"{_WORDS[i % len(_WORDS)]} {i}" for i in range(prompts)]

    @property
    def kinds(self) -> dict[str, Callable[[], Any]]:
        """By name: what runs, and returns what must be equal."""
        return {
            "prompts": self.complete,
            "stream": self.stream,
            "session": self.session,
            "llama": self.chat,
            "embeddings": self.embed,
            "safe": self.alone,
        }

    def complete(self) -> list[str]:
        """The text of each prompt, or what it failed with."""
        completions = self._decoder.generate(self._prompts, max_tokens=16)
        return [repr(each.error) if each.error else each.text for each in completions]

    def stream(self) -> str:
        """A stream of the decoder."""
        return "".join(self._decoder.submit_prompt(_WORDS[0], max_tokens=48))

    def session(self) -> list[int]:
        """Greedy tokens by way of the memory."""
        self._memory.memory.clear()
        tokens: list[int] = self._memory.tokenize(_WORDS[3]).tolist()
        new = tokens
        for _ in range(16):
            batch = Batch(len(new), 1)
            batch.add_sequence(0, new)
            result = self._memory.decode(batch)
            new = [int(result.logits(0)[-1].argmax())]
            tokens = tokens + new
        return tokens

    def chat(self) -> str:
        """A stream of `Llama`."""
        pieces = self._llama.create_completion(_WORDS[4], max_tokens=32, temperature=0.0, stream=True)
        return "".join(piece["choices"][0]["text"] for piece in pieces)

    def embed(self) -> list[list[float]]:
        """Vectors, rounded."""
        vectors = self._decoder.embed(self._prompts[:16]).vectors
        rounded: list[list[float]] = np.round(vectors[:, :8].astype(float), 2).tolist()
        return rounded

    def alone(self) -> list[int]:
        """Sequences, one by one."""
        result = self._safe.decode(Batch.of([[1, 5, 6], [1, 7]]))
        return [int(result.logits(i)[-1].argmax()) for i in (0, 1)]

    def close(self) -> None:
        """End all of it."""
        self._stack.close()


def storm(model: str, seed: int, seconds: float, *, mean: float, prompts: int) -> list[str]:
    """One storm; what was wrong with it."""
    problems: list[str] = []
    rounds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        reports = Path(directory, "reports")
        before = _descriptors()
        work = Work(model, reports, prompts)
        expected = {name: run() for name, run in work.kinds.items()}
        end = time.monotonic() + seconds

        def go_on(name: str, run: Callable[[], Any]) -> None:
            try:
                while time.monotonic() < end:
                    if problem := _difference(expected[name], run()):
                        problems.append(f"{name}, round {rounds[name]}: {problem}")
                    rounds[name] += 1
            except BaseException:  # noqa: BLE001 - whatever it is, it is the failure that is looked for
                problems.append(f"{name}, round {rounds[name]}: {traceback.format_exc()}")

        threads = [threading.Thread(target=go_on, args=each, name=each[0]) for each in work.kinds.items()]
        command = [
            sys.executable,
            "-m",
            "benchmarks.storm",
            "--strike",
            f"{os.getpid()}",
            "--seed",
            f"{seed}",
        ]
        options = ["--seconds", f"{seconds}", "--mean", f"{mean}"]
        with _run(threads), subprocess.Popen([*command, *options]):
            pass
        work.close()
        written = Counter(row.exit for row in Store(reports).rows())
        problems += _left(before)
    print(
        f"seed {seed}: rounds {dict(rounds)}, reports {dict(written)}, {len(problems)} problems", flush=True
    )
    for problem in problems:
        print(problem, flush=True)
    return problems


@contextlib.contextmanager
def _run(threads: list[threading.Thread]) -> Iterator[None]:
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def _difference(expected: Any, found: Any) -> str:
    if expected == found:
        return ""
    if not isinstance(expected, list):
        return f"{found!r} in the place of {expected!r}"
    wrong = [i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    return f"{len(wrong)} differ; [{wrong[0]}] is {found[wrong[0]]!r} in the place of {expected[wrong[0]]!r}"


def _descriptors() -> Counter[str]:
    """What is open, by name."""
    gc.collect()
    names = Counter[str]()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names[each.readlink().name.partition("[")[0]] += 1
    return names


def _left(before: Counter[str]) -> list[str]:
    """What is still there once all is closed. The collector ends what nobody closed on threads of its own."""
    end = time.monotonic() + _LEFT
    while True:
        left = [f"left: {each}" for each in psutil.Process().children(recursive=True)]
        left += [f"left: {each}" for each in threading.enumerate() if each is not threading.main_thread()]
        left += [f"left: {name} {n} times" for name, n in (_descriptors() - before).items()]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def main() -> None:
    """Run the storms, and exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--mean", type=float, default=0.3, help="seconds between two signals")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--strike", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.strike:
        print(f"sent: {dict(strike(given.strike, given.seed, given.mean, given.seconds))}", flush=True)
        return
    for name in ("crumplezone", "llama.cpp"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    problems = []
    for seed in range(given.seed, given.seed + given.seeds):
        problems += storm(given.model, seed, given.seconds, mean=given.mean, prompts=given.prompts)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
