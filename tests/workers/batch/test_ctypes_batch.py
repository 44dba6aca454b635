"""Structures full of pointers: what is there is copied, what is not is an error with a name."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from crumplezone.errors import InputError
from crumplezone.workers.batch.columns import Columns
from crumplezone.workers.batch.ctypes_batch import MAX_TOKENS, read_llama_batch
from crumplezone.workers.batch.validate import Level
from tests.support.ctypes_batches import INT32, LlamaBatch, Owner, point
from tests.support.decoders import descriptors, opened_since

PAGE = mmap.PAGESIZE


def read(batch: object, level: Level = "strict", follows: list[int] | None = None) -> Columns:
    return read_llama_batch(
        batch, n_embd=4, next_positions=None if follows is None else np.array(follows, np.int32), level=level
    )


def nothing() -> int:
    """An address where nothing is: a page that was mapped, and is no more."""
    page = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    page.close()
    return address


@pytest.fixture
def cliff() -> Iterator[tuple[int, mmap.mmap]]:
    """Two pages, of which the second may not be touched: its address, and the mapping."""
    pages = mmap.mmap(-1, 2 * PAGE)
    view = ctypes.c_char.from_buffer(pages)
    edge = ctypes.addressof(view) + PAGE
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert mprotect(edge, PAGE, 0) == 0  # PROT_NONE
    yield edge, pages
    assert mprotect(edge, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    del view
    pages.close()


def test_what_is_there_is_copied() -> None:
    owner = Owner([[0], [1, 2], [0]])
    columns = read(owner.batch)
    assert columns.tokens is not None
    assert columns.tokens.tolist() == [10, 11, 12]
    assert columns.embd is None
    assert columns.positions.tolist() == [20, 21, 22]
    assert columns.n_seq_id.tolist() == [1, 2, 1]
    assert columns.seq_ids.tolist() == [0, 1, 2, 0]
    assert columns.outputs.tolist() == [False, True, False]
    assert columns.nulls == frozenset()
    columns.tokens[0] = columns.positions[0] = 99
    assert owner.arrays["token"][0] == 10
    assert owner.arrays["pos"][0] == 20


def test_many_tokens_are_more_than_one_pipe_or_writev() -> None:
    n = 70_000
    owner = Owner([[i % 7, 7 + i % 3] for i in range(n)])
    columns = read(owner.batch)
    assert columns.tokens is not None
    assert columns.tokens.tolist() == list(range(10, 10 + n))
    assert columns.seq_ids.tolist() == [s for i in range(n) for s in (i % 7, 7 + i % 3)]


def test_embeddings_are_rows_of_n_embd() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    owner = Owner([[0]] * 3)
    point(owner.batch, "token", 0)
    point(owner.batch, "embd", vectors.ctypes.data)
    columns = read(owner.batch)
    assert columns.tokens is None
    assert columns.embd is not None
    assert columns.embd.tolist() == vectors.tolist()


def test_a_wrapper_is_known_by_what_it_holds() -> None:
    class Wrapper:
        batch: LlamaBatch | None = None

    wrapper, owner = Wrapper(), Owner([[0]])
    wrapper.batch = owner.batch
    assert len(read(wrapper)) == 1
    wrapper.batch = None
    with pytest.raises(InputError, match="not closed"):
        read(wrapper)


class Short(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("token", INT32))


class Narrow(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name, _ in LlamaBatch._fields_)


@pytest.mark.parametrize("other", [None, 7, "batch", Short(), Narrow(), ctypes.c_int(3), LlamaBatch])
def test_other_things_are_refused(other: object) -> None:
    with pytest.raises(InputError):
        read(other)


def test_null_means_what_llama_h_says() -> None:
    owner = Owner([[0]] * 3)
    for name in ("pos", "n_seq_id", "seq_id", "logits"):
        point(owner.batch, name, 0)
    columns = read(owner.batch, follows=[7, 0])
    assert columns.positions.tolist() == [7, 8, 9]
    assert columns.n_seq_id.tolist() == [1, 1, 1]
    assert columns.seq_ids.tolist() == [0, 0, 0]
    assert columns.outputs.tolist() == [False, False, True]
    assert columns.nulls == frozenset()
    assert read(owner.batch, "off").nulls == {"pos", "n_seq_id", "seq_id", "logits"}


def test_no_position_means_null_but_null() -> None:
    owner = Owner([[0]] * 2)
    owner.arrays["pos"][:] = -(2**31), -1
    assert read(owner.batch).positions.tolist() == [-(2**31), -1]


def test_null_positions_go_on_in_each_sequence() -> None:
    owner = Owner([[0], [1], [0], [1]])
    point(owner.batch, "pos", 0)
    assert read(owner.batch, follows=[5, 9]).positions.tolist() == [5, 9, 6, 10]


def test_the_null_pointer_of_one_token() -> None:
    owner = Owner([[0], [1], [2]])
    owner.arrays["seq_id"][1] = 0
    with pytest.raises(InputError, match=r"seq_id\[1\] is 'NULL': must point to 1"):
        read(owner.batch)
    columns = read(owner.batch, "off")
    assert columns.nulls == {"seq_id[1]"}
    assert columns.seq_ids.tolist() == [0, 0, 2]


def test_without_sequences_a_token_has_one() -> None:
    owner = Owner([[0], [0, 1]])
    point(owner.batch, "seq_id", 0)
    with pytest.raises(InputError, match=r"n_seq_id\[1\] is 2: must be 1"):
        read(owner.batch)
    assert read(owner.batch, "off").nulls == {"seq_id"}


@pytest.mark.parametrize("address", [1, 2**47 - 1, 2**63, 2**64 - 1, "unmapped"])
@pytest.mark.parametrize("field", ["token", "embd", "pos", "n_seq_id", "seq_id", "logits"])
def test_a_wild_pointer_is_an_error(field: str, address: int | str) -> None:
    owner = Owner([[0]] * 3)
    point(owner.batch, field, nothing() if isinstance(address, str) else address)
    with pytest.raises(InputError, match=rf"^{field}\[0\] is '0x[0-9a-f]+': .*n_tokens is 3"):
        read(owner.batch, "off")


@pytest.mark.parametrize("address", [1, 2**63, 2**64 - 8, "unmapped"])
@pytest.mark.parametrize("bad", [0, 1, 1500])
def test_a_wild_pointer_to_sequence_ids_is_an_error(bad: int, address: int | str) -> None:
    owner = Owner([[0, 1]] * 1600)
    owner.arrays["seq_id"][bad] = nothing() if isinstance(address, str) else address
    with pytest.raises(
        InputError, match=rf"^seq_id\[{bad}\]\[0\] is '0x[0-9a-f]+': .*n_seq_id\[{bad}\] is 2"
    ):
        read(owner.batch, "off")


@pytest.mark.parametrize("there", [0, 1, 3, 1000])
@pytest.mark.parametrize(
    ("field", "size"), [("token", 4), ("embd", 16), ("pos", 4), ("n_seq_id", 4), ("logits", 1)]
)
def test_an_array_that_ends_too_soon(cliff: tuple[int, mmap.mmap], field: str, size: int, there: int) -> None:
    edge, pages = cliff
    there = min(there, PAGE // size)
    pages[:PAGE] = b"\1" + bytes(PAGE - 1)
    owner = Owner([[0]] * (there + 2))
    point(owner.batch, field, edge - there * size)
    with pytest.raises(InputError, match=rf"^{field}\[{there}\] is '{edge:#x}'"):
        read(owner.batch)
    owner.batch.n_tokens = there
    assert len(read(owner.batch)) == there  # to the last byte before the edge


def test_sequence_ids_that_end_too_soon(cliff: tuple[int, mmap.mmap]) -> None:
    edge, pages = cliff
    pages[PAGE - 8 : PAGE] = np.array([3, 4], np.int32).tobytes()
    owner = Owner([[0], [1], [2]])
    owner.arrays["seq_id"][1] = edge - 8
    owner.arrays["n_seq_id"][1] = 2
    assert read(owner.batch).seq_ids.tolist() == [0, 3, 4, 2]
    owner.arrays["n_seq_id"][1] = 3
    with pytest.raises(InputError, match=rf"^seq_id\[1\]\[2\] is '{edge:#x}'"):
        read(owner.batch)


@pytest.mark.parametrize("n_tokens", [-1, -(2**31), MAX_TOKENS + 1, 2**31 - 1])
def test_n_tokens_is_bounded(n_tokens: int) -> None:
    owner = Owner([[0]])
    owner.batch.n_tokens = n_tokens
    with pytest.raises(InputError, match="n_tokens"):
        read(owner.batch, "off")


def test_no_tokens_read_nothing() -> None:
    batch = LlamaBatch(n_tokens=0)
    for name in ("token", "pos", "n_seq_id", "seq_id", "logits"):
        point(batch, name, 2**64 - 1)
    assert len(read(batch)) == 0


@pytest.mark.parametrize("count", [257, 2**31 - 1])
def test_uninitialised_counts_are_refused_before_they_are_followed(count: int) -> None:
    owner = Owner([[0], [0]])
    owner.arrays["n_seq_id"][1] = count
    with pytest.raises(InputError, match=rf"n_seq_id\[1\] is {count}: must be at most 256"):
        read(owner.batch, "off")
    many = Owner([[0]] * 20_000)
    many.arrays["n_seq_id"][:] = 256
    with pytest.raises(InputError, match="sum of n_seq_id"):
        read(many.batch, "off")


def test_counts_below_one_have_no_ids() -> None:
    owner = Owner([[0], [0], [2]])
    owner.arrays["n_seq_id"][:] = -1, 0, 1
    owner.arrays["seq_id"][:2] = 1, 2**64 - 1
    columns = read(owner.batch)
    assert columns.n_seq_id.tolist() == [-1, 0, 1]
    assert columns.seq_ids.tolist() == [2]


def test_a_structure_that_was_freed_is_an_error() -> None:
    with pytest.raises(InputError, match=r"batch is '0x[0-9a-f]+': .* freed"):
        read(LlamaBatch.from_address(nothing()))


def test_no_descriptor_is_left() -> None:
    owner = Owner([[0]] * 3)
    before = descriptors()
    read(owner.batch)
    point(owner.batch, "pos", 1)
    with pytest.raises(InputError):
        read(owner.batch)
    assert opened_since(before) == []


def read_real_ones() -> None:
    """What llama_cpp itself makes. Runs in a process of its own: no supervisor loads llama_cpp."""
    import llama_cpp as C  # noqa: N812 - the C API
    from llama_cpp._internals import LlamaBatch as Wrapper

    tokens = (C.llama_token * 3)(5, 6, 7)
    one = read(C.llama_batch_get_one(tokens, 3), follows=[4])
    assert one.tokens is not None
    assert one.tokens.tolist() == [5, 6, 7]
    assert one.positions.tolist() == [4, 5, 6]
    assert one.outputs.tolist() == [False, False, True]
    wrapper = Wrapper(n_tokens=8, embd=0, n_seq_max=2, verbose=False)
    wrapper.set_batch([1, 2], n_past=3, logits_all=False)
    wrapper.add_sequence([8, 9], 1, logits_all=True)
    both = read(wrapper)
    assert both.tokens is not None
    assert both.tokens.tolist() == [1, 2, 8, 9]
    assert both.positions.tolist() == [3, 4, 0, 1]
    assert both.seq_ids.tolist() == [0, 0, 1, 1]
    assert both.outputs.tolist() == [False, True, True, True]
    wrapper.close()  # type: ignore[no-untyped-call]
    embd = C.llama_batch_init(2, 4, 1)
    embd.n_tokens = 2
    for i in range(8):
        embd.embd[i] = i
    for i in range(2):
        embd.pos[i], embd.n_seq_id[i], embd.seq_id[i][0], embd.logits[i] = i, 1, 0, 0
    vectors = read(embd)
    assert vectors.embd is not None
    assert vectors.embd.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    C.llama_batch_free(embd)
    print("read")


def test_the_real_structures() -> None:
    code = "from tests.workers.batch.test_ctypes_batch import read_real_ones; read_real_ones()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.stdout, run.returncode) == ("read\n", 0), run.stderr
