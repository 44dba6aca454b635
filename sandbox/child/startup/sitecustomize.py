"""Child side: what every Python under `crumplezone exec` imports first (site, "sitecustomize").

It arms the process and then steps aside. The program runs as its interpreter would run it: no frame, no
argument and no entry of sys.path is ours. It needs the standard library only: the interpreter may be that of
an environment where Crumplezone is not installed.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would be loaded for this
_ROOM = os.path.dirname(os.path.dirname(_HERE))  # noqa: PTH120 - as above


def _load(name: str) -> ModuleType:
    """A module of this room, by its file."""
    full = f"crumplezone.sandbox.{name}"
    spec = spec_from_file_location(full, f"{_ROOM}/{name.replace('.', '/')}.py")
    assert spec
    assert spec.loader
    sys.modules[full] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arm() -> None:
    before = set(sys.modules)
    try:
        _load("ipc.exit_marks")
        _load("child.arm")
        _load("child.exec_hook").begin()
    except Exception as error:  # noqa: BLE001 - the program has a right to run
        what = f"crumplezone: {sys.executable} (Python {platform.python_version()}) runs unarmed: {error!r}\n"
        os.write(2, what.encode("utf-8", "backslashreplace"))
    for name in set(sys.modules) - before:
        if name.startswith("crumplezone."):
            del sys.modules[name]


def _step_aside() -> None:
    """Leave sys.path as it would be, and import the module that this one has hidden, if there is one."""
    sys.path[:] = [path for path in sys.path if path != _HERE]
    ours = sys.modules.pop(__name__)
    try:
        import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = ours


if __name__ == "sitecustomize":  # not where something else looks through this package
    _arm()
    _step_aside()
