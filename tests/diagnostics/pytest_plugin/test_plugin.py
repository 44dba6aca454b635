"""Suites whose tests crash, hang, exit and pass, each in a cell: what pytest tells of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crumplezone.reports.records.report import Exit, Report
from crumplezone.reports.store.store import Store
from tests.support.decoders import read_all

if TYPE_CHECKING:
    from tests.support.pytester import Run

pytest_plugins = ["pytester", "tests.support.pytester"]

FIVE_DEATHS = """
import ctypes, logging, os, sys
import pytest

@pytest.fixture(scope="module")
def context():
    import llama_cpp as api
    model = api.llama_model_load_from_file(os.environ["TINY"].encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    yield api.llama_init_from_model(model, params)

def batch(n_tokens=3):
    import llama_cpp as api
    made = api.llama_batch_init(n_tokens, 0, 1)
    made.n_tokens = n_tokens
    for i in range(n_tokens):
        made.token[i], made.pos[i], made.n_seq_id[i], made.seq_id[i][0], made.logits[i] = 5 + i, i, 1, 0, 1
    return made

@pytest.mark.parametrize("n", range(43))
def test_passes(n, tmp_path, capsys):
    print(n)
    (tmp_path / "file").write_text(capsys.readouterr().out)

@pytest.mark.parametrize("n", range(2))
def test_decodes(n, context):
    import llama_cpp as api
    assert api.llama_decode(context, batch()) == 0

def test_segfault(context):
    import llama_cpp as api
    print("on stdout")
    print("on stderr", file=sys.stderr)
    logging.getLogger("voice").warning("last %s", "words")
    api.llama_encode(context, batch())

def test_abort(context):
    import llama_cpp as api
    api.llama_decode(context, batch(65))

@pytest.mark.crumple(timeout=1)
def test_hang():
    ctypes.CDLL(None).pause()

@pytest.mark.crumple(memory=400)
def test_memory():
    hold = [b"x" * (1 << 20) for _ in range(4096)]

def test_exit():
    os._exit(3)
"""
CRASH_LINE = FIVE_DEATHS[: FIVE_DEATHS.index("api.llama_encode")].count("\n")  # without the first, empty one


def failures(result: pytest.RunResult, xml: Path) -> dict[str, str]:
    """What JUnit has of tests that failed: the message and the text."""
    assert result.ret in {pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED}
    cases = ET.parse(xml).getroot().iter("testcase")
    found = {case.get("name"): each for case in cases for each in case if each.tag in {"failure", "error"}}
    return {str(name): f"{each.get('message')}\n{each.text}" for name, each in found.items()}


def by_test(store: Store) -> dict[str, Report]:
    return {report.command[-1].rpartition("::")[2]: report for report in read_all(store)}


SAID = [
    "*Captured stderr setup*",
    "*Captured stdout call*",
    "on stdout",
    "*Captured stderr call*",
    "on stderr",
    "*Captured log call*",
    f"WARNING  voice:test_fifty.py:{CRASH_LINE - 1} last words",
    "FAILED test_fifty.py::test_segfault - SIGSEGV in llama_kv_cache_context::*",
]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [((), SAID), (("-n2", "--tb=line"), [f"*test_fifty.py:{CRASH_LINE}: SIGSEGV in llama_kv_cache*"])],
    ids=["alone", "xdist"],
)
def test_of_fifty_tests_five_die_in_five_ways(
    crumple: Run, store: Store, tmp_path: Path, arguments: tuple[str, ...], lines: list[str]
) -> None:
    xml = tmp_path / "junit.xml"
    result = crumple(*arguments, f"--junitxml={xml}", test_fifty=FIVE_DEATHS)
    result.assert_outcomes(passed=45, failed=5, warnings=0)
    result.stdout.fnmatch_lines(lines)
    reports, found = by_test(store), failures(result, xml)
    assert {name: report.evidence.exit for name, report in reports.items()} == {
        "test_segfault": Exit.SIGNAL,
        "test_abort": Exit.ABORT,
        "test_hang": Exit.HANG,
        "test_memory": Exit.OOM,
        "test_exit": Exit.NATIVE_EXIT,
    }
    titles = {name: text.partition("; report: ")[0].removeprefix("Failed: ") for name, text in found.items()}
    assert titles == {
        "test_segfault": "SIGSEGV in llama_kv_cache_context::build_input_k_idxs",
        "test_abort": "abort: GGML_ASSERT(n_tokens_all <= cparams.n_batch) failed (llama-context.cpp)",
        "test_hang": "hang in test_hang (test_fifty.py) (it had not ended after 1 s)",
        "test_memory": "oom (resident memory went over the cell's limit; killed by the supervisor)",
        "test_exit": "native_exit (os._exit(3) in the middle of the test)",
    }
    for name, report in reports.items():
        assert str(store.path(report.id)) in found[name]
    native = found["test_segfault"].partition("Native stack:")[2]
    assert "llama_encode" in native
    assert "_PyEval_EvalFrameDefault" not in native
    assert re.search(r"#0 +test_segfault \(.*test_fifty.py:\d+\)\n\Z", native + "\n")
    assert "pause (libc" in found["test_hang"]
    assert re.search(r"Python stack:\n#0 +test_exit \(", found["test_exit"])
    evidence = reports["test_segfault"].evidence
    assert evidence.log_tail == ["WARNING voice: last words"]
    assert "on stderr" in evidence.stderr_tail


EVERYTHING = """
import logging, multiprocessing, os, sys, unittest, warnings
import pytest

@pytest.fixture(scope="session")
def of_session():
    yield 1

@pytest.fixture(params=[1, 2], scope="module")
def of_module(request, of_session):
    yield request.param

@pytest.mark.parametrize("text", ["a", "\\u20ac", "<&>\\x1b[31m"])
def test_parameters(text, of_module, record_property):
    record_property("text", text)
    sys.stderr.write(text)

def test_compares():
    assert {"left": [1, 2, 3]} == {"left": [1, 2, 4]}, "the lists differ"

@pytest.mark.skip(reason="not today")
def test_skipped(): pass

def test_skips():
    pytest.importorskip("no_such_module")

@pytest.mark.xfail(strict=True, reason="known")
def test_expected(): raise ValueError("expected")

@pytest.mark.xfail(strict=True)
def test_passes_against_expectation(): pass

@pytest.fixture
def broken(): raise RuntimeError("no setup")

@pytest.fixture
def leaves_badly():
    yield
    raise RuntimeError("no teardown")

def test_broken(broken): pass
def test_left_badly(leaves_badly): pass

def test_captures(capfd, caplog):
    os.write(1, b"raw")
    assert capfd.readouterr().out == "raw"
    logging.getLogger("one").warning("%s and %s", 1, 2)
    assert caplog.records[0].args == (1, 2)
    assert caplog.record_tuples == [("one", logging.WARNING, "1 and 2")]

def test_warns():
    warnings.warn("careful", DeprecationWarning)
    with pytest.warns(UserWarning):
        warnings.warn("asserted")

class TestUnit(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.made = 1
    def test_unit(self): self.assertEqual(self.made, 2)
    def test_skipped(self): self.skipTest("as unittest says it")

def test_exits(): sys.exit(7)

def test_chooses_how_processes_start(): multiprocessing.set_start_method("spawn")
"""


def shown(result: pytest.RunResult) -> list[str]:
    """Without times, addresses and processes."""
    varying = re.compile(r"in \d+\.\d+s|0x[0-9a-f]+")
    return [varying.sub("", line) for line in result.outlines if "generated xml" not in line]


def test_all_else_is_shown_as_without_cells(crumple: Run, tmp_path: Path) -> None:
    results = [
        crumple(
            "-v",
            "-rA",
            "-ojunit_family=xunit1",
            f"--junitxml={tmp_path / name}",
            crumple=name == "in",
            test_all=EVERYTHING,
        )
        for name in ("in", "out")
    ]
    assert shown(results[0]) == shown(results[1])
    results[0].assert_outcomes(passed=10, failed=4, errors=2, skipped=3, xfailed=1, warnings=1)
    varying = re.compile(r'time(stamp)?="[^"]+"|hostname="[^"]+"|0x[0-9a-f]+')
    xml = [varying.sub("", (tmp_path / name).read_text()) for name in ("in", "out")]
    assert xml[0] == xml[1]


def test_expected_crashes_and_subtests(crumple: Run, store: Store) -> None:
    result = crumple(
        "-rA",
        conftest="""
import os
import pytest

def pytest_runtest_setup(item): item.reported = []

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):  # as that of pytest-rerunfailures, it needs what a setup has left
    report = yield
    item.reported.append(report.when)
    return report

def pytest_runtest_logfinish(): seen.add(len(os.listdir("/proc/self/fd")))
def pytest_terminal_summary(terminalreporter): terminalreporter.write_line(f"open descriptors: {seen}")
seen = set()
""",
        test_more="""
import ctypes, os
import pytest

def crash(): ctypes.memset(0x18, 1, 1)

@pytest.mark.xfail(reason="known to crash")
def test_expected(): crash()

@pytest.mark.xfail(raises=ValueError)
def test_not_that(): crash()

def test_subtests(subtests):
    for i in range(3):
        with subtests.test(i=i):
            assert i != 1
    crash()

@pytest.fixture
def leaves():
    yield
    crash()

def test_teardown(leaves): pass

@pytest.fixture
def comes(): crash()

def test_setup(comes): pass

def test_grandchild():
    pid = os.fork()
    if not pid:
        crash()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -11

def test_fork_that_returns():
    if not os.fork():
        raise ValueError("a second pytest")
    os.wait()
""",
    )
    assert result.parseoutcomes() == {
        "failed": 3,  # with the subtest
        "passed": 3,
        "xfailed": 1,
        "errors": 2,
    }
    result.stdout.fnmatch_lines(
        [
            "XFAIL test_more.py::test_expected - known to crash",
            "ERROR test_more.py::test_teardown - SIGSEGV in *",
            "ERROR test_more.py::test_setup - SIGSEGV in *",
            "FAILED test_more.py::test_not_that - SIGSEGV in *",
            "SUBFAILED(i='1') test_more.py::test_subtests - *",
            "FAILED test_more.py::test_subtests - SIGSEGV in *",
        ]
    )
    assert re.search(r"^open descriptors: \{\d+\}$", result.stdout.str(), re.MULTILINE)  # as many after each
    assert len(read_all(store)) == 5


MIXED = """
import os
import pytest

def note(what):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(f"{what} in {'pytest' if os.getpid() == SUPERVISOR else 'a cell'}\\n")

SUPERVISOR = os.getpid()

@pytest.fixture(scope="session")
def server(request):
    request.session.addfinalizer(lambda: note("session ends"))
    note("server starts")
    yield "server"
    note("server stops")

@pytest.fixture(scope="module", params=["a", "b"])
def client(request, server):
    note(f"client {request.param} connects")
    yield request.param
    note(f"client {request.param} leaves")

def test_plain(client): note(f"plain {client}")

@pytest.mark.crumple
def test_celled(client): note(f"celled {client}")

@pytest.mark.crumple
def test_dies(server, client):
    note(f"dies {client}")
    os._exit(1)
"""


def test_fixtures_of_pytest_itself_are_used_by_cells_and_torn_down_once(
    crumple: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENTS", str(tmp_path / "events"))
    after = "from test_mixed import note\ndef test_after(): note('after')\n"
    result = crumple("-p", "no:randomly", crumple=False, test_mixed=MIXED, test_next=after)
    result.assert_outcomes(passed=5, failed=2)
    assert (tmp_path / "events").read_text().splitlines() == [
        "server starts in pytest",
        "client a connects in pytest",
        "plain a in pytest",
        "celled a in a cell",
        "dies a in a cell",
        "client a leaves in pytest",
        "client b connects in pytest",
        "plain b in pytest",
        "celled b in a cell",
        "dies b in a cell",
        "client b leaves in pytest",
        "after in pytest",
        "server stops in pytest",
        "session ends in pytest",
    ]


def test_nothing_is_imported_where_no_test_goes_into_a_cell(crumple: Run) -> None:
    result = crumple(
        crumple=False,
        test_it="""
import sys

def test_off():
    assert {name for name in sys.modules if name.startswith("crumplezone")} == {
        "crumplezone", "crumplezone.diagnostics", "crumplezone.diagnostics.pytest_plugin",
        "crumplezone.diagnostics.pytest_plugin.options", "crumplezone.diagnostics.pytest_plugin.plugin"}
""",
    )
    result.assert_outcomes(passed=1)


def test_a_failure_has_the_title_of_its_report(crumple: Run, store: Store) -> None:
    result = crumple(
        test_it="""
import ctypes
import numpy as np

def test_called_back():
    np.frompyfunc(lambda _: ctypes.string_at(8), 1, 1)(1)
""",
    )
    (report,) = read_all(store)
    assert report.signature is not None
    assert report.signature.confidence == "high"  # of numpy's frames, which the failure does not show
    result.stdout.fnmatch_lines([f"{report.signature.title}; report: *"])


def test_a_test_of_a_pytest_that_blocks_fatal_signals_is_held(crumple: Run, store: Store) -> None:
    crumple(
        test_it="""
import ctypes, signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})  # while pytest collects, so before it forks

def test_crash():
    ctypes.string_at(8)
""",
    )
    (report,) = read_all(store)
    assert report.evidence.fault is not None
    assert report.evidence.fault.address == "0x8"
