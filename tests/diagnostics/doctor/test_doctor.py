"""`crumplezone doctor`: what it finds here, and where something is taken away for real."""

from __future__ import annotations

import ast
import errno
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from crumplezone.diagnostics.doctor import doctor
from crumplezone.diagnostics.doctor import machine as doctor_machine
from crumplezone.diagnostics.doctor import model as doctor_model
from crumplezone.diagnostics.doctor.check import Check, State, attempt
from crumplezone.sandbox.process import cgroup
from tests.support import decoders as support
from tests.support.cli import crumplezone
from tests.support.models.tiny_gguf import write_block_count_zero, write_truncated
from tests.support.processes.constrained import die_in_a_supervisor
from tests.support.services import refuse

NAMES = [
    *("pidfd", "fault pipe", "hold", "pystack", "ptrace", "seccomp", "landlock", "core files", "memory"),
    *("OOM counters", "threads", "descriptors", "report store", "model", "llama.cpp build"),
]
PATIENT = """
import sys, msgspec
from crumplezone.diagnostics.doctor import doctor
from tests.support.services import refuse
refuse.system_call(*map(int, sys.argv[1:]))
sys.stdout.buffer.write(msgspec.json.encode([doctor._pidfd(), *doctor._crash()]))
"""
PIDFD_OPEN, PTRACE, PIPE2 = 434, 101, 293  # x86-64
on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Check]:
    """A real examination."""
    checks = doctor.examine(tiny, tmp_path_factory.mktemp("store") / "not" / "there" / "yet")
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


def without(*refused: int) -> dict[str, Check]:
    """The checks that crash a cell, where a system call is refused."""
    command = [sys.executable, "-c", PATIENT, *map(str, refused)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return {check.name: check for check in msgspec.json.decode(done.stdout, type=list[Check])}


def test_a_real_crash_is_held_and_read(here: dict[str, Check]) -> None:
    for name in ("pidfd", "fault pipe", "hold", "pystack", "ptrace"):
        assert here[name].state is State.OK, here[name]
    assert "registers" in here["hold"].found
    assert "Python frames of a crashed cell" in here["ptrace"].found


def test_the_model_is_loaded_and_decodes(here: dict[str, Check]) -> None:
    assert here["model"].state is State.OK
    assert "tiny.gguf (llama" in here["model"].found
    assert here["llama.cpp build"].state is not State.UNKNOWN


def test_every_lack_says_what_it_costs_or_that_it_costs_nothing_and_how_to_cure_it(
    here: dict[str, Check],
) -> None:
    for check in here.values():
        assert check.found
        assert bool(check.remedy) == (check.state is State.LACK)
        assert not check.costs or check.state is State.LACK
    assert here["report store"].state is State.OK
    assert "there/yet" in here["report store"].found


@on_x86_64
def test_without_ptrace_the_stacks_are_lacking() -> None:
    checks = without(PTRACE, errno.EPERM)
    assert checks["hold"].state is State.OK
    assert checks["ptrace"].state is State.LACK
    assert "native stacks" in checks["ptrace"].costs
    assert "ptrace_scope" in checks["ptrace"].remedy
    assert doctor.lacking(list(checks.values()))


@on_x86_64
def test_without_packet_pipes_nothing_is_certain() -> None:
    checks = without(PIPE2, errno.EINVAL, 1, os.O_DIRECT)
    assert checks["fault pipe"].state is State.LACK
    assert "O_DIRECT" in checks["fault pipe"].remedy
    assert "may have gone on" in checks["fault pipe"].costs


def test_without_the_right_to_look_nothing_is_held() -> None:
    evidence = die_in_a_supervisor("undumpable_segv", before_exec=refuse.capabilities)
    checks = {check.name: check for check in doctor._learnt(evidence)}
    assert checks["fault pipe"].state is State.OK
    for name in ("signal frame", "hold", "ptrace"):
        assert checks[name].state is State.LACK, name
        assert checks[name].costs
        assert checks[name].remedy
    assert "CAP_SYS_PTRACE" in checks["signal frame"].remedy


@on_x86_64
def test_without_pidfds_no_cell_can_run() -> None:
    checks = without(PIDFD_OPEN, errno.ENOSYS)
    assert checks["pidfd"].state is checks["hold"].state is State.LACK
    assert checks["pidfd"].costs == checks["hold"].costs
    assert "no cell can run" in checks["pidfd"].costs


def test_without_pystack_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pystack").mkdir()
    (tmp_path / "pystack" / "__init__.py").touch()  # shadows the real one: there is no pystack.engine
    command = [sys.executable, "-c", PATIENT.replace("refuse.system_call(*map(int, sys.argv[1:]))", "")]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}")
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    checks = {check.name: check for check in msgspec.json.decode(done.stdout, type=list[Check])}
    assert (checks["pystack"].state, checks["pystack"].remedy) == (State.LACK, "pip install pystack")
    assert checks["ptrace"].state is State.UNKNOWN


COMPILED = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 1 | LLAMAFILE = 1 | OPENMP = 1 | "
HAS = ["fpu", "pni", "ssse3", "avx", "avx2", "fma"]


