"""When signatures that know different amounts are of one crash, and when they must not be taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.reports.analysis.frames import REST_UNKNOWN
from crumplezone.reports.analysis.same import CUT, canonical, is_partial, is_same, only_match
from crumplezone.reports.analysis.signature import sign, signature_of
from crumplezone.reports.records.report import Assertion, Exit, Frame, Report, Signature
from tests.support.records.crashes import CALLED, CPU, ENCODE, LIBC, LLAMA, report, segv

BUILD = "6c0509bf"
FUNCTIONS = [Frame(name, LLAMA, BUILD, f"0x{at}0") for at, name in enumerate("fghijk", 1)]
REST = Frame(REST_UNKNOWN)
f, g, h, i, j, k = FUNCTIONS


def nameless(frame: Frame) -> Frame:
    """As the frame was written where only its program counter was known."""
    return Frame("", frame.module, frame.build_id, frame.offset)


WHOLE = sign(segv([f, g, h, *CALLED]))
OTHER = sign(segv([f, g, i, *CALLED]))
SHORT = sign(segv([f, *CALLED]))  # a whole stack of one name
CUT_ONE, CUT_TWO = sign(segv([f, REST])), sign(segv([f, g, REST]))
PLACE = sign(segv([nameless(f)]))

ELSEWHERE = sign(segv([Frame("", LLAMA, "another", f.offset)]))


def test_a_stack_that_was_cut_short_says_so() -> None:
    assert CUT_TWO.key == ["f", "g", CUT]
    assert CUT_ONE.title == WHOLE.title
    assert [is_partial(each) for each in (WHOLE, OTHER, SHORT, CUT_ONE, CUT_TWO, PLACE)] == [False] * 3 + [
        True
    ] * 3
    assert sign(segv([f, g, h, REST])) == WHOLE  # what was cut off would not have counted
    assert len({each.id for each in (WHOLE, OTHER, SHORT, CUT_ONE, CUT_TWO, PLACE)}) == 6


def test_below_where_work_is_shared_out_nothing_is_missing() -> None:
    kernel = [Frame("dequantize_row_q8_0", CPU), Frame("ggml_graph_compute_thread", CPU)]
    assert sign(segv([*kernel, REST])) == sign(segv([*kernel, Frame("start_thread", LIBC)]))


def test_inlined_functions_do_not_count() -> None:
    """A stack from debug information, and the same crash without."""
    inlined = [Frame("std_at (inlined)", LLAMA, BUILD, f.offset), f, g, Frame("x (inlined)", LLAMA), h]
    assert sign(segv(inlined)) == WHOLE


def test_the_place_is_one_in_a_build() -> None:
    assert WHOLE.place == PLACE.place == f"libllama.so+{f.offset} {BUILD}"
    assert sign(segv([Frame("f", LLAMA, "", f.offset)])).place == ""
    assert sign(report(Exit.OOM, [f])).place == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (CUT_ONE, WHOLE, True),
        (CUT_TWO, WHOLE, True),
        (CUT_ONE, CUT_TWO, True),
        (CUT_TWO, OTHER, True),
        (CUT_ONE, SHORT, True),
        (CUT_TWO, SHORT, False),
        (PLACE, WHOLE, True),
        (PLACE, CUT_ONE, True),
        (WHOLE, OTHER, False),
        (WHOLE, SHORT, False),
        (PLACE, sign(segv([g, h, i])), False),
        (PLACE, sign(segv([Frame("f", LLAMA, "another build", f.offset), g, h])), False),
        (CUT_ONE, sign(report(Exit.SIGNAL, [f, g, h], signal="SIGBUS")), False),
        (CUT_ONE, sign(segv([g, f, h])), False),
        (sign(segv([])), WHOLE, False),  # nothing is known, so nothing is the same
    ],
)
def test_pairs(one: Signature, other: Signature, same: bool) -> None:
    assert is_same(one, other) is same


def test_a_message_that_many_places_share_is_no_evidence() -> None:
    said = Assertion("double free or corruption (out)", "glibc")
    bare, placed = (sign(report(Exit.ABORT, native, assertion=said, python=[])) for native in ([], [f, g, h]))
    cut = sign(report(Exit.ABORT, [f, REST], assertion=said))
    assert not is_same(bare, placed)
    assert is_same(cut, placed)
    assert not is_same(cut, sign(report(Exit.ABORT, [g, h, i], assertion=said)))


@pytest.mark.parametrize(
    ("seen", "heads"),
    [
        ([CUT_ONE, WHOLE], {CUT_ONE.id: WHOLE}),
        ([CUT_ONE, CUT_TWO, WHOLE], {CUT_ONE.id: WHOLE, CUT_TWO.id: WHOLE}),
        ([CUT_ONE, CUT_TWO], {CUT_ONE.id: CUT_TWO}),
        ([CUT_TWO, WHOLE, OTHER], {}),  # it may be either
        ([CUT_ONE, CUT_TWO, WHOLE, OTHER], {}),
        ([CUT_ONE, WHOLE, SHORT], {}),
        ([CUT_ONE], {}),
        ([WHOLE, OTHER], {}),
        ([PLACE, WHOLE], {PLACE.id: WHOLE}),
        ([PLACE, CUT_ONE, WHOLE], {PLACE.id: WHOLE, CUT_ONE.id: WHOLE}),
        ([PLACE, WHOLE, OTHER], {}),
        ([PLACE, ELSEWHERE, WHOLE], {}),  # two of one id, of which one may be something else
    ],
)
def test_what_each_is_counted_by(seen: list[Signature], heads: dict[str, Signature]) -> None:
    assert canonical(seen) == canonical(reversed(seen)) == heads


def test_the_only_match() -> None:
    assert only_match(CUT_TWO, [WHOLE, SHORT]) == WHOLE
    assert only_match(CUT_TWO, [WHOLE, OTHER]) is None
    assert only_match(WHOLE, [WHOLE, CUT_ONE]) == WHOLE
    assert only_match(WHOLE, [OTHER]) is None


def test_an_older_report_has_its_place_after_all() -> None:
    signed = Signature(WHOLE.id, WHOLE.fault_class, WHOLE.key, WHOLE.title, version=WHOLE.version)
    old = Report("x", "", segv([f, g, h]).evidence, signature=signed)
    assert signature_of(old) == WHOLE


stacks = st.lists(st.sampled_from(FUNCTIONS), min_size=1, max_size=5)
crashes = st.builds(
    lambda stack, cut, named, bus: sign(
        report(
            Exit.SIGNAL,
            [*(stack if named else map(nameless, stack)), *([REST] if cut else [])],
            signal="SIGBUS" if bus else "SIGSEGV",
        )
    ),
    *(stacks, st.booleans(), st.booleans(), st.booleans()),
)


@given(crashes, crashes)
def test_the_relation(one: Signature, other: Signature) -> None:
    assert is_same(one, one)
    assert is_same(one, other) == is_same(other, one)
    if not is_partial(one) and not is_partial(other):
        assert is_same(one, other) == (one.id == other.id)
    if one.fault_class != other.fault_class:
        assert not is_same(one, other)


@given(st.lists(crashes, max_size=12))
def test_whole_signatures_are_never_merged(seen: list[Signature]) -> None:
    heads = canonical(seen)
    by_id = {each.id: each for each in seen}
    assert not {name for name in heads if not is_partial(by_id[name])}
    for name, head in heads.items():
        assert head.id in by_id
        assert head.id not in heads  # it is counted by itself
        assert any(
            is_same(each, other) for each in seen for other in seen if (each.id, other.id) == (name, head.id)
        )
    for each in seen:  # no other whole one could have been meant
        whole = {other.id for other in seen if is_same(each, other) and not is_partial(other)}
        assert each.id not in heads or whole <= {heads[each.id].id}


def test_the_stack_of_a_real_crash_and_its_beginning() -> None:
    whole = sign(segv([*ENCODE, *CALLED]))
    assert is_same(whole, sign(segv([*ENCODE[:1], REST])))
