"""The walk over call frame information: against readelf, on made machines, and on nonsense."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crumplezone.sandbox.autopsy.cfi.cursor import Cursor, NonsenseError
from crumplezone.sandbox.autopsy.cfi.expression import evaluate
from crumplezone.sandbox.autopsy.cfi.machine import MACHINES
from crumplezone.sandbox.autopsy.cfi.program import Kind, Row, row_at
from crumplezone.sandbox.autopsy.cfi.tables import Rules, find_rules
from crumplezone.sandbox.autopsy.cfi.walk import FRAMES_MAX, Place, Walk, walk
from crumplezone.sandbox.process.elf import read_elf
from crumplezone.sandbox.process.procfs import Map, find_map, is_code
from tests.support.services.faults import build

BASE, STACK, STACK_SIZE = 0x7F00_0000_0000, 0x7FFF_0000_0000, 4096
X86_64, AARCH64 = MACHINES["x86_64"], MACHINES["aarch64"]


class Memory(io.BytesIO):
    """Pieces of memory, read as /proc/PID/mem is."""

    def __init__(self, *pieces: tuple[int, bytes]) -> None:
        super().__init__()
        self._pieces, self._at = pieces, 0

    def seek(self, offset: int, _whence: int = 0) -> int:
        self._at = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0  # noqa: PT018
        for start, data in self._pieces:
            if start <= self._at < start + len(data):
                return data[self._at - start : self._at - start + size]
        raise OSError(5, "Input/output error")


def load(data: bytes, path: Path) -> tuple[list[tuple[int, bytes]], list[Map]]:
    """A library as a loader would map it, its code and all else in one kind of memory."""
    pieces, maps = [], []
    for at, size, address in read_elf(str(path)).loads:
        start = BASE + address // 4096 * 4096
        pieces.append((start, data[at // 4096 * 4096 : at + size]))
        maps.append(
            Map(start, start - start % 4096 + 4096 * (size // 4096 + 2), "r-xp", at // 4096 * 4096, "/l")
        )
    stack = Map(STACK, STACK + STACK_SIZE, "rw-p", 0, "[stack]")
    return pieces, [*maps, stack]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def interpreted(library: Path) -> dict[int, dict[str, str]]:
    """What readelf makes of a file's call frame information: by address, the rule of each column."""
    command = ["readelf", "--debug-dump=frames-interp", "--wide", str(library)]
    rows, columns, end = dict[int, dict[str, str]](), list[str](), 0
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if found := re.search(r" FDE .*pc=\w+\.\.(\w+)", line):
            end = int(found[1], 16)
        elif line.startswith("   LOC"):
            columns = line.split()
        elif re.match(r"[0-9a-f]{16} \S", line) and end and " CIE " not in line and " FDE " not in line:
            found_row = dict(zip(columns, line.split(), strict=True))
            if 0 < (at := int(found_row.pop("LOC"), 16)) < end:  # 0: of code that the linker has dropped
                rows[at] = found_row
    return rows


def said(row: Row, machine_columns: dict[int, str], columns: set[str]) -> dict[str, str]:
    """A row in the words of readelf."""
    names = {name: number for number, name in machine_columns.items()}
    cfa = "exp"
    if isinstance(row.frame, tuple):
        cfa = f"{machine_columns[row.frame[0]]}+{row.frame[1]}"
    shown = {"CFA": cfa}
    for column in columns - {"CFA"}:
        kind, value = row.registers.get(names[column], (Kind.UNDEFINED, 0))
        offset = "exp" if isinstance(value, bytes) else f"c{value:+d}"
        shown[column] = "u" if kind is Kind.UNDEFINED else offset
    return shown


def test_every_row_is_what_readelf_makes_of_it(library: Path) -> None:
    pieces, maps = load(library.read_bytes(), library)
    columns = {number: name for name, number in X86_64.numbers.items()} | {16: "ra"}
    rows = interpreted(library)
    assert len(rows) > 30
    assert any(rules["CFA"] == "exp" for rules in rows.values())  # the procedure linkage table
    for at, rules in rows.items():
        within = find_map(maps, BASE + at)
        assert within is not None
        found = row_at(find_rules(Memory(*pieces), maps, within, BASE + at), BASE + at)
        assert said(found, columns, set(rules)) == rules, hex(at)


def test_the_expression_of_a_linkage_table_knows_what_was_pushed() -> None:
    # breg7(rsp) 8; breg16(rip) 0; lit15; and; lit11; ge; lit3; shl; plus: eleven bytes into an entry, 8 more.
    expression = bytes.fromhex("77088000" + "3f1a3b2a3324" + "22")
    for pc, pushed in ((0x1000, 8), (0x100A, 8), (0x100B, 16), (0x100F, 16)):
        assert evaluate(expression, {7: 0x5000, 16: pc}, lambda _: 0) == 0x5000 + pushed


