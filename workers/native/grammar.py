"""Child side: grammars in llama.cpp's GBNF.

Facts are those of llama.cpp 0c1e57098, src/llama-grammar.cpp.
"""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API

from crumplezone.workers.native.model import NativeLogs

_ROOT = "crumplezone-root"


class GrammarError(Exception):
    """A grammar that llama.cpp does not accept. Whoever adds its NULL to a chain crashes."""


def make_grammar(vocab: Any, logs: NativeLogs, grammar: str, root: str = "root") -> Any:
    """A sampler that lets only tokens pass that go on with a grammar.

    It aborts if it is to accept a token that it does not let pass.

    Args:
        vocab: ``const llama_vocab *``.
        logs: Where llama.cpp says what is wrong with it.
        grammar: GBNF.
        root: The rule that the whole text is.

    Raises:
        GrammarError: llama.cpp cannot parse it; the message is its own.
    """
    logs.last_error = ""
    made = C.llama_sampler_init_grammar(vocab, grammar.encode(), root.encode())
    if not made:
        raise GrammarError(logs.last_error or "llama.cpp cannot parse it")
    return made


def begun(grammar: str, text: str) -> tuple[str, str]:
    """A grammar, and its root, for what begins with a text and goes on as ``root`` of another grammar."""
    literal = "".join(f"\\U{ord(character):08X}" for character in text)
    return f'{grammar}\n{_ROOT} ::= "{literal}" root\n', _ROOT
