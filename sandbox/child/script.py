"""Child side: a cell that runs a Python file, so that a crash of it is held and examined like any other."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import msgspec

TARGET = f"{__name__}:ScriptCell"


class ScriptConfig(msgspec.Struct, frozen=True):
    """A file, and its ``sys.argv[1:]``."""

    path: str
    arguments: list[str] = []


class RunScript(msgspec.Struct, tag="run_script", frozen=True):
    """Run the file as ``__main__``."""


class Finished(msgspec.Struct, frozen=True):
    """It came to its end: the status it would have exited with, or the message in place of one."""

    status: int | str


class ScriptCell:
    """Runs a file, on request.

    Args:
        config: An encoded `ScriptConfig`.
    """

    request_type: Any = RunScript

    def __init__(self, config: msgspec.Raw, *_: object) -> None:
        self._config = msgspec.msgpack.decode(config, type=ScriptConfig)

    def info(self) -> ScriptConfig:
        """What it runs."""
        return self._config

    def handle(self, _: RunScript) -> Finished:
        """Run it; an exception other than SystemExit is the cell's answer."""
        sys.argv = [self._config.path, *self._config.arguments]
        try:
            runpy.run_path(self._config.path, run_name="__main__")
        except SystemExit as end:
            return Finished(end.code if isinstance(end.code, int | str) else 0)
        return Finished(0)
