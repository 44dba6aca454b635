"""From TOML to cases: every combination once, every problem said, and ids that name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.diagnostics.ci import matrix
from crumplezone.diagnostics.ci.case import Case
from crumplezone.errors import InputError
from crumplezone.reports.records.run import Shape
from tests.support.paths import ROOT

MODEL = Path("/models/a.gguf")


def read(tmp_path: Path, text: str) -> matrix.Matrix:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return matrix.read(path)


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert caught.value.field == "--matrix"
    return caught.value.limit


def cases(shapes: list[Shape]) -> list[Case]:
    return matrix.plan(matrix.Matrix(shapes), [MODEL])


def test_the_default_holds_the_reference_matrix() -> None:
    shapes = matrix.default().shapes
    reference = [(1, 1), (1, 10), (3, 10), (16, 512)]
    for path in ("decode", "process", "encode", "safe"):
        for sequences, tokens in reference:
            assert Shape(path, sequences, tokens) in shapes
    odd = {
        name
        for shape in shapes
        for name in Shape.__struct_fields__
        if getattr(shape, name) != getattr(Shape(), name)
    }
    assert odd >= {"kv_unified", "type_k", "type_v", "flash_attn", "n_threads", "n_ubatch", "pooling"}
    assert len(shapes) == len(set(shapes))


def test_every_combination_once(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        deadline = 5
        memory_mib = 100
        [[cases]]
        path = ["decode", "encode"]
        tokens = [1, 2, 1]
        [[cases]]
        tokens = 2
        kv_unified = [false, true]
        """,
    )
    expected = [Shape("decode"), Shape("decode", tokens=2), Shape("encode"), Shape("encode", tokens=2)]
    assert found == matrix.Matrix([*expected, Shape(tokens=2, kv_unified=True)], 5.0, 100 << 20)


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff[[cases]]\ntokens = [1, 2]").shapes


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    said = problem(
        tmp_path,
        """
        deadlin = 5
        memory_mib = "much"
        [[cases]]
        tokens = [1, 0]
        sequence = 3
        [[cases]]
        path = "decod"
        kv_unified = 1
        n_threads = []
        type_k = ["f16", 7]
        """,
    )
    assert said.split("; ") == [
        "deadlin is no key (known are deadline, memory_mib, cases)",
        "memory_mib is 'much': Expected `int`, got `str`",
        "cases[1].tokens is [1, 0]: Expected `int` >= 1",
        f"cases[1].sequence is no key (known are {', '.join(Shape.__struct_fields__)})",
        "cases[2].path is 'decod': must be decode, process, encode, embed, safe",
        "cases[2].kv_unified is 1: Expected `bool`, got `int`",
        "cases[2].n_threads is empty: give a value or a list of them",
        "cases[2].type_k is ['f16', 7]: must be f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[cases]\n", "is not TOML: .*line 1"),
        ("cases = 1", "cases is 1: Expected `array`"),
        ("cases = []", "cases is \\[\\]: Expected `array` of length >= 1"),
        ("", "there is no \\[\\[cases\\]\\]"),
        ("deadline = nan\n[[cases]]", "deadline is nan: Expected `float` > 0"),
        (f"[[cases]]\ntokens = {list(range(1, 1001))}\nn_batch = {list(range(1, 20))}", "19,000 cases"),
        (f"a = {'[' * 100_000}", "is not TOML"),
        (f"[[cases]]\ntokens = 0x{'f' * 5000}", "tokens is a number of thousands of digits: "),
        (f"{'k' * 10_000} = 1\n[[cases]]", f"^{'k' * 60} is no key"),
        ("".join(f"key{n} = 1\n" for n in range(50)), "and 31 more$"),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert re.search(said, problem(tmp_path, text), re.DOTALL)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "large").write_bytes(b"#" * (matrix.MAX_BYTES + 1))
    for name, said in (
        ("none", "No such file"),
        ("fifo", "regular"),
        ("bytes", "UTF-8"),
        ("large", "larger"),
    ):
        with pytest.raises(InputError, match=said):
            matrix.read(tmp_path / name)


def test_an_id_says_what_is_not_as_usual() -> None:
    shape = Shape("encode", 3, 10, kv_unified=True, n_threads=1)
    assert matrix.case_id("a", shape) == "a encode 3x10 kv_unified=true n_threads=1"


shapes = st.builds(
    Shape,
    path=st.sampled_from(["decode", "encode"]),
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 3),
    n_batch=st.sampled_from([32, 2048]),
    kv_unified=st.booleans(),
    flash_attn=st.sampled_from(["auto", "on"]),
)


@given(shapes, shapes)
@settings(max_examples=200)
def test_two_shapes_have_two_ids(one: Shape, other: Shape) -> None:
    assert (matrix.case_id("a", one) == matrix.case_id("a", other)) == (one == other)


@given(st.lists(shapes, min_size=1, unique=True), st.integers(1, 7))
def test_the_shards_are_all_of_it(some: list[Shape], count: int) -> None:
    every = cases(some)
    shards = [matrix.choose(every, shard=f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(case.id for shard in shards for case in shard) == sorted(case.id for case in every)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "1", "a/b", "1/4/5", "-1/4", " 1/4", "99999/99999"])
def test_a_shard_that_there_is_not_is_refused(shard: str) -> None:
    with pytest.raises(InputError, match="must be i/n"):
        matrix.choose(cases([Shape()]), shard=shard)


def test_only_finds_a_pattern_anywhere() -> None:
    every = cases([Shape(path) for path in ("decode", "encode", "safe")])
    assert [case.shape.path for case in matrix.choose(every, "code")] == ["decode", "encode"]
    assert [case.shape.path for case in matrix.choose(every, "a ?n*1")] == ["encode"]
    with pytest.raises(InputError, match="none of 3 cases, such as 'a decode 1x1'"):
        matrix.choose(every, "embed")


def test_models_are_told_apart_by_their_names(tmp_path: Path) -> None:
    twice = matrix.plan(matrix.Matrix([Shape()]), [MODEL, MODEL])
    assert [case.id for case in twice] == ["a decode 1x1"]
    with pytest.raises(InputError, match=r"has the name of /models/a\.gguf"):
        matrix.plan(matrix.Matrix([Shape()]), [MODEL, tmp_path / "a.gguf"])
    with pytest.raises(InputError, match="not UTF-8"):
        matrix.plan(matrix.Matrix([Shape()]), [Path("/b\udcff.gguf")])


def test_the_document_shows_a_matrix_and_every_key(tmp_path: Path) -> None:
    document = (ROOT / "docs/ci.md").read_text()
    (example,) = re.findall(r"\n\n((?:    .*\n|\n)*    \[\[cases\]\]\n(?:    .*\n|\n)*)", document)
    assert len(read(tmp_path, example).shapes) == 6
    assert set(re.findall(r"`(\w+)`", document)) >= set(Shape.__struct_fields__)
