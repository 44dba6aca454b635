"""Build-ids and segments, against binutils and against files that are none."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crumplezone.sandbox.process.elf import Elf, _read_elf, read_elf, read_symbols
from crumplezone.sandbox.process.procfs import read_maps
from tests.support.services.faults import BUILD_ID, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crashlib"))


def test_headers_are_those_that_readelf_shows(library: Path) -> None:
    mapped = {m.path for m in read_maps(os.getpid()) if "x" in m.perms and Path(m.path).is_file()}
    for path in (*sorted(mapped), str(library)):
        command = ["readelf", "--notes", "--segments", "--wide", path]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        build_id = re.search(r"Build ID: (\w+)", shown)
        loads = re.findall(r"^\s+LOAD\s+(\w+) (\w+) \w+ (\w+)", shown, re.MULTILINE)
        elf = read_elf(path)
        assert elf.build_id == (build_id[1] if build_id else "")
        assert elf.loads == tuple((int(at, 16), int(size, 16), int(start, 16)) for at, start, size in loads)
    assert read_elf(str(library)).build_id == BUILD_ID


def test_an_address_is_in_the_function_that_nm_shows_there(library: Path) -> None:
    symbols = read_symbols(str(library))
    table = subprocess.run(["nm", "-S", library], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    functions = [
        (int(row[0], 16), int(row[1], 16), row[3]) for row in rows if len(row) == 4 and row[2] in "tT"
    ]
    assert {"crash", "crash_in_pthread"} <= {name for _, _, name in functions}
    for start, size, name in functions:
        assert {symbols.function(at) for at in (start, start + size - 1)} == {name}
        assert symbols.begins(start)
    assert symbols.function(0) == symbols.function(2**64 - 1) == ""


def test_a_file_that_is_replaced_is_read_again(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "replaced.so"
    path.write_bytes(b"no ELF file")
    assert read_elf(str(path)) == Elf()
    (tmp_path / "new").write_bytes(library.read_bytes())
    (tmp_path / "new").rename(path)
    assert read_elf(str(path)).build_id == BUILD_ID


def test_what_is_no_elf_file_has_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write to it
    (tmp_path / "text").write_text("#!/bin/sh\n")
    for name in ("pipe", "text", "absent", "."):
        assert read_elf(str(tmp_path / name)) == Elf()


@given(at=st.integers(0, 1023), damage=st.binary(min_size=1, max_size=16), cut=st.integers(0, 8192))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_no_error(library: Path, tmp_path: Path, at: int, damage: bytes, cut: int) -> None:
    data = bytearray(library.read_bytes())
    data[at : at + len(damage)] = damage
    (tmp_path / "damaged").write_bytes(data[:cut])
    assert len(_read_elf.__wrapped__(str(tmp_path / "damaged"), ()).build_id) <= 128
