"""Log records of forks reach the handler of the process that forked them, whatever becomes of the fork."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from crumplezone.sandbox.process.log_relay import LogRelay
from tests.support.decoders import descriptors, forks_with_threads, opened_since

FORK = multiprocessing.get_context("fork")


class Kept(logging.Handler):
    """Keeps records, and raises at some."""

    def __init__(self) -> None:
        super().__init__(logging.CRITICAL)  # the relay has no levels: the fork's loggers have
        self.records: list[logging.LogRecord] = []
        self.closed = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "raise":
            raise ZeroDivisionError(record.msg)
        self.records.append(record)

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    before, threads = descriptors(), set(threading.enumerate())
    yield handler
    assert opened_since(before) == []
    assert {each for each in threading.enumerate() if each.name != "logs"} <= threads
    assert not handler.closed  # it is not the relay's
    handler.close()


def relayed(handler: logging.Handler, do: Callable[[LogRelay], object]) -> int | None:
    """Have a fork do something, and all of its records received; its exit code."""
    relay = LogRelay("test-log", handler)

    def serve() -> None:
        relay.take_over()
        do(relay)

    fork = FORK.Process(target=serve)
    with forks_with_threads():
        fork.start()
    relay.leave_sending()
    fork.join()
    relay.close()
    return fork.exitcode


def talk(_: LogRelay) -> None:
    log = logging.getLogger("voice")
    log.warning("%s and %s", 1, object, extra={"job": {2}})
    try:
        raise ValueError("seen")
    except ValueError:
        log.exception("caught")


def test_records_arrive_with_all_that_formatters_ask_of_them(kept: Kept) -> None:
    assert relayed(kept, talk) == 0
    first, second = kept.records
    assert (first.name, first.levelname, first.getMessage()) == ("voice", "WARNING", "1 and <class 'object'>")
    assert (first.funcName, first.process == os.getpid()) == ("talk", False)
    assert vars(first)["job"] == "{2}"  # no object of the fork's
    assert second.exc_info is None
    assert logging.Formatter().format(second).endswith("ValueError: seen")


def test_what_is_logged_last_before_a_kill_arrives(kept: Kept) -> None:
    def die(_: LogRelay) -> None:
        for n in range(100):
            logging.getLogger("voice").warning("%d", n)
        os.kill(os.getpid(), signal.SIGKILL)

    assert relayed(kept, die) == -signal.SIGKILL
    assert [record.msg for record in kept.records] == [str(n) for n in range(100)]


def test_a_handler_that_raises_loses_that_record_only(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    def talk_on(_: LogRelay) -> None:
        for word in ("before", "raise", "after"):
            logging.getLogger("voice").warning(word)

    assert relayed(kept, talk_on) == 0
    assert [record.msg for record in kept.records] == ["before", "after"]
    assert "ZeroDivisionError: raise" in capsys.readouterr().err


RECORD = {**vars(logging.makeLogRecord({})), "name": "x"}


@pytest.mark.parametrize(
    "lie",
    [
        b"\xc1",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({"msg": "no more than that"}),
        msgspec.msgpack.encode(RECORD | {"created": 1e300}),
        msgspec.msgpack.encode(RECORD | {"exc_info": "text"}),
        msgspec.msgpack.encode(RECORD | {"levelno": [1]}),
        b"\xff" * 200_000,
    ],
)
def test_what_is_no_record_is_told_and_left_out(kept: Kept, lie: bytes) -> None:
    def talk_lie_talk(relay: LogRelay) -> None:
        logging.getLogger("voice").warning("before")
        relay.sender._sock.send(lie)
        logging.getLogger("voice").warning("after")

    assert relayed(kept, talk_lie_talk) == 0
    told = "a log record came that does not decode"
    assert [record.msg for record in kept.records] == ["before", told, "after"]


def test_nobody_waits_for_a_relay_that_has_ended(kept: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    def end_it(relay: LogRelay) -> None:
        relay.sender._sock.send(b"")
        for _ in range(1000):  # more than the socket holds
            logging.getLogger("voice").warning("x" * 8192)

    assert relayed(kept, end_it) == 0
    assert "BrokenPipeError" in capfd.readouterr().err


def test_a_record_that_is_too_large_is_told_of_where_it_is_logged(
    kept: Kept, capfd: pytest.CaptureFixture[str]
) -> None:
    def talk_long(_: LogRelay) -> None:
        logging.getLogger("voice").warning("x" * 10_000)
        logging.getLogger("voice").warning("x", extra={f"extra{n}": "x" * 8000 for n in range(20)})

    assert relayed(kept, talk_long) == 0
    assert [record.msg for record in kept.records] == ["x" * 8192]
    assert "at most 131072" in capfd.readouterr().err


def test_it_is_closed_before_the_fork_ends(kept: Kept) -> None:
    relay = LogRelay("test-log", kept)
    told, to_tell = FORK.Pipe(duplex=False)

    def serve() -> None:
        relay.take_over()
        logging.getLogger("voice").warning("once")
        to_tell.send(None)
        signal.pause()

    fork = FORK.Process(target=serve)
    with forks_with_threads():
        fork.start()
    told.recv()
    relay.close()
    assert [record.msg for record in kept.records] == ["once"]
    fork.kill()
    fork.join()
    for each in (told, to_tell, fork):
        each.close()
