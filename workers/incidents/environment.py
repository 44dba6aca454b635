"""Versions and CPU of this machine."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from crumplezone.reports.analysis.redact import VARIABLES
from crumplezone.reports.records.report import (
    Environment,
)
from crumplezone.workers.protocol.config import CellInfo


@functools.cache
def _cpu() -> tuple[str, list[str]]:
    name, flags = "", []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                flags = value.split()
                break
    except OSError:
        pass
    return name, flags


def environment(info: CellInfo | None) -> Environment:
    """Versions and CPU of this machine."""
    cpu, flags = _cpu()
    versions = {
        "crumplezone": importlib.metadata.version("crumplezone"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "llama.cpp": info.llama_cpp if info else "unknown (the model did not load)",
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    variables = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
    return Environment(versions, cpu, flags, info.system_info if info else "", variables)


def libraries() -> list[tuple[str, int, int]]:
    """Name, size and time of what llama.cpp was built into, found without loading it."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")  # as llama_cpp/llama_cpp.py has it
    spec = importlib.util.find_spec("llama_cpp")
    home = Path(chosen) if chosen else Path(spec.origin if spec and spec.origin else "").parent / "lib"
    states = [(path.name, path.stat()) for path in sorted(home.glob("*.so"))]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
