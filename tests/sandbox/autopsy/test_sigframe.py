"""The signal frame: aarch64 from recorded bytes, x86-64 from held processes, both against other readers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.sandbox.autopsy.release import release
from crumplezone.sandbox.autopsy.sigframe import aarch64 as sigframe_aarch64
from crumplezone.sandbox.autopsy.sigframe import x86_64 as sigframe_x86_64
from crumplezone.sandbox.autopsy.sigframe.frame import SignalFrame, mend_null_call, read_signal_frame
from crumplezone.sandbox.autopsy.sigframe.layout import Layout
from crumplezone.sandbox.host.surroundings import Surroundings
from crumplezone.sandbox.ipc.channel import Call, Channel, FromChild, Ready, Start
from crumplezone.sandbox.process.launch import spawn
from crumplezone.sandbox.process.process import Process
from crumplezone.sandbox.process.procfs import current_calls, find_map, is_code, read_at, read_maps
from tests.support.services.faults import Config, Crash, build

RECORDED = json.loads((Path(__file__).parent / "data" / "aarch64_frames.json").read_text())
PROCESSOR_FAULTS = {
    "null_read": ("SEGV_MAPERR", "read"),
    "null_write": ("SEGV_MAPERR", "write"),
    "write_read_only": ("SEGV_ACCERR", "write"),
    "bus": ("BUS_ADRERR", "write"),
    "jump_null": ("SEGV_MAPERR", "exec"),
}
x86_64_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="faults of x86-64")


@pytest.fixture(scope="module")
def crash_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def stack_of(record: dict[str, str]) -> tuple[bytes, int]:
    return zlib.decompress(base64.b85decode(record["stack"])), int(record["base"], 0)


def each_recorded() -> list[object]:
    return [pytest.param(record, id=f"{record['source']} {record['kind']}") for record in RECORDED]


@pytest.mark.parametrize("record", each_recorded())
def test_aarch64_frame_is_what_the_c_library_saw(record: dict[str, str]) -> None:
    saved = sigframe_aarch64.find(*stack_of(record))
    assert saved is not None
    assert saved.address == int(record["frame"], 0)
    names = [*(f"x{n}" for n in range(31)), "sp", "pc", "pstate", "fault_address"]
    assert {name: saved.registers[name] for name in names} == {name: int(record[name], 0) for name in names}
    assert (saved.fault.signal, saved.fault.code) == (int(record["signal"]), int(record["code"]))
    if record["kind"] == "abort":
        assert (saved.fault.code_name, saved.fault.sender_pid) == ("SI_TKILL", int(record["pid"]))
        assert (saved.fault.sender_uid, saved.fault.address) == (0, None)
    else:
        assert saved.fault.address == hex(int(record["address"], 0))
        assert saved.fault.sender_pid is None


@pytest.mark.parametrize("record", each_recorded())
def test_aarch64_access_comes_from_the_syndrome_record(record: dict[str, str]) -> None:
    saved = sigframe_aarch64.find(*stack_of(record))
    assert saved is not None
    by_kernel = record["source"].startswith("linux")
    if record["kind"] in PROCESSOR_FAULTS and by_kernel:
        code_name, access = PROCESSOR_FAULTS[record["kind"]]
        trap = "instruction abort" if access == "exec" else "data abort"
        assert (saved.fault.code_name, saved.fault.access, saved.fault.trap) == (code_name, access, trap)
    else:
        assert "esr" not in saved.registers
        assert (saved.fault.access, saved.fault.trap) == ("", "")


def test_aarch64_return_from_a_jump_to_null_is_in_the_caller() -> None:
    for record in RECORDED:
        if record["kind"] == "jump_null":
            saved = sigframe_aarch64.find(*stack_of(record))
            assert saved is not None
            assert saved.registers["pc"] == 0
            pc, sp = sigframe_aarch64.returned(saved.registers, top=0)
            assert pc == int(record["x30"], 0)
            assert sp == saved.registers["sp"]
            raw, base = stack_of(record)
            for at, name in ((sigframe_aarch64.PC_AT, "pc"), (sigframe_aarch64.SP_AT, "sp")):
                there = raw[saved.address - base + at :][:8]
                assert int.from_bytes(there, "little") == saved.registers[name]


@pytest.mark.parametrize("layout", [sigframe_x86_64, sigframe_aarch64])
@given(stack=st.binary(max_size=2048), base=st.integers(0, 2**64 - 4096))
@settings(max_examples=50)
def test_noise_holds_no_frame(layout: Layout, stack: bytes, base: int) -> None:
    assert layout.find(stack, base) is None


@given(cut=st.integers(0, 8192), at=st.integers(0, 4800), byte=st.integers(0, 255))
@settings(max_examples=100)
def test_cut_and_damaged_stacks_are_no_error(cut: int, at: int, byte: int) -> None:
    stack, base = stack_of(RECORDED[0])
    damaged = bytearray(stack[:cut])
    if at < cut:
        damaged[at] = byte
    saved = sigframe_aarch64.find(bytes(damaged), base)
    assert saved is None or saved.address == int(RECORDED[0]["frame"], 0)


@contextlib.contextmanager
def held(library: Path, kind: str, thread: str, preload: str = "") -> Iterator[Process]:
    """A cell stopped in the middle of a fault, with nobody examining it."""
    process = spawn(Surroundings.here())
    try:
        channel = Channel(process.lines.sock, FromChild)
        config = msgspec.msgpack.encode(Config(str(library), preload))
        channel.send(Start("tests.support.services.faults:Faults", msgspec.Raw(config)))
        assert isinstance(channel.receive(), Ready)
        channel.send(Call(1, msgspec.Raw(msgspec.msgpack.encode(Crash(kind, thread)))))
        assert select.select([process.lines.fault_fd], [], [], 30)[0]
        process.signal(signal.SIGSTOP)
        os.waitid(os.P_PIDFD, process.pidfd, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield process
    finally:
        process.kill()
        process.close()


def read_frame(pid: int) -> SignalFrame | None:
    return read_signal_frame(pid, current_calls(pid), read_maps(pid))


GDB_SCRIPT = """
python
for thread in gdb.selected_inferior().threads():
    if thread.ptid[1] == {tid}:
        thread.switch()
        frame = gdb.newest_frame()
        while frame.type() != gdb.SIGTRAMP_FRAME:
            frame = frame.older()
        for name in {names}:
            print(name, int(frame.older().read_register(name)) % 2**64)
