"""A listener that keeps what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from crumplezone.workers.observe.events import Event


class Heard:
    """What was told so far, and a way to wait for more."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, done: Callable[[], bool], seconds: float = 60) -> None:
        with self._more:
            assert self._more.wait_for(done, seconds), self.events[-5:]


@pytest.fixture
def heard() -> Heard:
    return Heard()
