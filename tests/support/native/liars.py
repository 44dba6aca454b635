"""A llama.cpp cell, and a zygote, that answer in the right form, but with things that cannot be."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec

from crumplezone.sandbox.child.fork_server import Fork, Forked, ForkServer
from crumplezone.workers.native.decode_cell import DecodeCell
from crumplezone.workers.protocol.generate.messages import Generated, Logprob, Progress
from crumplezone.workers.protocol.messages import Remembered, Request, Saved, Span, Tokenize, Tokenized

TARGET = "tests.support.native.liars:Liar"
VARIABLE = "CRUMPLEZONE_TEST_LIE"  # names a file that names the lie


class Liar(DecodeCell):
    """Lies once, unless the lie is told ``always``."""

    def handle(self, request: Request) -> msgspec.Struct:
        told = super().handle(request)
        file = Path(os.environ[VARIABLE])
        lie, _, how_often = file.read_text().partition(" ")
        if isinstance(request, Tokenize) and lie == "tokens":
            told = Tokenized(request.n_bytes + 17)
        elif isinstance(told, Generated) and lie not in ("", "tokens"):
            truth, told = told, msgspec.structs.replace(told, progress=getattr(self, lie)(told.progress))
            if told == truth:
                return told
        else:
            return told
        if how_often != "always":
            file.write_text("")
        return told

    def stranger(self, _: list[Progress]) -> list[Progress]:
        return [Progress(77, [5], b"")]

    def nobody(self, _: list[Progress]) -> list[Progress]:
        return []

    def nothing(self, told: list[Progress]) -> list[Progress]:
        return [msgspec.structs.replace(each, tokens=[], text=b"", finished="") for each in told]

    def twice(self, told: list[Progress]) -> list[Progress]:
        return told + told

    def too_much(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, [5] * 100, b"", "length") for each in told]

    def no_end(self, told: list[Progress]) -> list[Progress]:
        return [msgspec.structs.replace(each, finished="") for each in told]

    def more_read(self, told: list[Progress]) -> list[Progress]:
        return [msgspec.structs.replace(each, read=each.read + 1000) for each in told]

    def unasked(self, told: list[Progress]) -> list[Progress]:
        return [msgspec.structs.replace(each, logprobs=[Logprob(-1.0)] * len(each.tokens)) for each in told]

    def no_token(self, told: list[Progress]) -> list[Progress]:
        return [Progress(each.seq_id, [128], b"") for each in told]


class Boaster(DecodeCell):
    """Tells of more than there is. The file has the kind of the reply, and how often it is to be told."""

    def handle(self, request: Request) -> msgspec.Struct:
        told = super().handle(request)
        file = Path(os.environ[VARIABLE])
        kind, _, left = file.read_text().partition(" ")
        if type(told).__name__ != kind or not int(left):
            return told
        file.write_text(f"{kind} {int(left) - 1}")
        match told:
            case Saved():
                return Saved(2**33)
            case Remembered():
                return Remembered(told.done, [Span(1, 0, 2**31 - 1)])
            case Generated():
                return Generated(0, [Progress(p.seq_id, p.tokens, b"x" * 60_000) for p in told.progress])
        return told


class Changeling(ForkServer):
    """A zygote that once names another process than the one it forked, or dies before it names any."""

    def _fork(self, request: Fork) -> Forked:
        forked = super()._fork(request)
        file = Path(os.environ[VARIABLE])
        lie = file.read_text()
        file.write_text("")
        if not lie:
            return forked
        file.with_suffix(".forked").write_text(str(forked.pid))
        if lie == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return Forked(int(lie))
