"""A service that calls `crashlib.cpp` in a cell: any of its faults, on any kind of thread."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import msgspec

KINDS = (
    *("null", "abort", "stack overflow", "double free", "division", "illegal instruction", "terminate"),
    *("jump to null", "truncated file", "non-canonical", "smashed stack", "write to read-only"),
    "throw through ctypes",
)
BUILD_ID = "00c0ffee00c0ffee"


def build(directory: Path) -> Path:
    """Compile crashlib.cpp, the same wherever: a distribution may switch stack protection on."""
    library = directory / "libcrash.so"
    options = ["-O1", "-fPIC", "-shared", "-fno-stack-protector", f"-Wl,--build-id=0x{BUILD_ID}"]
    source = Path(__file__).with_name("crashlib.cpp")
    subprocess.run(["g++", *options, "-o", library, source, "-pthread"], check=True)
    return library


class Config(msgspec.Struct):
    """``preload`` is a module to import first, so that the process is as large as a real one."""

    library: str
    preload: str = ""


class Info(msgspec.Struct):
    read_only: int  # address of the constant that "write to read-only" writes to


class Crash(msgspec.Struct, tag="crash"):
    kind: str
    thread: str  # "main", "python" or "native"


class Survived(msgspec.Struct):
    pid: int


def call_native(library: ctypes.CDLL, function: str, kind: int) -> None:
    getattr(library, function)(kind)


class Faults:
    """Serves `Crash` requests, each of which should be its last."""

    request_type: Any = Crash

    def __init__(self, config: msgspec.Raw, *_: object) -> None:
        decoded = msgspec.msgpack.decode(config, type=Config)
        if decoded.preload:
            __import__(decoded.preload)
        self._library = ctypes.CDLL(decoded.library)

    def info(self) -> Info:
        return Info(ctypes.addressof(ctypes.c_long.in_dll(self._library, "crash_read_only")))

    def handle(self, request: Crash) -> Survived:
        kind = KINDS.index(request.kind)
        function = "crash_in_pthread" if request.thread == "native" else "crash"
        if request.thread == "python":
            thread = threading.Thread(target=call_native, args=(self._library, function, kind))
            thread.start()
            thread.join()
        else:
            call_native(self._library, function, kind)
        return Survived(os.getpid())
