"""Messages, tools and formats in OpenAI's shape: what is wrong is one error that names the field."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from crumplezone.errors import InputError
from crumplezone.workers.chat.families import GENERIC, HERMES, LLAMA_3, MISTRAL, Family
from crumplezone.workers.chat.messages import checked_messages
from crumplezone.workers.chat.tools import answer_schema, checked_tools, told_in_text

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


def test_messages_become_what_templates_expect() -> None:
    given: list[dict[str, Any]] = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL], "more": [1]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "tool_calls": None},
        {"role": "user", "content": "d", "tool_calls": None},
    ]
    before = copy.deepcopy(given)
    assert checked_messages(given) == [
        {"role": "system", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"a": 1}}}
            ],
            "more": [1],
        },
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert given == before


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "x"])
def test_arguments_that_a_model_cut_off_stay_as_they_are(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
    (message,) = checked_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def function(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": "{}"} | changes}]}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("Hi", "messages"),
        (None, "messages"),
        ([], "messages"),
        (USER, "messages"),
        ([USER] * 70_000, "length of messages"),
        ([USER, "Hi"], "messages[1]"),
        ([{1: 2}], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "robot", "content": "Hi"}], "messages[0].role"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0].role"),
        ([USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
        ),
        ([USER | {"name": 5}], "messages[0].name"),
        ([USER | {"tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{"type": "x"}]}], "messages[0].tool_calls[0].type"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([function(name=None)], "messages[0].tool_calls[0].function.name"),
        ([function(arguments=5)], "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_messages_that_are_none(messages: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_messages(messages)
    assert caught.value.field == field


def test_an_image_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="images, sound and files are not read here"):
        checked_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def named(name: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ("get", "auto", "tools"),
        ([5], "auto", "tools[0]"),
        ([{"type": "web"}], "auto", "tools[0].type"),
        ([{"type": "function"}], "auto", "tools[0].function"),
        ([named(5)], "auto", "tools[0].function.name"),
        ([named("a b")], "auto", "tools[0].function.name"),
        ([named("x" * 65)], "auto", "tools[0].function.name"),
        ([named("x", parameters=[])], "auto", "tools[0].function.parameters"),
        ([TOOL, TOOL], "auto", "names of tools"),
        ([TOOL] * 300, "auto", "number of tools"),
        ([TOOL], "any", "tool_choice"),
        ([TOOL], 5, "tool_choice"),
        ([TOOL], {"type": "function"}, "tool_choice.function"),
        ([TOOL], named("other"), "tool_choice.function.name"),
        ([], "required", "tool_choice"),
        (None, named("get"), "tool_choice"),
    ],
)
def test_tools_that_are_none(tools: Any, choice: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_tools(tools, choice)
    assert caught.value.field == field


def test_which_tools_may_be_called() -> None:
    both = [TOOL, named("set")]
    assert [
        checked_tools(both, choice).names for choice in ("auto", None, "none", "required", named("set"))
    ] == [
        ["get", "set"],
        ["get", "set"],
        [],
        ["get", "set"],
        ["set"],
    ]
    forced = [checked_tools(both, choice).forced for choice in ("auto", "none", "required", named("set"))]
    assert forced == [False, False, True, True]


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": {"a": 1}}, {"a": 1}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"b": 2}}}, {"b": 2}),
    ],
)
def test_forms_of_answers(given: Any, schema: Any) -> None:
    assert answer_schema(given) == schema


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": ["text"]}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_object", "schema": 5}, "response_format.schema"),
    ],
)
def test_forms_that_are_none(given: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        answer_schema(given)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("family", "root", "begin"),
    [
        (HERMES, '"<tool_call>\\n" call "\\n</tool_call>"', '"{\\"name\\": \\"get\\", \\"arguments\\": "'),
        (LLAMA_3, "call", '"{\\"name\\": \\"get\\", \\"parameters\\": "'),
        (MISTRAL, '"[TOOL_CALLS][" call "]"', '"{\\"name\\": \\"get\\", \\"arguments\\": "'),
        (GENERIC, "call", '"{\\"name\\": \\"get\\", \\"arguments\\": "'),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
def test_the_grammar_of_a_call_is_that_of_its_family(family: Family, root: str, begin: str) -> None:
    rules, schemas = checked_tools([TOOL, named("set")], "required").grammar(family, thinking=False)
    assert rules.splitlines()[:3] == [
        f"root ::= {root}",
        "call ::= call-0 | call-1",
        f'call-0 ::= {begin} arguments-0 "}}"',
    ]
    assert schemas == {"arguments-0": {"type": "object"}, "arguments-1": {"type": "object", "properties": {}}}
    rules, _ = checked_tools([TOOL], "required").grammar(family, thinking=True)
    assert rules.startswith("root ::= think ")


def test_tools_are_told_of_where_a_template_knows_none() -> None:
    tools = checked_tools([TOOL], "auto")
    talk = checked_messages(
        [
            USER,
            {"role": "assistant", "content": "Well.", "tool_calls": [CALL]},
            {"role": "tool", "content": "12", "tool_call_id": "1"},
        ]
    )
    system, *rest = told_in_text(talk, tools)
    assert system["role"] == "system"
    assert '{"name": "get", "parameters": {"type": "object"}}' in system["content"]
    assert rest == [
        USER,
        {"role": "assistant", "content": 'Well.\n{"name": "get", "arguments": {"a": 1}}'},
        {"role": "user", "content": "Result of the function call 1: 12"},
    ]
    first, *rest = told_in_text([{"role": "system", "content": "Be brief."}, USER], tools)
    assert first["content"].startswith("Be brief.\n\nYou can call")
    assert rest == [USER]
    assert told_in_text([USER], checked_tools([TOOL], "none")) == [USER]
