"""Clusters join what is nearly the same."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.diagnostics.triage.cluster import Stack, clusters
from crumplezone.reports.analysis import signature
from tests.support.records.crashes import SEGV

names = st.sampled_from("abcdef")
stack_of_names = st.lists(names, max_size=12)


def alike(a: Sequence[str], b: Sequence[str]) -> bool:
    return clusters([Stack("SIGSEGV", tuple(a)), Stack("SIGSEGV", tuple(b))]) == [[0, 1]]


@given(stack_of_names, stack_of_names)
def test_likeness_is_symmetric_and_of_the_top(a: list[str], b: list[str]) -> None:
    assert alike(a, b) == alike(b, a)
    assert alike(a, a)
    if a[:1] != b[:1]:
        assert not alike(a, b)


def test_likeness_weighs_places() -> None:
    whole = list("abcdefg")
    assert alike(whole, whole[:3])  # cut short by an unwinder
    # Two frames of seven differ: more than 0.3 of what counts if they are high, and less if they are deep.
    assert alike(whole, [*whole[:5], "x", "y"])
    assert not alike(whole, ["a", "x", "y", *whole[3:]])
    # What matches in another depth counts less.
    assert alike(whole, ["a", *"xyz", *whole[1:]])
    assert not alike(whole, ["a", *"xyzv", *whole[1:]])
    assert alike(["a"] * 5000, ["a"] * 64)


@given(
    st.lists(st.builds(Stack, st.sampled_from(["SIGSEGV", "abort"]), stack_of_names.map(tuple)), max_size=25)
)
@settings(max_examples=60, deadline=None)
def test_clusters_part_the_stacks_and_never_mix(items: list[Stack]) -> None:
    found = clusters(items)
    assert sorted(index for cluster in found for index in cluster) == list(range(len(items)))
    for cluster in found:
        kinds = {(items[index].fault_class, items[index].frames[:1]) for index in cluster}
        assert len(kinds) == 1
        assert all(clusters([items[a], items[b]]) == [[0, 1]] for a in cluster for b in cluster if a < b)
    mirrored = [sorted(len(items) - 1 - index for index in cluster) for cluster in clusters(items[::-1])]
    assert sorted(mirrored) == found


def test_near_duplicates_are_one_cluster() -> None:
    stack = tuple(signature.frames(SEGV))
    other = (*stack[:3], "llama_model_qwen2::graph<T>::graph", *stack[4:])
    far = (stack[0], "elsewhere", "llama_decode", "main", "x", "y")
    kinds = [
        ("SIGSEGV", stack),
        ("SIGSEGV", other),
        ("SIGSEGV", far),
        ("SIGBUS", stack),
        ("SIGSEGV", stack[1:]),
    ]
    assert clusters([Stack(*kind) for kind in kinds]) == [[0, 1], [2], [3], [4]]


def test_a_bucket_with_too_many_stacks_is_bounded() -> None:
    items = [
        Stack("abort", ("top", *(str(depth * number % 7) for depth in range(60)), str(number)))
        for number in range(400)
    ]
    found = clusters([*items, *items])
    assert sum(len(cluster) == 2 for cluster in found) >= 400 - 256  # each with its twin, not compared
    assert sorted(index for cluster in found for index in cluster) == list(range(800))
