"""``crumplezone run``: prompts from a file, completions appended to another, restartable at any point."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crumplezone.cli.output import is_quiet
from crumplezone.errors import InputError
from crumplezone.reports.store import files
from crumplezone.workers.decoder import Decoder
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.request import RequestOptions
from crumplezone.workers.model.file import embedded_model


@dataclass(frozen=True)
class Job:
    """What ``crumplezone run`` was asked to do."""

    prompts: str
    out: Path
    model: Path | None
    options: RequestOptions
    n_seq_max: int
    workers: int
    n_ctx: int
    reports: Path | None


class _Line(msgspec.Struct):
    """A line of a .jsonl input; other keys are ignored."""

    prompt: str


_LINE_HEAD = b'{"index":'


class Written(msgspec.Struct, omit_defaults=True):
    """A line of the output."""

    index: int
    prompt: str
    completion: str
    n_tokens: int
    finish_reason: str
    rung: str
    error: str | None = None
    reports: list[str] = []


def read_prompts(source: str) -> list[str]:
    """All prompts of a file or of stdin.

    Raises:
        InputError: The file cannot be read; a line is not valid; a prompt is empty. Names the line.
    """
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError("--prompts", source, f"cannot be read: {error.strerror}") from error
    lines = files.unmarked(raw).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    is_json = source.endswith((".jsonl", ".json"))
    prompts = [_prompt(line.rstrip(b"\r"), number, is_json=is_json) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise InputError("--prompts", source, "has no line; give it one prompt a line")
    return prompts


def _prompt(line: bytes, number: int, *, is_json: bool) -> str:
    field = f"line {number} of the prompts"
    try:
        prompt = msgspec.json.decode(line, type=_Line).prompt if is_json else line.decode("utf-8")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        wanted = 'a JSON object with a text "prompt"' if is_json else "UTF-8 text"
        raise InputError(
            field, line[:80].decode("utf-8", "replace"), f"must be {wanted} ({error})"
        ) from error
    if not prompt.strip():
        raise InputError(field, prompt, "must hold a prompt of at least one character; else remove it")
    return prompt


class Output:
    """The output file: append-only, one writer, whole lines.

    Args:
        path: Created if missing.
        prompts: Every line already there must answer one of these.

    Raises:
        InputError: It cannot be written, is in use, or belongs to other prompts.
    """

    def __init__(self, path: Path, prompts: list[str]) -> None:
        self.path = path
        try:
            self._fd = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
            )
        except OSError as error:
            raise InputError("--out", str(path), f"cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise InputError("--out", str(path), "must be a regular file")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read_done(prompts)
        except BlockingIOError as error:
            os.close(self._fd)
            raise InputError("--out", str(path), "another run is writing it; wait for that one") from error
        except BaseException:
            os.close(self._fd)
            raise

    def _read_done(self, prompts: list[str]) -> set[int]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        remedy = "is not an answer to these prompts; give another --out"
        done: set[int] = set()
        for number, line in enumerate(files.unmarked(data[:whole]).splitlines(), 1):
            field = f"line {number} of --out {self.path}"
            try:
                written = msgspec.json.decode(line, type=Written)
            except (msgspec.MsgspecError, RecursionError) as error:
                raise InputError(field, line[:80].decode("utf-8", "replace"), remedy) from error
            if not 0 <= written.index < len(prompts) or prompts[written.index] != written.prompt:
                raise InputError(field, written.prompt, remedy)
            done.add(written.index)
        cut = data[whole:]
        if cut and not (cut.startswith(_LINE_HEAD) or _LINE_HEAD.startswith(cut)):
            raise InputError(
                f"the last line of --out {self.path}", cut[:80].decode("utf-8", "replace"), remedy
            )
        if cut:  # our line, cut by a kill: its prompt is done again
            os.ftruncate(self._fd, whole)
        return done

    def append(self, completion: Completion) -> None:
        """Write one line at once."""
        assert isinstance(completion.prompt, str)
        line = Written(
            index=completion.index,
            prompt=completion.prompt,
            completion=completion.text,
            n_tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            rung=completion.rung,
            error=str(completion.error) if completion.error else None,
            reports=list(completion.reports),
        )
        data = memoryview(msgspec.json.encode(line) + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            remedy = (
                f"cannot be written: {error.strerror}. What is there is kept; make room and run this again"
            )
            raise InputError("--out", str(self.path), remedy) from error

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=is_quiet() or not console.is_terminal) as progress:
        progress.add_task("prompts", total=total, completed=done)
        yield progress


def complete(job: Job) -> int:
    """Run the job; returns how many of its prompts failed (in this run).

    Raises:
        InputError: The prompts or the output are unusable.
        ModelError: The model cannot be loaded.
    """
    prompts = read_prompts(job.prompts)
    console = Console(stderr=True, highlight=False)
    output = Output(job.out, prompts)
    with contextlib.closing(output):
        todo = {i: prompt for i, prompt in enumerate(prompts) if i not in output.done}
        failed, reports = 0, set[str]()
        if todo:
            with (
                Decoder(
                    job.model or embedded_model(),
                    n_ctx=job.n_ctx,
                    n_seq_max=job.n_seq_max,
                    workers=job.workers,
                    reports=job.reports,
                ) as decoder,
                _progress(console, len(prompts), len(output.done)) as progress,
                contextlib.closing(decoder.complete(todo.items(), **job.options)) as completions,
            ):
                for completion in completions:
                    output.append(completion)
                    failed += completion.error is not None
                    reports.update(completion.reports)
                    progress.advance(progress.task_ids[0])
    if is_quiet() and not failed:
        return 0
    kept = f" ({len(output.done)} were there already)" if output.done else ""
    console.print(
        f"{len(prompts)} prompts: {len(todo)} done now{kept}, {failed} failed -> {job.out}", markup=False
    )
    for path in sorted(reports):
        console.print(f"crash report: {path}", markup=False, soft_wrap=True)
    return failed
