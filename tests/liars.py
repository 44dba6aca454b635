"""A llama.cpp cell that answers in the right form, but with things that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from crumplezone.workers.native import LlamaCell
from crumplezone.workers.protocol import Generate, Generated, Progress, Request, Tokenize, Tokenized

TARGET = "tests.liars:Liar"
VARIABLE = "CRUMPLEZONE_TEST_LIE"  # names a file that names the lie


class Liar(LlamaCell):
    """With room for one sequence only it is honest, unless the lie is told ``everywhere``."""

    def handle(self, request: Request) -> msgspec.Struct:
        told = super().handle(request)
        lie, _, where = Path(os.environ[VARIABLE]).read_text().partition(" ")
        if not lie or (self.config.n_seq_max == 1 and where != "everywhere"):
            return told
        if isinstance(request, Tokenize) and lie == "tokens":
            return Tokenized(request.n_bytes + 17)
        if isinstance(request, Generate) and isinstance(told, Generated) and lie != "tokens":
            return Generated(0, getattr(self, lie)(told.progress))
        return told

    def stranger(self, _: list[Progress]) -> list[Progress]:
        return [Progress(77, [5], b"")]

    def nobody(self, _: list[Progress]) -> list[Progress]:
        return []

    def nothing(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, [], b"") for each in told]

    def twice(self, told: list[Progress]) -> list[Progress]:
        return told + told

    def too_much(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, [5] * 100, b"", "length") for each in told]

    def no_end(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, each.tokens, each.text) for each in told]

    def no_token(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, [128], b"") for each in told]