@pytest.mark.parametrize(
    ("compiled", "has", "state", "found", "costs"),
    [
        (COMPILED, HAS, State.OK, "AVX2, FMA", ""),
        (COMPILED + "AVX512 = 1 | AVX512_VNNI = 1", HAS, State.LACK, "AVX512, AVX512_VNNI", "SIGILL"),
        (COMPILED, [*HAS, "f16c", "avx512f"], State.LACK, "compiled without AVX512, F16C", "speed"),
        (COMPILED.replace("AVX2 = 1", "AVX2 = 0"), HAS, State.LACK, "compiled without AVX2", "speed"),
        (COMPILED, [], State.UNKNOWN, "no flags", ""),
        ("CPU : NEON = 1 | DOTPROD = 1", ["asimd", "asimddp", "i8mm"], State.LACK, "MATMUL_INT8", "speed"),
    ],
)
def test_the_build_against_the_processor(
    compiled: str, has: list[str], state: State, found: str, costs: str
) -> None:
    check = doctor_model.build(compiled, has)
    assert check.state is state
    assert found in check.found
    assert (costs in check.costs) if costs else not check.costs


def bad_models(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "missing.gguf", "No such file"
    (tmp_path / "text.gguf").write_text("no model, but a text of some length")
    yield tmp_path / "text.gguf", "is not GGUF"
    yield write_truncated(tmp_path / "cut.gguf"), "does not load"
    yield write_block_count_zero(tmp_path / "zero.gguf"), "Aborted: "
    with (tmp_path / "huge.gguf").open("wb") as huge:  # sparse
        huge.write(b"GGUF" + bytes(20))
        huge.truncate(1 << 42)
    yield tmp_path / "huge.gguf", "has 4398.0 GB, but"


def test_a_model_that_is_none_is_a_lack(tmp_path: Path) -> None:
    for path, found in bad_models(tmp_path):
        model, build = doctor_model.examine(path)
        assert (model.state, build.state) == (State.LACK, State.UNKNOWN), path
        assert found in model.found
        assert model.costs.startswith("every job")
        assert model.remedy


def test_a_store_that_cannot_be_written_is_a_lack(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        check = doctor_machine.store(place)
        assert check.state is State.LACK, place
        assert check.found.startswith(str(place))
        assert "every report" in check.costs
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert doctor_machine.store(tmp_path).state is State.OK
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def with_limit(limit: int, soft: int, look: Callable[[], Check]) -> Check:
    """What is found under another soft limit."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, before[1]))
    try:
        return look()
    finally:
        resource.setrlimit(limit, before)


def test_few_descriptors_are_a_lack() -> None:
    few = with_limit(resource.RLIMIT_NOFILE, len(support.descriptors()) + 9, doctor_machine.descriptors)
    assert few.state is State.LACK
    assert few.remedy.startswith("ulimit -n")
    assert doctor_machine.descriptors().state is State.OK


def test_core_files_matter_only_where_nothing_is_held() -> None:
    for held, state in ((True, State.OK), (False, State.LACK)):
        check = with_limit(resource.RLIMIT_CORE, 0, lambda held=held: doctor_machine.cores(held=held))  # type: ignore[misc]
        assert check.state is state
        assert check.found.startswith("limit 0, pattern ")


def in_cgroup(group: Path, expression: str) -> list[str]:
    """The lines that a process in this cgroup prints of what it finds."""

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    code = f"from crumplezone.diagnostics.doctor import machine; print({expression}, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join, check=True, timeout=60)
    return done.stdout.splitlines()


def test_the_memory_cgroup_counts(small_cgroup: Path) -> None:
    left, who = in_cgroup(small_cgroup, "*machine.room()")
    assert 0 < int(left) <= 300 << 20
    assert small_cgroup.name in who
    assert in_cgroup(small_cgroup, "machine.cgroup.available_memory() <= 300 << 20") == ["True"]
    state, found = in_cgroup(small_cgroup, "machine.memory().state, machine.memory().found")
    assert state == State.LACK
    assert small_cgroup.name in found


def test_the_pids_cgroup_counts() -> None:
    group = cgroup.folders("pids")[0] / f"crumplezone-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text("40")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        state, found = in_cgroup(group, "machine.threads().state, machine.threads().found")
    finally:
        group.rmdir()
    assert state == State.LACK
    assert group.name in found
    assert 0 < int(found.split()[0]) < 40


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_the_threads_of_a_user_are_counted() -> None:
    code = (
        "import os, resource, threading; from crumplezone.diagnostics.doctor import machine;"
        "print(len(list(machine._threads_left())));"
        "os.setuid(54321); resource.setrlimit(resource.RLIMIT_NPROC, (30, 30));"
        "wait = threading.Event(); other = threading.Thread(target=wait.wait); other.start();"
        "print(next(machine._threads_left())); wait.set()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    as_root, (left, who) = (ast.literal_eval(line) for line in done.stdout.splitlines())
    assert as_root == len(list(doctor_machine._threads_left()))
    assert (left, who) == (28, "ulimit -u of 30")


def test_what_cannot_be_read_is_unknown() -> None:
    check = attempt("core files", lambda: Check("x", State.OK, Path("/proc/nowhere").read_text()))
    assert (check.name, check.state) == ("core files", State.UNKNOWN)
    assert "/proc/nowhere" in check.found


def test_the_command_line(tmp_path: Path, tiny: Path) -> None:
    done = crumplezone("doctor", "--json", "--model", tiny, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [check["name"] for check in found["checks"]] == NAMES
    assert done.returncode == found["lacking"]
    assert not (tmp_path / "reports").exists()
    strange = tmp_path / "\x1b[31m.gguf"
    shown = crumplezone("doctor", "--model", strange, cwd=tmp_path)
    assert shown.returncode == 1
    assert r"\x1b[31m.gguf" in shown.stdout
    assert all(line.isprintable() for line in shown.stdout.splitlines())
    assert "costs:  every job with this model" in shown.stdout
    assert shown.stdout.splitlines()[-1].endswith(f"of {len(NAMES)} lack something.")
    assert crumplezone("doctor", "--nonsense", cwd=tmp_path).returncode == 2
