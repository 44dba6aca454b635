"""An embedding cell that dies for real, or lies, when a native call holds its poison."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.embed_cell import EmbedCell
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.embed import TokenizeTexts, text_shapes

TARGET = "tests.support.native.embed_poison:PoisonCell"
VARIABLE = "CRUMPLEZONE_TEST_EMBED_POISON"


class Poison(msgspec.Struct, frozen=True):
    """When to die, and how. Cells read it from the environment variable `VARIABLE`."""

    how: str  # segv, hang, nan, slot, compute; in the tokenizer: tokenizer, too_many, no_token
    token: int = -1  # only if this token is in the call; -1: always
    min_texts: int = 1  # only with so many texts in the call
    once: str = ""  # a file that the first time makes; there is no second one


class PoisonCell(EmbedCell):
    """An `EmbedCell` with a `Poison`."""

    def _bites(self, where: tuple[str, ...], tokens: npt.NDArray[np.int32], n_texts: int) -> str:
        poison = msgspec.json.decode(os.environ[VARIABLE], type=Poison)
        if poison.how not in where or n_texts < poison.min_texts:
            return ""
        if poison.token >= 0 and poison.token not in tokens:
            return ""
        if poison.once:
            try:
                Path(poison.once).touch(exist_ok=False)
            except FileExistsError:
                return ""
        return poison.how

    def run(self, arrays: BatchArrays) -> int:
        n_texts = len(np.unique(arrays.seq_ids))
        match self._bites(("segv", "hang", "nan", "slot", "compute"), arrays.tokens, n_texts):
            case "segv":
                ctypes.memset(0x18, 1, 1)
            case "hang":
                signal.pause()
            case "slot":
                return 1
            case "compute":
                return -3
            case "nan":
                rc = super().run(arrays)
                C.llama_get_embeddings_seq(self.context, n_texts - 1)[0] = float("nan")
                return rc
        return super().run(arrays)

    def _tokenize(self, request: TokenizeTexts) -> None:
        super()._tokenize(request)
        _, counts, _, tokens = self._arena.arrays(text_shapes(request.n_texts, request.n_bytes))
        found = tokens[: counts.sum()]
        match self._bites(("tokenizer", "too_many", "no_token"), found, request.n_texts):
            case "tokenizer":
                ctypes.memset(0x18, 1, 1)
            case "too_many":
                counts[0] = 2**30
            case "no_token":
                found[0] = self.info().n_vocab