end
"""


def registers_by_gdb(pid: int, tid: int, names: list[str], tmp_path: Path) -> dict[str, int]:
    script = tmp_path / "registers.gdb"
    script.write_text(GDB_SCRIPT.format(tid=tid, names=names))
    command = [
        "gdb",
        "-nx",
        "-batch",
        "-iex",
        "set debuginfod enabled off",
        "-p",
        str(pid),
        "-x",
        str(script),
    ]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = (line.split() for line in out.splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[0] in names}


@x86_64_only
@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
@pytest.mark.parametrize(
    ("kind", "thread"),
    [("null", "main"), ("division", "python"), ("abort", "native"), ("jump to null", "main")],
)
def test_registers_are_those_that_gdb_shows(
    crash_library: Path, tmp_path: Path, kind: str, thread: str
) -> None:
    with held(crash_library, kind, thread) as process:
        frame = read_frame(process.pid)
        assert frame is not None
        # glibc's unwinding table of __restore_rt, which gdb goes by, does not list the others.
        names = [name for name in frame.registers if name not in {"eflags", "cs", "err", "trapno", "cr2"}]
        assert len(names) == 17
        shown = registers_by_gdb(process.pid, frame.tid, names, tmp_path)
        assert shown == {name: int(frame.registers[name], 16) for name in names}
        assert (frame.tid == process.pid) == (thread == "main")


@x86_64_only
def test_code_and_stack_are_what_lies_there(crash_library: Path) -> None:
    with held(crash_library, "illegal instruction", "main") as process:
        frame = read_frame(process.pid)
        assert frame is not None
        assert frame.code_bytes.startswith("0f0b")  # ud2
        assert len(frame.code_bytes) == 2 * 16
        assert len(frame.stack_bytes) == 2 * 512
        maps = read_maps(process.pid)
        words = [bytes.fromhex(frame.stack_bytes)[at : at + 8] for at in range(0, 512, 8)]
        callers = [find_map(maps, int.from_bytes(word, "little")) for word in words]
        assert any(caller and caller.path == str(crash_library) for caller in callers)


@x86_64_only
def test_mended_call_to_null_does_not_run_on(crash_library: Path) -> None:
    with held(crash_library, "jump to null", "main") as process:
        frame = read_frame(process.pid)
        assert frame is not None
        assert mend_null_call(process.pid, read_maps(process.pid), frame)
        mended = read_frame(process.pid)
        assert mended is not None
        assert is_code(read_maps(process.pid), int(mended.registers["rip"], 16))
        assert int(mended.registers["rsp"], 16) == int(frame.registers["rsp"], 16) + 8
        assert mended.fault == frame.fault
        assert not mend_null_call(process.pid, read_maps(process.pid), mended)
        assert release(process, frame.tid).startswith("Fatal Python error: Segmentation fault\n")
        assert not process.ended
        process.lines.sock.setblocking(False)
        with pytest.raises(BlockingIOError):  # it did not answer: it did not run on
            process.lines.sock.recv(1)


@x86_64_only
def test_other_faults_are_left_alone(crash_library: Path) -> None:
    with held(crash_library, "null", "main") as process:
        frame = read_frame(process.pid)
        assert frame is not None
        with open(f"/proc/{process.pid}/mem", "rb", 0) as mem:
            before = read_at(mem, frame.address, 440)
            assert not mend_null_call(process.pid, read_maps(process.pid), frame)
            assert read_at(mem, frame.address, 440) == before
