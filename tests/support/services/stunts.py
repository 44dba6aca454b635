"""The stunt double: a service that misbehaves on demand, for real, in a real cell."""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import mmap
import os
import signal
import socket
import sys
import threading
from typing import Any

import msgspec

from crumplezone.sandbox.child import loop
from crumplezone.sandbox.child.loop import Room
from crumplezone.sandbox.ipc.channel import LogLine, Ping, Reply
from tests.support.services import refuse


class Config(msgspec.Struct):
    """``at_start`` names a stunt to perform before the cell is ready."""

    at_start: str = ""


class Info(msgspec.Struct):
    """``seed`` is the process id of the zygote that handed over its seed."""

    pid: int
    seed: int = 0


class Stunt(msgspec.Struct, tag="stunt"):
    name: str
    amount: int = 0


class Echo(msgspec.Struct):
    text: str
    amount: int = 0


def _segv() -> None:
    ctypes.memset(0x18, 1, 1)


def _undumpable_segv() -> None:
    refuse.being_read()
    _segv()


def _fpe() -> None:
    _run_code(b"\x31\xc9\x31\xd2\xb8\x07\x00\x00\x00\xf7\xf9\xc3")  # 7 / 0


def _ill() -> None:
    _run_code(b"\x0f\x0b")  # ud2


def _run_code(code: bytes) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CFUNCTYPE(None)(address)()


def _bus() -> None:
    fd = os.memfd_create("bus")
    os.ftruncate(fd, mmap.PAGESIZE)
    page = mmap.mmap(fd, mmap.PAGESIZE)
    os.ftruncate(fd, 0)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(page)), 1, 1)


def _stack_overflow() -> None:
    _run_code(b"\x48\x81\xec\x00\x10\x00\x00\x6a\x01\xeb\xf5")  # sub rsp,4096; push 1; jmp to the start


def _ggml_abort(room: Room) -> None:
    from crumplezone.workers.native import model as native_model

    voices = native_model.NativeLogs(room)  # the callback must outlive the abort
    assert voices.last_error == ""
    native_model.ggml().ggml_abort(b"stunts.py", 7, b"GGML_ASSERT(%s) failed", b"stunt == double")


def _terminate() -> None:
    ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev()


def _exit_native() -> None:
    ctypes.CDLL(None).exit(1)


def _hang() -> None:
    ctypes.CDLL(None).pause()


def _spin() -> None:
    _run_code(b"\xeb\xfe")  # jmp to itself


def _balloon() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    while True:
        ctypes.memset(libc.malloc(1 << 22), 1, 1 << 22)


def _close_socket(room: Room) -> None:
    room.sock.shutdown(2)
    threading.Event().wait()


def _flood() -> None:
    for _ in range(512):
        os.write(2, b"flood " * 1024)
    os.write(2, b"last words\n")


def _garbage(room: Room) -> None:
    room.sock.send(b"\xc1 not a frame")


def _log() -> None:
    logging.getLogger("stunts.voice").warning("line %d", 1, extra={"odd": object()})


def _fake_fault() -> None:
    while True:
        os.write(int(sys.argv[3]), b"x" * 4096)  # the fault pipe, as the child was told


def _shout() -> None:
    log = socket.socket(fileno=os.dup(int(sys.argv[2])))
    for _ in range(20):
        log.send(msgspec.msgpack.encode(LogLine("stunts.voice", 10, "A" * 100_000, 0.0)))


def _thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def _stray_reply() -> None:
    """Answer pings with something else from now on."""
    loop.__dict__["Pong"] = lambda: Reply(7, msgspec.Raw(b"\xc0"))


def _stray_frame() -> None:
    loop.__dict__["Pong"] = Ping


def _log_and_hang() -> None:
    _log()
    _hang()


class Double:
    """Serves `Stunt` requests. It can be the seed of a zygote too."""

    request_type: Any = Stunt

    def __init__(self, config: msgspec.Raw, room: Room, seed: Double | None = None) -> None:
        self.pid: int = os.getpid()
        self._room, self._seed = room, seed.pid if seed else 0
        at_start = msgspec.msgpack.decode(config, type=Config).at_start
        if at_start:
            self.handle(Stunt(at_start))

    def info(self) -> Info:
        return Info(os.getpid(), self._seed)

    def handle(self, request: Stunt) -> Echo:
        with self._room.recorder.phase("stunt", request.amount):
            return self._perform(request)

    def _perform(self, request: Stunt) -> Echo:
        name = request.name
        if name == "raise":
            raise ValueError("refused on demand")
        if name == "arena":
            (numbers,) = self._room.arena.arrays([("i4", request.amount)])
            numbers[:] *= 2
        elif name in {"kill", "term"}:
            os.kill(os.getpid(), signal.SIGKILL if name == "kill" else signal.SIGTERM)
        elif name in {"close_socket", "garbage", "ggml_abort"}:
            globals()[f"_{name}"](self._room)
        elif name != "echo":
            globals()[f"_{name}"]()
        sys.stderr.flush()
        return Echo(name, request.amount)
