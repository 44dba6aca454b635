"""gevent and eventlet put their own in the place of threads, polls and sockets: those supervise no cell.

A supervisor waits in threads of the operating system, by polls that no event loop knows of. With theirs such
a wait never ends, or living cells are taken for dead; with the real ones it would stop all other greenlets.
"""

from __future__ import annotations

import sys

from crumplezone.errors import UsageError

# Not "time": sleeping is the same in a thread of one's own.
_GEVENT = ("os", "queue", "select", "signal", "socket", "subprocess", "threading")
_EVENTLET = ("os", "select", "socket", "thread")


def _patched() -> dict[str, list[str]]:
    """Which modules, by whom. Who has not been imported has patched nothing."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return {
        "gevent": [name for name in _GEVENT if gevent and gevent.is_module_patched(name)],
        "eventlet": [name for name in _EVENTLET if eventlet and eventlet.is_monkey_patched(name)],
    }


def refuse_patched() -> None:
    """Refuse a process in which the waits of a supervisor would be another's.

    Raises:
        UsageError: It is one.
    """
    for who, names in _patched().items():
        if names:
            raise UsageError(
                f"{who} has monkey-patched {', '.join(names)} in this process, and cells need the real ones: "
                "use workers with real threads (gunicorn -k gthread, celery -P prefork or threads), or give "
                "crumplezone a process of its own, which is not patched"
            )
