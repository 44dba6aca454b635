"""What can become of the helper that takes the stacks of a held cell."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from crumplezone.reports.records.report import Thread
from crumplezone.sandbox.autopsy import autopsy, stacks

Helper = subprocess.Popen[bytes]


def at_birth(monkeypatch: pytest.MonkeyPatch, do: Callable[[Helper], object]) -> None:
    """Do something to each helper as soon as its process is there."""
    start = stacks._start

    def started(*args: Any) -> Helper:
        helper = start(*args)
        do(helper)
        return helper

    monkeypatch.setattr(stacks, "_start", started)


def kill_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    at_birth(monkeypatch, lambda helper: helper.send_signal(signal.SIGKILL))


def autopsies(monkeypatch: pytest.MonkeyPatch) -> list[autopsy._Seen]:
    """What each autopsy from now on has seen: both stacks of the crashed thread."""
    found: list[autopsy._Seen] = []
    threads = autopsy._threads

    def note(seen: autopsy._Seen) -> list[Thread]:
        found.append(seen)
        return threads(seen)

    monkeypatch.setattr(autopsy, "_threads", note)
    return found
