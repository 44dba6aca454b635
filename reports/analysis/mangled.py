"""The name in a mangled C++ symbol, without its parameters and the arguments of templates.

Symbols come from an untrusted process. Demanglers unfold what a symbol refers back to, which can grow without
bound, or crash; a name needs nothing of that. So this reads a symbol once, from left to right, unfolds
nothing, and gives up on what is rare. Grammar: Itanium C++ ABI, 5.1.
"""

from __future__ import annotations

import re

_SYMBOL_MAX = 4096  # characters
_DEPTH_MAX = 64  # brackets in brackets
_LOCALS_MAX = 8  # functions in functions

_OPERATORS = {
    "nw": "new", "na": "new[]", "dl": "delete", "da": "delete[]", "aw": "co_await", "ps": "+", "ng": "-",
    "ad": "&", "de": "*", "co": "~", "pl": "+", "mi": "-", "ml": "*", "dv": "/", "rm": "%", "an": "&",
    "or": "|", "eo": "^", "aS": "=", "pL": "+=", "mI": "-=", "mL": "*=", "dV": "/=", "rM": "%=", "aN": "&=",
    "oR": "|=", "eO": "^=", "ls": "<<", "rs": ">>", "lS": "<<=", "rS": ">>=", "eq": "==", "ne": "!=",
    "lt": "<", "gt": ">", "le": "<=", "ge": ">=", "ss": "<=>", "nt": "!", "aa": "&&", "oo": "||", "pp": "++",
    "mm": "--", "cm": ",", "pm": "->*", "pt": "->", "cl": "()", "ix": "[]",
}  # fmt: skip
_BUILTIN = {
    "v": "void", "b": "bool", "c": "char", "a": "signed char", "h": "unsigned char", "s": "short",
    "t": "unsigned short", "i": "int", "j": "unsigned int", "l": "long", "m": "unsigned long",
    "x": "long long", "y": "unsigned long long", "f": "float", "d": "double",
}  # fmt: skip
_STANDARD = {
    "St": "std", "Sa": "std::allocator", "Sb": "std::basic_string", "Ss": "std::string", "Si": "std::istream",
    "So": "std::ostream", "Sd": "std::iostream",
}  # fmt: skip

_LENGTH = re.compile(r"[1-9]\d{0,3}")
_DISCRIMINATOR = re.compile(r"_\d|__\d+_")
# Within brackets, what is to be stepped over whole, since a letter or digit in it would mean something else.
_WHOLE = re.compile(
    r"S[0-9A-Z]*_|S[a-z]|T[0-9A-Z]*_|T[sue](?=\d)|A\d*_|D[0-5]|C[1-5]|Ut\d*_|_\d|__\d+_"
    r"|Dv\d+_|D[BU]\d+_|D[pnaiuschdefC]|L(?:[PKRO]*[a-z]|D[niusa])n?[0-9a-f.]*E|L_Z"
)
_OPENERS = re.compile(r"Ul|LN|D[tTOw]|[NIJFZ]")
_VALUE = re.compile(r"n?\d+")


class _UnknownError(Exception):
    """Of a form that is not read here."""


def plain_name(symbol: str) -> str:
    """The name of a function: "llama_context::encode" of "_ZN13llama_context6encodeERK15llama_batch_ext".

    Returns:
        With "<T>" for the arguments of a template; empty if the symbol is not mangled so, or not understood.
    """
    if not symbol.startswith("_Z") or len(symbol) > _SYMBOL_MAX:
        return ""
    try:
        return _Reader(symbol).encoding()
    except (_UnknownError, IndexError):
        return ""


