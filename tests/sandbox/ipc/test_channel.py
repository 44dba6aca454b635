"""What comes from another process and is no frame, and a peer that does not read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from crumplezone.errors import InputError
from crumplezone.sandbox.ipc.channel import (
    Ask,
    Channel,
    ChannelClosed,
    FromChild,
    FromSupervisor,
    ProtocolError,
    Reply,
    decoded,
)

DEEP = b"\x91" * 100_000 + b"\x00"
REPLY = b"\x83\xa4type\xa5reply\xa2id\x01\xa4body"


class Number(msgspec.Struct, frozen=True):
    value: int


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        DEEP,
        REPLY + DEEP,
        b"\x81\xa5extra" + DEEP,  # of a field that nobody knows
        b"\x81\xa4type\xa2\xff\xff",  # no UTF-8
        b"\xdd\xff\xff\xff\xff\x01",  # an array of four thousand million
    ],
)
def test_what_is_no_frame_is_a_protocol_error(data: bytes) -> None:
    for kind in (FromChild, dict[str, object], Number):
        with pytest.raises(ProtocolError):
            decoded(msgspec.msgpack.Decoder(kind).decode, data)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1e999999", b'"\xff"'])
def test_json_likewise(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decoded(msgspec.json.Decoder(Number).decode, text)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Channel(ours, FromChild), Channel(theirs, FromSupervisor)


def frame(number: int) -> Ask:
    return Ask(number, msgspec.Raw(b"\x00"))


def test_nobody_waits_for_a_peer_that_does_not_read(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.post(frame(1))
    with pytest.raises(ProtocolError, match="not read"):
        ours.post(frame(2))
    assert len(theirs.sock.recv(100)) > 0
    ours.post(frame(3), [0])  # and descriptors, behind it
    with pytest.raises(ProtocolError, match="not read"):
        ours.post(frame(4))
    theirs.sock.close()
    with pytest.raises(ChannelClosed):
        ours.post(frame(5))


def test_a_frame_that_is_too_large_is_not_sent(ends: tuple[Channel, Channel]) -> None:
    ours, _ = ends
    for send in (ours.send, ours.post):
        with pytest.raises(InputError, match="at most 131072 bytes"):
            send(Reply(1, msgspec.Raw(msgspec.msgpack.encode(b"x" * 200_000))))
    ours.post(frame(1))  # nothing of it was left there
