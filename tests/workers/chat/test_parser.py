"""Reasoning and tool calls in texts: found, whatever the text and however it is cut."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone.workers.chat.answers.deltas import Answer, ChatDelta
from crumplezone.workers.chat.answers.parser import ChatParser, Shape
from crumplezone.workers.chat.families import GENERIC, HERMES, LLAMA_3, MISTRAL, Family, family_of
from tests.support.reference.chat_templates import TEMPLATES

Calls = list[tuple[str, str]]

FAMILIES = {family.name: family for family in (HERMES, LLAMA_3, MISTRAL, GENERIC)}
TOOLS = ("get", "set")
A = '{"a": "}\\"]", "b": [1, {}]}'


def parse(pieces: Iterable[str], shape: Shape) -> dict[str, Any]:
    parser, answer = ChatParser(shape), Answer()
    for piece in pieces:
        for delta in parser.feed(piece):
            answer.add(delta)
    for delta in parser.feed("", final=True):
        answer.add(delta)
    return answer.message()


def found(message: dict[str, Any]) -> tuple[str | None, Calls]:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], [(call["name"], call["arguments"]) for call in calls]


EXAMPLES: list[tuple[str, str, str | None, Calls]] = [
    ("hermes", f'<tool_call>\n{{"name": "get", "arguments": {A}}}\n</tool_call>', None, [("get", A)]),
    ("hermes", f'Well.\n<tool_call>{{"arguments": {A}, "name": "get"}}</tool_call>\n', "Well.", [("get", A)]),
    (
        "hermes",
        '<tool_call>{"name": "x", "arguments": {}}</tool_call>\n<tool_call>{"name": "set"}</tool_call> so',
        "so",
        [("x", "{}"), ("set", "{}")],
    ),
    ("hermes", '{"name": "get", "arguments": {"a": 1}}', None, [("get", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1', None, [("get", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "get", "argu', '<tool_call>{"name": "get", "argu', []),
    ("hermes", "<tool_call>none</tool_call> ", "<tool_call>none</tool_call> ", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("llama-3", f'{{"name": "get", "parameters": {A}}}', None, [("get", A)]),
    ("llama-3", f'<|python_tag|>{{"type": "function", "name": "x", "parameters": {A}}}', None, [("x", A)]),
    ("llama-3", '{"name": "get"}; {"name": "set", "parameters": null}', None, [("get", "{}"), ("set", "{}")]),
    ("llama-3", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ("llama-3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama-3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", f'[TOOL_CALLS][{{"name": "get", "arguments": {A}}}]', None, [("get", A)]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "x", "arguments": {A}, "id": "1"}}]', None, [("x", A)]),
    (
        "mistral",
        f'[{{"name": "get", "arguments": {A}}}, {{"name": "set"}}]',
        None,
        [("get", A), ("set", "{}")],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]get[ARGS]{A}[TOOL_CALLS]x[CALL_ID]ab[ARGS]{{}}",
        None,
        [("get", A), ("x", "{}")],
    ),
    ("mistral", f"get{A}", None, [("get", A)]),
    ("mistral", "get well", "get well", []),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("json", '{"name": "get", "arguments": "{\\"a\\": 1}"}', None, [("get", '{"a": 1}')]),
    ("json", '{"function": "get", "arguments": {}}', None, [("get", "{}")]),
    ("json", '[{"name": "get", "arguments": {}}, 5] tail', ", 5] tail", [("get", "{}")]),
    ("json", "", "", []),
    ("json", " plain \n", " plain \n", []),
]


@pytest.mark.parametrize(("family", "text", "content", "calls"), EXAMPLES)
def test_what_is_found(family: str, text: str, content: str | None, calls: Calls) -> None:
    shape = Shape(FAMILIES[family], TOOLS, key="k")
    for thought in ("", "<think>\nhm {\n</think>\n\n"):
        message = parse([thought + text], shape)
        assert found(message) == (content and (content.lstrip() if thought else content), calls)
        assert message.get("reasoning_content") == ("hm {" if thought else None)
        assert parse(thought + text, shape) == message  # a character at a time
    assert parse([text], Shape(FAMILIES[family]))["content"] == text  # no tools: nothing is a call


@pytest.mark.parametrize(
    ("thinking", "text", "thought", "content"),
    [
        (False, "<think>a b</think> c ", "a b", "c "),
        (False, " \n<think>\n\n</think>\n\nc", None, "c"),
        (False, "c <think>no</think>", None, "c <think>no</think>"),
        (False, "<think>cut off", "cut off", ""),
        (True, "a\n</think>\n\nc", "a", "c"),
        (True, "\n<think>a</think>c", "a", "c"),
        (True, "a < b </thin", "a < b </thin", ""),
    ],
)
def test_what_is_thought(thinking: bool, text: str, thought: str | None, content: str) -> None:
    message = parse([text], Shape(thinking=thinking))
    assert (message.get("reasoning_content"), message["content"]) == (thought, content)


def test_deltas_come_as_soon_as_they_are_certain() -> None:
    parser = ChatParser(Shape(HERMES, TOOLS, key="k"))
    told: list[ChatDelta] = []
    for piece in ("Hi", ".\n", "<", "b> <tool", '_call>{"name": "get", "argu', 'ments": {"a"', ": 1", "}}"):
        told += parser.feed(piece)
        told.append(ChatDelta())
    shown = ["|" if delta == ChatDelta() else delta.content or delta.tool_call for delta in told]
    assert shown[:3] == ["Hi", "|", "."]
    calls = [delta.tool_call for delta in told if delta.tool_call]
    assert (calls[0].index, calls[0].name, len(calls[0].id)) == (0, "get", 29)
    assert [call.arguments for call in calls] == ["", '{"a"', ": 1", "}"]
    assert "".join(delta.content for delta in told) == "Hi.\n<b>"


def test_ids_are_those_of_the_key() -> None:
    text = '[{"name": "get"}, {"name": "get"}]'
    ids = [call["id"] for call in parse([text], Shape(MISTRAL, TOOLS, key="k"))["tool_calls"]]
    assert [len(each) for each in ids] == [9, 9]
    assert all(each.isalnum() for each in ids)
    assert ids[0] != ids[1]
    assert ids == [call["id"] for call in parse(text, Shape(MISTRAL, TOOLS, key="k"))["tool_calls"]]
    assert ids[0] != parse(text, Shape(MISTRAL, TOOLS, key="other"))["tool_calls"][0]["id"]


def test_families_are_told_from_templates() -> None:
    found = {name: family_of(template).name for name, template in TEMPLATES.items()}
    assert found == {"chatml": "json", "llama-3": "llama-3", "mistral": "mistral", "qwen": "hermes"}


WORDS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"),
        *(
            '{"name": "get"',
            '"name": "x"',
            '"arguments": ',
            '"parameters": {"a": 1}',
            '{"name": "get", "arguments": {',
        ),
        *(
            "get",
            "[CALL_ID]",
            '"',
            "\\",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            ";",
            " ",
            "\n",
            "x",
            "<",
            "1",
            "\u00fc",
        ),
    ]
)
TEXT = st.lists(WORDS, max_size=30).map("".join)
FAMILY = st.sampled_from(list(FAMILIES.values()))


@given(
    text=TEXT, family=FAMILY, thinking=st.booleans(), tools=st.booleans(), cuts=st.lists(st.integers(0, 99))
)
def test_cuts_change_nothing(text: str, family: Family, thinking: bool, tools: bool, cuts: list[int]) -> None:
    shape = Shape(family, TOOLS if tools else (), thinking, "k")
    whole = parse([text], shape)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert parse([text[a:b] for a, b in itertools.pairwise(bounds)], shape) == whole
    assert parse(text, shape) == whole


@given(text=TEXT, family=FAMILY)
def test_without_tools_and_thoughts_all_is_content(text: str, family: Family) -> None:
    if not text.lstrip().startswith("<think>"):
        assert parse(text, Shape(family)) == {"role": "assistant", "content": text}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(arguments=st.dictionaries(st.text(), JSON, max_size=4), family=FAMILY, ascii_only=st.booleans())
def test_a_call_as_the_grammar_has_it_is_found(
    arguments: dict[str, Any], family: Family, ascii_only: bool
) -> None:
    body = json.dumps(arguments, ensure_ascii=ascii_only)
    text = f'{family.before}{{"name": "get", "{family.key}": {body}}}{family.after}'
    content, calls = found(parse(text, Shape(family, TOOLS)))
    assert (content, calls) == (None, [("get", body)])


NASTY = {
    "spaces": " " * 100_000,
    "begun marks": "<tool_call" * 10_000,
    "marks": "<tool_call>" * 10_000,
    "brackets": "<tool_call>{" + '"name": "get", "arguments": ' + "[" * 100_000,
    "backslashes": '{"name": "get", "arguments": {"a": "' + "\\" * 100_000,
    "members": '{"name": "get"' + ', "x": [1]' * 10_000,
    "name": '{"name": "' + "x" * 100_000,
    "thoughts": "<think>" + " </think" * 12_000,
    "calls": '<tool_call>{"name": "get"}</tool_call>' * 3_000,
    "other key first": '{"arguments": {' + '"a": 1, ' * 12_000,
}


@pytest.mark.parametrize("kind", NASTY)
@pytest.mark.parametrize("family", [HERMES, MISTRAL, GENERIC], ids=lambda family: family.name)
def test_time_is_linear(kind: str, family: Family) -> None:
    """A hundred thousand characters, three at a time; what is quadratic takes minutes."""
    text = NASTY[kind]
    begin = time.process_time()
    parse((text[at : at + 3] for at in range(0, len(text), 3)), Shape(family, TOOLS))
    assert time.process_time() - begin < 20
