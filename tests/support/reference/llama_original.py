"""Calls that `Llama` and ``llama_cpp.Llama`` must answer alike; run as a program, the original's answers."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
FOX: dict[str, Any] = {"prompt": "The quick brown fox", **GREEDY}
SEA: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me about the sea, in one sentence."}],
    **GREEDY,
}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TOOL = {"type": "function", "function": {"name": "person", "parameters": PERSON}}
CHOICE = {"type": "function", "function": {"name": "person"}}

# By name: the constructor's extra options, the method, its arguments.
CALLS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "completion": ({}, "create_completion", FOX),
    "call": ({}, "__call__", FOX),
    "sampled": ({}, "create_completion", FOX | {"temperature": 1.0, "seed": 7}),
    "mirostat": ({}, "create_completion", FOX | {"temperature": 1.0, "seed": 7, "mirostat_mode": 2}),
    "penalties": ({}, "create_completion", FOX | {"repeat_penalty": 1.3, "frequency_penalty": 0.5}),
    "stop": ({}, "create_completion", FOX | {"stop": ["bear", "dog"]}),
    "bias": ({}, "create_completion", FOX | {"logit_bias": {260: 5.0}}),
    "echo": ({}, "create_completion", FOX | {"echo": True}),
    "stream": ({}, "create_completion", FOX | {"stream": True}),
    "chat": ({}, "create_chat_completion", SEA),
    "chat stream": ({}, "create_chat_completion", SEA | {"stream": True}),
    "json": ({}, "create_chat_completion", SEA | {"response_format": {"type": "json_object"}}),
    "schema": (
        {},
        "create_chat_completion",
        SEA | {"response_format": {"type": "json_object", "schema": PERSON}},
    ),
    "tool": ({}, "create_chat_completion", SEA | {"tools": [TOOL], "tool_choice": CHOICE}),
    "tool stream": (
        {},
        "create_chat_completion",
        SEA | {"tools": [TOOL], "tool_choice": CHOICE, "stream": True},
    ),
    "chat format": ({"chat_format": "chatml-function-calling"}, "create_chat_completion", SEA),
    "generate": ({}, "generate", {"tokens": [504, 3575, 282, 4649, 314], "temp": 0.0}),
    "tokenize": ({}, "tokenize", {"text": "The sea \u2603 <|im_end|>".encode(), "special": True}),
    "detokenize": ({}, "detokenize", {"tokens": [504, 3575, 282, 4649]}),
    "logprobs": ({"logits_all": True}, "create_completion", FOX | {"logprobs": 2, "max_tokens": 4}),
    "logprobs stream": (
        {"logits_all": True},
        "create_completion",
        FOX | {"logprobs": 2, "max_tokens": 4, "stream": True},
    ),
    "embedding": (
        {"embedding": True, "pooling_type": 1},
        "create_embedding",
        {"input": ["one", "two three"]},
    ),
    "embed": ({"embedding": True, "pooling_type": 1}, "embed", {"input": "one", "normalize": True}),
}


def answer(llama: Any, method: str, arguments: dict[str, Any]) -> Any:
    """Of a `Llama` that has evaluated nothing, without what differs between any two calls."""
    llama.reset()
    value = getattr(llama, method)(**arguments)
    if isinstance(value, Iterator):
        value = list(islice(value, 30))
    if isinstance(value, bytes):
        value = value.decode()
    return without_ids(json.loads(json.dumps(value, default=float)))


def without_ids(value: Any) -> Any:
    """Leave out ids, also those of tool calls, which are made of them, and times."""
    if isinstance(value, list):
        return [without_ids(each) for each in value]
    if isinstance(value, dict):
        return {key: without_ids(each) for key, each in value.items() if key not in {"id", "created"}}
    return value


def signatures(cls: type) -> dict[str, Any]:
    """Public methods and properties: of a method every parameter's name, kind and default."""
    found: dict[str, Any] = {}
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        special = name in {"__init__", "__call__", "__getstate__", "__setstate__"}
        if name.startswith("_") and not special:
            continue
        if isinstance(member, property):
            found[name] = "property"
        else:
            parameters = inspect.signature(getattr(cls, name)).parameters.values()
            found[name] = [[p.name, p.kind.name, repr(p.default)] for p in parameters]
    return found


def main(model: str) -> Any:
    """The original's answers to all calls."""
    import llama_cpp

    made: dict[str, Any] = {}
    answers = {}
    for name, (extra, method, arguments) in CALLS.items():
        key = repr(extra)
        if key not in made:
            made[key] = llama_cpp.Llama(model, **OPTIONS, **extra)
        answers[name] = answer(made[key], method, arguments)
    return answers


def table(model: str) -> Any:
    """Its signatures; of an instance the attributes' types and the pickled state's values."""
    import llama_cpp

    llama: Any = llama_cpp.Llama(model, **OPTIONS)
    public = {name: value for name, value in vars(llama).items() if not name.startswith("_")}
    return {
        "signatures": signatures(llama_cpp.Llama),
        "attributes": {name: type(value).__name__ for name, value in public.items()},
        "state": {name: repr(value) for name, value in llama.__getstate__().items()},
    }


if __name__ == "__main__":
    *what, path = sys.argv[1:]
    print(json.dumps(table(path) if what == ["--table"] else main(path)))
