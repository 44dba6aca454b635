"""Child side: grammars for llama.cpp, of its own notation and of JSON schemas. Only cells import this module.

Facts are those of llama-cpp-python 0.3.36, llama_cpp/llama_grammar.py, and of llama.cpp 0c1e57098.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import llama_cpp.llama_grammar

from crumplezone.workers.native.model import NativeLogs
from crumplezone.workers.native.text.memory import MEMORY, little_memory

original: Any = llama_cpp.llama_grammar  # its own types are incomplete
# Its own allows raw control characters, which JSON does not (RFC 8259, section 7).
_CHAR = original.BuiltinRule(
    r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F])'
)

_COMPLAINT_MAX = 512  # bytes


class UnusableError(Exception):
    """A grammar or a schema that cannot be used."""


class _Converter(original.SchemaConverter):  # type: ignore[misc]
    """The original, with what it does wrong put right."""

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        self._names: dict[str, str] = {}

    def _format_literal(self, literal: str) -> str:
        # The original leaves backslashes as they are, and the next letter would be taken for an escape.
        return str(super()._format_literal(literal.replace("\\", "\\\\")))

    def _add_primitive(self, name: str, rule: Any) -> str:
        return str(super()._add_primitive(name, _CHAR if name == "char" else rule))

    def resolve_refs(self, schema: dict[str, Any], url: str) -> dict[str, Any]:
        """Find what each ``$ref`` means. The original overlooks those beside another."""
        left: list[Any] = [schema]
        while left:
            part = left.pop()
            if isinstance(part, list):
                left += part
            elif isinstance(part, dict):
                left += part.values()
                if isinstance(ref := part.get("$ref"), str):
                    part["$ref"] = url + ref
                    self._refs[url + ref] = _referred(schema, ref)
        return schema

    def _resolve_ref(self, ref: str) -> str:
        # The original names the rule by the last part alone, which two definitions may have in common.
        if ref not in self._names:
            name = self._names[ref] = f"ref-{len(self._names)}"
            made = self.visit(self._refs[ref], name)
            if made != name:
                self._rules[name] = made
        return self._names[ref]

    def add(self, name: str, schema: dict[str, Any]) -> None:
        """A rule of this name for a schema."""
        self.resolve_refs(schema, name)
        made = self.visit(schema, name)
        if made != name:
            self._rules[name] = made


def _referred(schema: dict[str, Any], ref: str) -> Any:
    """The part of a schema that a JSON pointer means (RFC 6901)."""
    if not ref.startswith("#"):
        raise UnusableError(
            f"$ref is {ref!r}: nothing is fetched, only parts of the schema ('#/...') are known"
        )
    found: Any = schema
    for name in filter(None, unquote(ref[1:]).split("/")):
        key = name.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UnusableError(f"$ref is {ref!r}: there is no such part of the schema") from error
    return found


def grammar(rules: str, schemas: dict[str, Any]) -> str:
    """A grammar in llama.cpp's notation (GBNF).

    Args:
        rules: What there is of it, in this notation.
        schemas: Of each other rule, the JSON schema.

    Raises:
        UnusableError: A schema is none, or has what cannot be converted.
    """
    if not schemas:
        return rules
    converter = _Converter()
    try:
        with little_memory():
            for name, schema in schemas.items():
                converter.add(name, schema if isinstance(schema, dict) else {})
    except UnusableError:
        raise
    except RecursionError as error:
        raise UnusableError("it is nested too deeply, or refers to itself only") from error
    except MemoryError as error:
        raise UnusableError(f"it takes more than {MEMORY} bytes of memory") from error
    except Exception as error:  # the original has asserts and lookups, and no checks
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    return f"{rules}\n{converter.format_grammar()}\n"


def check(vocab: Any, logs: NativeLogs, text: str) -> None:
    """Have llama.cpp read a grammar, and apply it once to all tokens: what is too much for it, is so here.

    Raises:
        UnusableError: It cannot read it.
    """
    if not text.strip() or "\0" in text:
        raise UnusableError("it is empty, or has a NUL character")
    logs.last_error = ""
    with _complaints() as complained:
        sampler = C.llama_sampler_init_grammar(vocab, text.encode("utf-8", "replace"), b"root")
    if not sampler:
        why = " ".join([*complained, logs.last_error]).strip() or "it does not say why"
        raise UnusableError(f"llama.cpp cannot read it ({why})")
    try:
        n_vocab = C.llama_vocab_n_tokens(vocab)
        candidates = (C.llama_token_data * n_vocab)()
        for token, candidate in enumerate(candidates):
            candidate.id = token
        array = C.llama_token_data_array(candidates, n_vocab, -1, False)
        C.llama_sampler_apply(sampler, array)
    finally:
        C.llama_sampler_free(sampler)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What is written to stderr: llama.cpp says there what is no grammar, and logs the rest."""
    lines, before = list[str](), os.dup(2)
    with os.fdopen(os.memfd_create("complaints"), "w+b", 0) as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read(_COMPLAINT_MAX).decode("utf-8", "replace").split()
