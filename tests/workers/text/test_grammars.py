"""Grammars of JSON schemas, and whether llama.cpp can use one; what is too much costs its own call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone import Decoder
from crumplezone.errors import InputError
from crumplezone.reports.records.report import Exit
from crumplezone.reports.store.store import Store
from tests.support.decoders import Open, reports_of

Dose = Callable[..., None]

SCHEMAS: dict[str, Any] = {
    "anything": {},
    "object": {"type": "object"},
    "string": {"type": "string", "minLength": 2, "maxLength": 5},
    "date": {"type": "string", "format": "date-time"},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,3}-\\\\d*$"},
    "constants": {"enum": ["a\\b", 'c"d', "e\nf", 1.5, None, {"x": []}]},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]},
    "union": {"anyOf": [{"type": "number"}, {"type": ["string", "null"]}]},
    "names": {"type": "object", "properties": {'a"b\\c': {}, "": {}, "\u00fc \u2028": {"const": 1}}},
    "refs": {
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/string"}, "right": {"$ref": "#/properties/left"}},
        "$defs": {"string": {"type": "array", "items": {"$ref": "#/$defs/string"}}},
    },
    "a root that refers": {
        "$ref": "#/$defs/Node~1x",
        "$defs": {"Node/x": {"type": "object", "properties": {"next": {"$ref": "#"}, "$ref": {}}}},
    },
    "all of": {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}}]},
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_becomes_a_grammar_that_llama_cpp_reads(decoder: Decoder, kind: str) -> None:
    grammar = decoder.schema_to_grammar(SCHEMAS[kind])
    assert grammar.startswith("root ::= answer\n")
    assert decoder.schema_to_grammar(SCHEMAS[kind]) == grammar


def test_texts_in_schemas_are_quoted(decoder: Decoder) -> None:
    """A grammar's literal is unquoted twice: by llama.cpp, then as JSON."""
    rule = next(
        line for line in decoder.schema_to_grammar({"const": 'a\\b"'}).splitlines() if "answer ::=" in line
    )
    literal = rule.partition("::= ")[2]
    assert json.loads(json.loads(literal)) == 'a\\b"'


def test_definitions_of_several_schemas_are_kept_apart(decoder: Decoder) -> None:
    def schema(kind: str) -> dict[str, Any]:
        return {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": kind}}}

    assert decoder._texts
    rules = 'root ::= "1" one | "2" two'
    grammar = decoder._texts.grammar("g", rules, {"one": schema("string"), "two": schema("boolean")})
    lines = dict(line.split(" ::= ", 1) for line in grammar.splitlines() if line)
    assert (lines[lines["one-x"]], lines[lines["two-x"]]) == ("string", "boolean")


KINDS = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"])
SCHEMA = st.recursive(
    st.fixed_dictionaries({"type": KINDS})
    | st.fixed_dictionaries({"enum": st.lists(st.text() | st.integers(), min_size=1)}),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.text(), inner, max_size=3)}
        )
    ),
    max_leaves=6,
)


def test_any_schema_of_the_usual_parts(tiny: Path, make: Open) -> None:
    decoder = make(tiny, 1, awake=False)

    @settings(max_examples=60, deadline=None)
    @given(schema=SCHEMA)
    def check(schema: dict[str, Any]) -> None:
        assert "root ::= answer" in decoder.schema_to_grammar(schema)

    check()
    assert len(decoder.processes["texts"]) == 1


DEEP: dict[str, Any] = {"type": "array"}
for _ in range(600):
    DEEP = {"type": "array", "items": DEEP}

BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "must be an object"),
    "a kind": ({"type": "fruit"}, "fruit"),
    "a pattern": ({"type": "string", "pattern": "x"}, "Pattern must start"),
    "a look ahead": ({"type": "string", "pattern": "^(?=x)$"}, "Unsupported pattern"),
    "a page": ({"$ref": "https://example.org/schema.json"}, "nothing is fetched"),
    "nothing there": ({"$ref": "#/$defs/x"}, "no such part"),
    "itself": ({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}, "cannot read it"),
    "depth": (DEEP, "nested too deeply|must be JSON|are the limit"),
    "length": ({"type": "string", "maxLength": 10**9}, "bytes of memory|5 seconds"),
    "size": ({"enum": ["x" * 1000] * 1049}, "at most|are the limit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_schemas_that_are_refused(decoder: Decoder, kind: str) -> None:
    schema, told = BAD[kind]
    with pytest.raises(InputError, match=told):
        decoder.schema_to_grammar(schema)
    assert decoder.schema_to_grammar({})


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("", "empty"),
        ("root ::= (", "cannot read it .*expecting"),
        ("x ::= [a]", "cannot read it .*root"),
        ("root ::= root [a]", "cannot read it .*left recursion"),
        ("root ::= y", "cannot read it .*y"),
        ("root ::= [a]\0", "NUL"),
        (5, "must be a str"),
    ],
)
def test_grammars_that_are_refused(decoder: Decoder, rules: Any, told: str) -> None:
    assert decoder._texts
    with pytest.raises(InputError, match=told) as caught:
        decoder._texts.grammar("grammar", rules)
    assert caught.value.field == "grammar"
    assert decoder._texts.grammar("grammar", "root ::= [ab]+") == "root ::= [ab]+"


@pytest.mark.parametrize("how", ["segv", "many"])
def test_a_crash_while_a_grammar_is_read(
    how: str, tiny: Path, make: Open, store: Store, dose_text: Dose, tmp_path: Path
) -> None:
    dose_text("MakeGrammar", how, once=str(tmp_path / "once"))
    decoder = make(tiny, 1, awake=False)
    with pytest.raises(InputError, match="there is a crash report of it"):
        decoder.schema_to_grammar({})
    assert decoder.schema_to_grammar({})
    (report,) = reports_of(decoder, store)
    assert report.evidence.exit is (Exit.SIGNAL if how == "segv" else Exit.PROTOCOL)


def test_what_is_known_is_not_asked_again(decoder: Decoder) -> None:
    assert decoder._texts
    first = decoder.schema_to_grammar({"type": "string"})
    for client in decoder._texts._clients:
        client.close()
    assert decoder.schema_to_grammar({"type": "string"}) == first