# --- a made machine ---


def module(machine: str, *functions: bytes, initial: bytes) -> bytes:
    """An ELF file in memory: each function is 0x100 bytes at 0x2000, 0x2100, ... with this program."""
    column, align = (16, -8) if machine == "x86_64" else (30, -8)
    letters = b"zR\0"
    kind = struct.pack("<IB3sBBBBB", 0, 1, letters, 1, align & 127, column, 1, 0x1B) + initial
    section = 0x1000
    blocks, places = struct.pack("<I", len(kind)) + kind, []
    for number, program in enumerate(functions):
        at = section + len(blocks)
        places.append((0x2000 + 0x100 * number, at))
        own = struct.pack("<IiIB", at + 4 - section, 0x2000 + 0x100 * number - (at + 8), 0x100, 0) + program
        blocks += struct.pack("<I", len(own)) + own
    header = struct.pack("<BBBBiI", 1, 0x1B, 3, 0x3B, 0, len(places))
    header += b"".join(struct.pack("<ii", start - 0x800, at - 0x800) for start, at in places)
    elf = bytearray(0x2000 + 0x100 * len(functions))
    elf[:6] = b"\x7fELF\x02\x01"
    elf[32:40] = struct.pack("<Q", 64)
    elf[54:58] = struct.pack("<HH", 56, 2)
    elf[64:120] = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, len(elf), len(elf), 4096)
    elf[120:176] = struct.pack("<IIQQQQQQ", 0x6474E550, 4, 0x800, 0x800, 0, len(header), len(header), 4)
    elf[0x800 : 0x800 + len(header)] = header
    elf[section : section + len(blocks)] = blocks
    return bytes(elf)


def walked(machine: str, elf: bytes, stack: bytes, **registers: int) -> Walk:
    maps = [Map(BASE, BASE + len(elf), "r-xp", 0, "/l"), Map(STACK, STACK + len(stack), "rw-p", 0, "[stack]")]
    return walk(Memory((BASE, elf), (STACK, stack)), maps, registers, MACHINES[machine])


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def test_aarch64_leaves_keep_their_return_address_in_a_register_and_others_sign_theirs() -> None:
    leaf, framed, outermost = b"", bytes((0x0E, 16, 0x9D, 2, 0x9E, 1, 0x2D)), bytes((0x07, 30))
    elf = module("aarch64", leaf, framed, outermost, initial=bytes((0x0C, 31, 0)))
    signed = 0x00AB_0000_0000_0000 | BASE + 0x2210  # its upper bits are the signature
    found = walked(
        "aarch64", elf, words(0x1111, signed), pc=BASE + 0x2004, x30=BASE + 0x2108, sp=STACK, x29=7
    )
    places = (
        Place(BASE + 0x2004, called=False),
        Place(BASE + 0x2108, called=True),
        Place(BASE + 0x2210, called=True),
    )
    assert found == Walk(places)


def test_a_register_that_was_saved_leads_on() -> None:
    """The second function finds its frame by rbp, which the first has saved; the third is where it began."""
    first = bytes((0x0E, 16, 0x86, 2))
    second = bytes((0x0D, 6, 0x0E, 16, 0x90, 1))
    elf = module("x86_64", first, second, bytes((0x07, 16)), initial=bytes((0x0C, 7, 8, 0x90, 1)))
    stack = words(STACK + 0x20, BASE + 0x2150, 0, 0, 0xBAD, BASE + 0x2230)
    found = walked("x86_64", elf, stack, rip=BASE + 0x2010, rsp=STACK)
    assert [place.pc - BASE for place in found.places] == [0x2010, 0x2150, 0x2230]
    assert found.ended == ""


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        (words(STACK, 0x4242_4242), "is not in code"),
        (words(0), "there is no memory at"),
        (words(STACK - 64, BASE + 0x2150), "there is no memory at"),
        (words(STACK, BASE + 0x2150), "the stack goes the wrong way"),
    ],
)
def test_what_makes_no_sense_ends_the_walk(stack: bytes, why: str) -> None:
    """The second function's frame is where the first has saved it; there is none for the third."""
    first, second = bytes((0x0E, 16, 0x86, 2)), bytes((0x0D, 6, 0x0E, 16, 0x90, 1, 0x86, 2))
    elf = module("x86_64", first, second, initial=bytes((0x0C, 7, 8, 0x90, 1)))
    down = words(0, BASE + 0x2150, 0, 0)
    found = walked("x86_64", elf, down + stack, rip=BASE + 0x2010, rsp=STACK + len(down))
    assert found.places[0].pc == BASE + 0x2010
    assert why in found.ended