class _Reader:
    """A symbol, and how far it has been read."""

    def __init__(self, symbol: str) -> None:
        self._text, self._at, self._locals = symbol, 2, 0

    def encoding(self) -> str:
        """The name of a function, without what its parameters are."""
        if self._next("Th", "Tv"):  # thunks, which adjust `this` by a number, or by one behind a pointer
            self._find(re.compile(r"n?\d+_(?:n?\d+_)?"))
        return self._name()

    def _name(self) -> str:
        if self._next("N"):
            return self._nested()
        if self._next("Z"):
            return self._local()
        name = self._part("")
        if name == "std":
            name += f"::{self._part('')}"
        return name + self._arguments()

    def _nested(self) -> str:
        self._find(re.compile(r"[rVK]*[RO]?"))
        parts: list[str] = []
        while not self._next("E"):
            if self._peek() == "I":
                if not parts:
                    raise _UnknownError
                parts[-1] += self._arguments()
            else:
                parts.append(self._part(parts[-1] if parts else ""))
        if not parts:
            raise _UnknownError
        return "::".join(parts)

    def _local(self) -> str:
        """What is within a function: its name, then what its own parameters are, then the name within."""
        self._locals += 1
        if self._locals > _LOCALS_MAX:
            raise _UnknownError
        outer = self.encoding()
        self._skip()
        if self._next("s"):
            raise _UnknownError  # a string
        if self._next("d"):
            self._find(re.compile(r"\d*_"))
        inner = self._name()
        self._find(re.compile(f"(?:{_DISCRIMINATOR.pattern})?"))
        return f"{outer}::{inner}"

    def _part(self, before: str) -> str:
        """One name between two "::"."""
        self._next("L")  # of this file alone
        letter = self._peek()
        if letter.isdigit():
            return self._tagged(self._source())
        if letter == "S":
            found = self._text[self._at : self._at + 2]
            if before or found not in _STANDARD:
                raise _UnknownError
            self._at += 2
            return _STANDARD[found]
        if letter in "CD" and before:
            return self._tagged(self._structor(before))
        if letter == "U":
            return self._unnamed()
        return self._tagged(self._operator())

    def _structor(self, before: str) -> str:
        found = self._find(re.compile(r"C[1-5]|D[0-5]"))
        name = before.partition("<")[0]
        return name if found[0] == "C" else f"~{name}"

    def _unnamed(self) -> str:
        if self._next("Ut"):
            self._find(re.compile(r"\d*_"))
            return "{unnamed type}"
        if not self._next("Ul"):
            raise _UnknownError
        self._skip()
        self._find(re.compile(r"\d*_"))
        return "{lambda}"

    def _operator(self) -> str:
        found = self._text[self._at : self._at + 2]
        if found in _OPERATORS:
            self._at += 2
            named = _OPERATORS[found]
            return f"operator{' ' if named[0].isalpha() else ''}{named}"
        if found == "cv":
            kind = self._text[self._at + 2]
            if kind in _BUILTIN:
                self._at += 3
                return f"operator {_BUILTIN[kind]}"
        raise _UnknownError

    def _source(self) -> str:
        size = int(self._find(_LENGTH))
        if size > len(self._text) - self._at:
            raise _UnknownError
        name = self._text[self._at : self._at + size]
        self._at += size
        return "{anonymous}" if name == "_GLOBAL__N_1" else name

    def _tagged(self, name: str) -> str:
        while self._next("B"):  # [abi:cxx11]
            self._source()
        return name

    def _arguments(self) -> str:
        if not self._next("I"):
            return ""
        self._skip()
        return "<T>"

    def _skip(self) -> None:
        """Go behind the "E" of a bracket that was opened."""
        opened = ["I"]
        while opened:
            if self._peek().isdigit():
                self._source()
            elif self._next("E"):
                self._closed(opened)
            elif whole := _WHOLE.match(self._text, self._at):
                self._at = whole.end()
                if whole[0] == "L_Z":
                    opened.append("L")
            elif opener := _OPENERS.match(self._text, self._at):
                self._at = opener.end()
                opened += ["value", "N"] if opener[0] == "LN" else [opener[0]]
            elif self._next("L"):  # a value of a type that has a name
                self._source()
                self._find(_VALUE)
                opened.append("value")
            elif self._peek() == "X" or len(opened) > _DEPTH_MAX:  # an expression
                raise _UnknownError
            else:
                self._at += 1

    def _closed(self, opened: list[str]) -> None:
        """What stands behind a bracket and belongs to it."""
        closed = opened.pop()
        if closed == "Ul":
            self._find(re.compile(r"\d*_"))
        elif closed == "N" and opened and opened[-1] == "value":
            self._find(_VALUE)

    def _peek(self) -> str:
        return self._text[self._at]

    def _next(self, *wanted: str) -> bool:
        """Step over one of these, if it is next."""
        for each in wanted:
            if self._text.startswith(each, self._at):
                self._at += len(each)
                return True
        return False

    def _find(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _UnknownError
        self._at = found.end()
        return found[0]
