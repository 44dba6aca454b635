"""The directory of a diagnostic run: its log, its journal, and what is rendered of it in the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from crumplezone.errors import InputError, ReportError, check_local
from crumplezone.reports.formats import junit, sarif, summary
from crumplezone.reports.html import page
from crumplezone.reports.printable import printable
from crumplezone.reports.records import run as runs
from crumplezone.reports.records.report import Report
from crumplezone.reports.records.run import CaseRecord, RunRecord
from crumplezone.reports.store import files
from crumplezone.reports.store.store import Store

JOURNAL, LOG, RUN, REPORTS, SUMMARY = "journal.jsonl", "run.log", "run.json", "reports", "summary.md"
_RENDERED = (RUN, "junit.xml", "results.sarif", SUMMARY, "index.html")
_MAX_JOURNAL = 256 << 20
_HEAD = b'{"plan":'
_ANEW = "without --resume it starts anew"
_READABLE = 0o666  # less the umask, as its other files: it holds no prompts
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no file elsewhere, and no FIFO that waits

_log = logging.getLogger("crumplezone.ci")


class _Header(msgspec.Struct, frozen=True):
    """The first line of the journal: which run it is."""

    plan: str
    started_at: str


class _Lines(logging.Formatter):
    """Records may quote a crashed child: each is one line and no escape codes, but for our own tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class Output:
    """The directory, for one run at a time.

    Args:
        directory: Made if it is missing.
        start: What is known of the run; a file says that it is incomplete, whatever comes.
        plan: A digest of everything that the results depend on.
        resume: Keep the finished cases of an interrupted run of the same plan.

    Attributes:
        done: The finished cases that are kept, by id.
        started_at: When the run began, which may be an earlier time.
        log: Where log records go, of this process and of others.

    Raises:
        InputError: It cannot be written, another run is writing it, or it holds another plan.
    """

    def __init__(self, directory: Path, start: RunRecord, plan: str, *, resume: bool) -> None:
        self.directory = directory
        self.store = Store(directory / REPORTS)
        self.done: dict[str, CaseRecord] = {}
        self.started_at = start.started_at
        with contextlib.ExitStack() as undo:
            try:
                self._fd = self._take()
                undo.callback(os.close, self._fd)
                os.close(os.open(directory / LOG, os.O_WRONLY | os.O_CREAT | _SAFELY, 0o666))
                self._begin(start, plan, resume=resume)
                self.log = logging.FileHandler(directory / LOG, "a" if self.done else "w", encoding="utf-8")
            except OSError as error:
                raise self._unwritable(error) from error
            undo.pop_all()
        self.log.setFormatter(_Lines("%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"))

    def append(self, case: CaseRecord) -> None:
        """Keep a finished case, whatever becomes of this process.

        Raises:
            InputError: The disk is full, or it cannot be written any more.
        """
        try:
            self._append(case)
        except OSError as error:
            raise self._unwritable(error) from error

    def reports(self, run: RunRecord) -> dict[str, Report]:
        """The crash reports of a run, by id; what cannot be read is missing, and the log says why."""
        found = {}
        for name in dict.fromkeys(case.report for case in run.cases if case.report):
            try:
                found[name] = self.store.read(name)
            except ReportError as error:
                _log.warning("%s", error)
        return found

    def render(self, run: RunRecord, reports: Mapping[str, Report]) -> None:
        """Write everything that people and services read.

        Raises:
            InputError: It cannot be written.
        """
        rendered = (
            runs.encode(run),
            junit.render(run, reports),
            json.dumps(sarif.render_run(run, reports), indent=1).encode(),
            summary.render(run).encode(),
            page.render(run, list(reports.values()), self.store.rows(), self.store.counts()).encode(),
        )
        try:
            for name, data in zip(_RENDERED, rendered, strict=True):
                files.replace(self.directory, name, data, mode=_READABLE)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Release the directory."""
        self.log.close()
        os.close(self._fd)

    def _take(self) -> int:
        """Open the journal, which is locked as long as this run goes on."""
        journal = self.directory / JOURNAL
        if not journal.exists() and (other := [n for n in _RENDERED if (self.directory / n).exists()]):
            raise self._refused(f"has a {other[0]}, but no {JOURNAL} of a run that wrote it: name another")
        check_local("--out", self.directory)
        self.store.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(self.store.directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{REPORTS} is not writable")
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | _SAFELY, 0o666)
        try:
            if os.pread(descriptor, len(_HEAD), 0) not in {b"", _HEAD}:
                raise self._refused(f"has a {JOURNAL} that is of no run: name another directory")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise self._refused("is being written by another run: wait for that one") from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _begin(self, start: RunRecord, plan: str, *, resume: bool) -> None:
        if resume:
            self._resume(plan)
        for name in _RENDERED:
            (self.directory / name).unlink(missing_ok=True)
        if not self.done:
            os.ftruncate(self._fd, 0)
            self._append(_Header(plan, self.started_at))
        files.replace(self.directory, RUN, runs.encode(start), mode=_READABLE)

    def _unwritable(self, error: OSError) -> InputError:
        return self._refused(f"cannot be written: {error.strerror}; make room, or name another directory")

    def _append(self, line: msgspec.Struct) -> None:
        data = memoryview(msgspec.json.encode(line) + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]

    def _resume(self, plan: str) -> None:
        """Read the journal, if there is one; its last line may have been cut by a kill."""
        if os.fstat(self._fd).st_size > _MAX_JOURNAL:
            raise self._refused(f"has a {JOURNAL} of more than {_MAX_JOURNAL} bytes; {_ANEW}")
        whole = os.pread(self._fd, _MAX_JOURNAL, 0).rpartition(b"\n")[0].split(b"\n")
        if whole == [b""]:
            return
        try:
            header = msgspec.json.decode(whole[0], type=_Header)
            cases = [msgspec.json.decode(line, type=CaseRecord) for line in whole[1:]]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._refused(f"has a {JOURNAL} that cannot be read ({error}); {_ANEW}") from error
        if header.plan != plan:
            raise self._refused(f"holds a run of another matrix, model, shard or version; {_ANEW}")
        os.ftruncate(self._fd, sum(len(line) + 1 for line in whole))
        self.started_at = header.started_at
        # Of an error of the infrastructure nothing is known: it is tried again.
        self.done = {case.id: case for case in cases if case.ending is not runs.Ending.ERROR}

    def _refused(self, limit: str) -> InputError:
        return InputError("--out", str(self.directory), limit)