def test_a_stack_pointer_that_is_nowhere_ends_the_walk() -> None:
    lost = bytes((0x0E, 16, 0x10, 7, 2, 0x30, 0x06))  # rsp is at address 0
    found = walked(
        "x86_64",
        module("x86_64", lost, initial=bytes((0x0C, 7, 8, 0x90, 1))),
        words(0, BASE + 0x2010),
        rip=BASE + 0x2010,
        rsp=STACK,
    )
    assert (len(found.places), found.ended) == (1, "the stack pointer is not known")


def test_a_register_that_is_nowhere_is_not_missed() -> None:
    lost = bytes((0x0E, 16, 0x10, 3, 2, 0x30, 0x06))  # rbx is at address 0
    elf = module("x86_64", lost, bytes((0x07, 16)), initial=bytes((0x0C, 7, 8, 0x90, 1)))
    found = walked("x86_64", elf, words(0, BASE + 0x2110), rip=BASE + 0x2010, rsp=STACK)
    assert (len(found.places), found.ended) == (2, "")


def test_a_walk_that_takes_long_ends() -> None:
    """Each function remembers, recalls and computes as much as it may."""
    slow = bytes((0x16, 0, 0xC0, 0x7E)) + b"\x30" * 32 + b"\x1e\x30" * 8000 + b"\x30" * 96
    elf = module("x86_64", b"\x0a\x0b" * 2000, slow, initial=bytes((0x0C, 7, 8, 0x90, 1)))
    begin = time.thread_time()
    found = walked("x86_64", elf, words(*[BASE + 0x2010] * 500), rip=BASE + 0x2010, rsp=STACK)
    assert found.ended
    assert time.thread_time() - begin < 5


def test_recursion_without_an_end_has_one() -> None:
    elf = module("x86_64", b"", initial=bytes((0x0C, 7, 8, 0x90, 1)))
    found = walked("x86_64", elf, words(*[BASE + 0x2010] * 500), rip=BASE + 0x2010, rsp=STACK)
    assert len(found.places) == FRAMES_MAX
    assert "innermost" in found.ended


# --- nonsense ---

Damage = list[tuple[int, bytes]]
damages = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=16)), max_size=8)


@given(
    damage=damages,
    offsets=st.lists(st.integers(0, 1 << 14), min_size=1, max_size=STACK_SIZE // 8),
    registers=st.dictionaries(st.sampled_from(list(X86_64.numbers)), st.integers(0, 2**64 - 1)),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_walk_over_anything_ends(
    library: Path, damage: Damage, offsets: list[int], registers: dict[str, int]
) -> None:
    """Of a damaged library, and a stack full of addresses in it."""
    data = bytearray(library.read_bytes())
    for at, patch in damage:
        data[at % len(data) : at % len(data) + len(patch)] = patch
    pieces, maps = load(bytes(data), library)
    stack = words(*(BASE + offset for offset in offsets))
    registers |= {"rip": BASE + offsets[0], "rsp": STACK + 8 * (len(offsets) // 4)}
    found = walk(Memory(*pieces, (STACK, stack)), maps, registers, X86_64)
    assert len(found.places) <= FRAMES_MAX
    assert all(is_code(maps, place.pc) for place in found.places)


@given(initial=st.binary(max_size=64), program=st.binary(max_size=512), steps=st.integers(0, 4096))
@example(b"", b"\x0a" * 100, 0)
@example(b"", b"\x00" * 5000, 0)
@settings(max_examples=300)
def test_a_program_of_anything_ends(initial: bytes, program: bytes, steps: int) -> None:
    rules = Rules(BASE, Cursor(initial), Cursor(program), 1, -8, 16, signal=False, pointers=0x1B)
    with contextlib.suppress(NonsenseError):
        assert isinstance(row_at(rules, BASE + steps), Row)


def nowhere(address: int) -> int:
    raise NonsenseError(f"there is no memory at {address:#x}")


@given(
    expression=st.binary(max_size=64),
    registers=st.dictionaries(st.integers(0, 31), st.integers(0, 2**64 - 1)),
)
@example(b"\x12" * 64, {})
@example(b"\x30" * 2000, {})
@settings(max_examples=300)
def test_an_expression_of_anything_ends(expression: bytes, registers: dict[int, int]) -> None:
    for word in (nowhere, lambda address: address ^ 1):
        with contextlib.suppress(NonsenseError):
            assert 0 <= evaluate(expression, registers, word, (5,)) < 2**64
