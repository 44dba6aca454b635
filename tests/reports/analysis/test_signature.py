"""Signatures group what is the same and part what is not; clusters join what is nearly the same."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.reports.analysis import signature
from crumplezone.reports.analysis.redact import redact
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.records.report import Assertion, Evidence, Exit, Fault, Frame, Report, Thread
from tests.support.processes.cells import die
from tests.support.records.crashes import (
    BASE,
    CALLED,
    CPU,
    CXX,
    ENCODE,
    HANDLER,
    LIBC,
    LLAMA,
    PID,
    PYTHON,
    SEGV,
    report,
    segv,
)

ABORT = [
    *HANDLER,
    Frame("__pthread_kill_implementation", LIBC, offset="0x8aeec"),
    Frame("raise", LIBC, offset="0x3bfb2"),
    Frame("abort", LIBC, offset="0x26472"),
]
RUNTIME = [
    *ABORT,
    *CALLED,
    Frame("ggml_abort", BASE),
    Frame("_int_free", LIBC),
]
RUNTIME += [
    Frame("__cxa_throw", CXX),
    Frame("std::vector<int>::at(unsigned long)", LLAMA),
    Frame(offset="0x0"),
]
RUNTIME += [
    Frame("???", "[stack]", offset="0x7ffe3d3b4910"),
    Frame("__stack_chk_fail", ""),
]
# As pystack saw them in one cell of two threads: a row of a model that was unmapped.
KERNEL = [Frame("dequantize_row_q8_0", BASE, offset="0x788d5"), Frame("ggml_compute_forward_get_rows", CPU)]
STARTED = [Frame("start_thread", LIBC, offset="0x891f5"), Frame("__clone3", LIBC)]
ASKED = [
    Frame("ggml_graph_compute", CPU, offset="0x1c8df"),
    Frame("", CPU, offset="0x1cced"),
    Frame("ggml_backend_sched_graph_compute_async", BASE),
    *CALLED,
]
OUTLINED = [Frame("ggml_graph_compute_thread.isra.0", CPU), Frame("ggml_graph_compute._omp_fn.0", CPU)]
GOMP = "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0"
POOLS = {
    "openmp": (
        [Frame("", CPU, offset="0x1c01e"), Frame("GOMP_parallel", GOMP, offset="0x140b6"), *ASKED],
        [Frame("", CPU, offset="0x1c01e"), Frame("", GOMP, offset="0x1cd8e"), *STARTED],
    ),
    "openmp with names": (
        [*OUTLINED, Frame("GOMP_parallel", GOMP), *ASKED],
        [*OUTLINED, Frame("gomp_thread_start", "libgomp-24e2ab19.so.1.0.0"), *STARTED],
    ),
    "ggml's own": (
        [Frame("", CPU, offset="0x1c01e"), *ASKED],
        [Frame("", CPU, offset="0x1c01e"), Frame("", CPU, offset="0x1bbbb"), *STARTED],
    ),
    "ggml's own with names": (
        [OUTLINED[0], *ASKED],
        [OUTLINED[0], Frame("ggml_graph_compute_secondary_thread", CPU), *STARTED],
    ),
}
DECODE = [Frame("llama_context::decode(llama_batch_ext const&)", LLAMA), Frame("llama_decode", LLAMA)]


def asserting(
    text: str, file: str = "/build/src/llama-context.cpp", source: str = "ggml", line: int = 3
) -> Report:
    assertion = Assertion(text, source, file, line)
    return report(Exit.ABORT, [*ABORT, Frame("ggml_abort", BASE), *DECODE, *CALLED], assertion=assertion)


EXAMPLES = {
    "SIGSEGV in llama_kv_cache_context::build_input_k_idxs": SEGV,
    "SIGSEGV in llm_graph_input_attn_kv::set_input": segv(
        [Frame("llm_graph_input_attn_kv::set_input(llama_ubatch const*)", LLAMA), *ENCODE]
    ),
    "abort: GGML_ASSERT(n_tokens_all <= cparams.n_batch && 1) failed (llama-context.cpp)": asserting(
        "GGML_ASSERT(n_tokens_all <= cparams.n_batch && 1) failed"
    ),
    "abort: terminate called after throwing an instance of 'std::out_of_range'": asserting(
        "terminate called after throwing an instance of 'std::out_of_range'\n"
        "  what():  vector::_M_range_check: __n (which is 18446744073709551615) >= this->size() (which is 4)",
        "",
        "terminate",
    ),
    "abort: double free or corruption (fasttop)": asserting(
        "double free or corruption (fasttop)", "", "glibc"
    ),
    "abort in llama_context::decode": report(
        Exit.ABORT,
        [
            *ABORT,
            Frame("__libc_message", LIBC),
            Frame("malloc_printerr", LIBC),
            Frame("_int_free", LIBC),
            *DECODE,
        ],
    ),
    "hang in ggml_graph_compute_thread": report(
        Exit.HANG,
        [
            Frame("gomp_team_barrier_wait_end", "/usr/lib/libgomp.so.1.0.0"),
            Frame("ggml_graph_compute_thread.isra.0", CPU),
        ],
    ),
    "oom": report(Exit.OOM, DECODE),
    "SIGFPE in encode (native.py)": report(Exit.SIGNAL, [*HANDLER, *CALLED], signal="SIGFPE"),
    "native_exit": report(Exit.NATIVE_EXIT, python=[]),
}


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_title_names_the_crash(title: str) -> None:
    assert sign(EXAMPLES[title]).title == title


def test_examples_differ_and_redaction_changes_none() -> None:
    ids = {sign(example).id for example in EXAMPLES.values()}
    assert len(ids) == len(EXAMPLES)
    assert {sign(redact(example, b"k" * 32)).id for example in EXAMPLES.values()} == ids


def test_the_key_is_three_frames_that_another_build_has_too() -> None:
    signed = sign(SEGV)
    assert signed.key == [
        "llama_kv_cache_context::build_input_k_idxs",
        "llm_graph_context::build_attn_inp_kv",
        "llama_model_llama::graph<T>::graph",
    ]
    assert (signed.fault_class, signed.confidence, signed.version) == ("SIGSEGV", "high", signature.VERSION)
    assert sign(segv(ENCODE[2:])).id != signed.id


@pytest.mark.parametrize("pool", POOLS)
def test_it_does_not_matter_which_thread_of_a_pool_faults(pool: str) -> None:
    master, worker = POOLS[pool]
    expected = sign(segv([*KERNEL, *STARTED]))
    assert expected.key == ["dequantize_row_q8_0", "ggml_compute_forward_get_rows"]
    assert sign(segv([*HANDLER, *KERNEL, *master])) == sign(segv([*HANDLER, *KERNEL, *worker])) == expected
    # What differs inside differs, and so does what fails before the threads are asked.
    others = [[KERNEL[1], *master], [*KERNEL[::-1], *worker], [*OUTLINED, *worker], ASKED]
    assert len({sign(segv(stack)).id for stack in others} | {expected.id}) == len(others) + 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_does_not_hide_a_frame_without_a_name(pool: str) -> None:
    master, worker = POOLS[pool]
    one, two = [Frame("", CPU, offset="0x77")], [Frame("", CPU, offset="0x99")]
    if "names" not in pool:
        assert sign(segv([*one, *master])) == sign(segv([*one, *worker])) != sign(segv([*two, *worker]))
        assert sign(segv([*one, *master])).confidence == "low"


def test_a_hang_is_named_by_who_asked_the_pool() -> None:
    barrier = Frame("", GOMP, offset="0x1d000")
    signed = sign(report(Exit.HANG, [barrier, *POOLS["openmp"][0]]))
    assert signed.key == ["ggml_graph_compute", "ggml_backend_sched_graph_compute_async"]


def test_two_builds_agree_where_there_are_names() -> None:
    one, other = ([Frame("", LLAMA, offset=offset), *ENCODE[2:]] for offset in ("0x21c372", "0x33333"))
    signed = sign(segv(one))
    assert signed == sign(segv(other))
    assert (signed.key[0], signed.confidence) == ("llm_graph_context::build_attn_inp_kv", "high")
    bare = [segv([Frame("", LLAMA, offset=offset)]) for offset in ("0x21c372", "0x33333")]
    assert sign(bare[0]).id != sign(bare[1]).id
    assert [sign(each).confidence for each in bare] == ["low", "low"]


def test_an_exception_is_its_type_and_where_it_was_thrown() -> None:
    threw = "terminate called after throwing an instance of 'std::{}'\n  what():  {}"
    texts = [("runtime_error", "near: alpha"), ("runtime_error", "near: beta\nand more"), ("bad_alloc", "x")]
    one, same, other = (sign(asserting(threw.format(*each), "", "terminate")) for each in texts)
    assert one == same != other
    assert one.key == [
        threw.format("runtime_error", "").partition("\n")[0],
        "llama_context::decode",
        "llama_decode",
    ]
    elsewhere = asserting(threw.format(*texts[0]), "", "terminate")
    thread = Thread(PID, crashed=True, native=ENCODE)
    evidence = msgspec.structs.replace(elsewhere.evidence, threads=[thread])
    assert sign(Report("x", "", evidence)).id != one.id
    nowhere = msgspec.structs.replace(elsewhere.evidence, threads=[])
    assert sign(Report("x", "", nowhere)).confidence == "low"


def test_the_class_is_part_of_the_id() -> None:
    bare = [sign(report(kind, python=[])) for kind in Exit]
    named = [
        sign(report(Exit.SIGNAL, signal=name, python=[])) for name in ("SIGSEGV", "SIGBUS", "SIGRTMIN+3")
    ]
    assert [signed.fault_class for signed in [*bare, *named]] == [*Exit, "SIGSEGV", "SIGBUS", "SIGRTMIN+3"]
    assert all((signed.key, signed.confidence) == ([], "low") for signed in [*bare, *named])
    assert len({signed.id for signed in [*bare, *named]}) == len(Exit) + 3
    assert sign(report(Exit.SIGNAL, signal="\x1b[31m")).fault_class == "signal"
    assert sign(report(Exit.SIGNAL, DECODE, signal="SIGABRT")).id == sign(report(Exit.ABORT, DECODE)).id
    assert sign(Report("x", "", Evidence(Exit.SIGNAL, PID, returncode=-8))).title == "SIGFPE"


def test_an_oom_is_one_group_wherever_it_ended() -> None:
    assert sign(report(Exit.OOM, ENCODE)).id == sign(report(Exit.OOM, DECODE)).id
    assert sign(report(Exit.OOM, ENCODE)).confidence == "low"


def test_a_hang_is_where_a_thread_is_stuck_in_native_code() -> None:
    idle = Thread(1, native=[Frame("ggml_graph_compute_secondary_thread", CPU)])
    waiting = Thread(PID, native=[Frame("futex_wait", LIBC)], python=PYTHON)
    stuck = Thread(9, native=DECODE, python=PYTHON)
    evidence = Evidence(Exit.HANG, PID, threads=[idle, waiting, stuck])
    assert sign(Report("x", "", evidence)).title == "hang in llama_context::decode"
    evidence = Evidence(Exit.HANG, PID, threads=[idle, waiting])
    assert sign(Report("x", "", evidence)).title == "hang in encode (native.py)"


def test_python_frames_come_from_faulthandler_too() -> None:
    text = (
        "Fatal Python error: Segmentation fault\n\n"
        'Thread 0x00007f01 (most recent call first):\n  File "/app/wait.py", line 1 in wait\n\n'
        "Current thread 0x00007f02 (most recent call first):\n"
        '  File "/venv/crumplezone/workers/native.py", line 9 in encode\n'
        '  File "native.py", line 1 in handle\n\n'
        "Extension modules: numpy (total: 1)\n"
    )
    from_stacks = report(Exit.SIGNAL, signal="SIGSEGV")
    from_text = report(Exit.SIGNAL, signal="SIGSEGV", python=[], faulthandler=text)
    assert sign(from_text) == sign(from_stacks)
    assert sign(from_text).key == ["encode (native.py)", "handle (native.py)"]
    assert sign(from_text).confidence == "low"
    assert sign(redact(from_text, b"k" * 32)) == sign(from_text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            asserting("GGML_ASSERT(a < 8) failed"),
            asserting("GGML_ASSERT(a < 8) failed", "/x/llama-context.cpp", line=9),
        ),
        (asserting("not implemented: 12, 0x7f00"), asserting("not implemented: 3, 0xbeef")),
        (
            asserting("bad tensor blk.0.attn_q in /a/b/m.gguf"),
            asserting("bad tensor blk.27.attn_q in /c/d/m.gguf"),
        ),
    ],
)
def test_assertions_that_are_the_same(one: Report, other: Report) -> None:
    assert sign(one).id == sign(other).id


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (asserting("GGML_ASSERT(a < 8) failed"), asserting("GGML_ASSERT(a < 16) failed")),
        (asserting("GGML_ASSERT(a) failed"), asserting("GGML_ASSERT(a) failed", "ops.cpp")),
        (asserting("unsupported type q4_0"), asserting("unsupported type q8_0")),
        (asserting("double free"), report(Exit.ABORT, DECODE)),
    ],
)
def test_assertions_that_differ(one: Report, other: Report) -> None:
    assert sign(one).id != sign(other).id


def test_two_runs_of_a_real_crash_have_one_signature() -> None:
    one, two = (sign(Report(name, "", die("segv"))) for name in "ab")
    assert one == two
    # ctypes.memset: all of the native stack is libc, libffi and CPython.
    assert one.title == "SIGSEGV in _segv (stunts.py)"


# --- properties

odd = st.text(st.characters(codec=None) | st.sampled_from("<>()[]{}&*:.#@+$'`~\"/ 09axo\n"), max_size=40)
odd |= st.sampled_from(
    ["operator", "const&", "std::" * 999, "<" * 9999, "(anonymous namespace)", "\udc80", " (deleted)"]
)
number = st.none() | st.integers(-100, 100) | st.just(10**5000)
any_frame = st.builds(Frame, symbol=odd, module=odd, offset=odd | st.just("0x12"), file=odd)
any_stack = st.lists(any_frame, max_size=6) | st.just([Frame("a<b>(c)", CPU)] * 5000)
any_thread = st.builds(Thread, tid=st.just(PID), crashed=st.booleans(), native=any_stack, python=any_stack)
any_evidence = st.builds(
    Evidence,
    exit=st.sampled_from(Exit),
    pid=st.just(PID),
    returncode=number,
    fault=st.none() | st.builds(Fault, st.just(10**5000), odd),
    assertion=st.none() | st.builds(Assertion, odd, odd, odd),
    threads=st.lists(any_thread, max_size=3),
    faulthandler=odd | odd.map(lambda text: f'Current thread \n  File "{text}", line 1 in {text}\n'),
)


@given(any_evidence)
@settings(max_examples=150, deadline=None)
def test_whatever_a_report_holds_it_is_signed_the_same_twice(evidence: Evidence) -> None:
    signed = sign(Report("a", "", evidence))
    assert signed == sign(Report("b", "later", msgspec.structs.replace(evidence, peak_rss=1)))
    assert len(signed.id) == 64
    assert len(signed.key) <= 4
    assert len(signed.title) <= 160
    assert all(part.isprintable() and len(part) <= 512 for part in [signed.title, *signed.key])
    msgspec.json.encode(signed)
    assert len(signature.frames(Report("a", "", evidence))) <= 64


@given(st.lists(st.tuples(st.integers(0, len(ENCODE)), st.sampled_from(RUNTIME)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_runtime_frames_anywhere_change_nothing(inserted: list[tuple[int, Frame]]) -> None:
    stack = list(ENCODE)
    for place, frame in inserted:
        stack.insert(place, frame)
    assert sign(segv(stack)) == sign(SEGV)
