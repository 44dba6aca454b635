"""What is asked of an embedding cell. Texts, tokens and vectors travel through the arena."""

from __future__ import annotations

from typing import Literal

import msgspec

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.arrays import batch_shapes
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.messages import Warm

TOKENS_OVER = 16  # most tokens of a text beyond one for each byte: the special ones


class EmbedConfig(CellConfig, frozen=True):
    """The same, and how the vectors of a text's tokens become one: ``enum llama_pooling_type``."""

    pooling: Literal["", "mean", "cls", "last"] = ""  # "": the model's own; "mean" if it has none


class EmbedInfo(CellInfo, frozen=True, kw_only=True):
    """Facts of the model, and of the context that there is now."""

    pooling: Literal["mean", "cls", "last", "rank"]
    cached: bool  # whether it keeps keys and values, or states; models that are encoders only do not


class TokenizeTexts(msgspec.Struct, tag="tokenize_texts", frozen=True):
    """Tokenise the texts in the arena (`text_shapes`)."""

    n_texts: int
    n_bytes: int  # of all of them together


class TextsTokenized(msgspec.Struct, frozen=True):
    """Done: see `text_shapes`."""


class Embed(msgspec.Struct, tag="embed", frozen=True):
    """One native call over the whole texts in the arena, text ``i`` as sequence ``i`` (`vector_shapes`)."""

    n_tokens: int
    n_texts: int


class Embedded(msgspec.Struct, frozen=True):
    """Return code of the native call."""

    rc: int


class Reshape(msgspec.Struct, tag="reshape", frozen=True):
    """Make another context over the same model; answered with an `EmbedInfo`."""

    config: EmbedConfig


EmbedRequest = TokenizeTexts | Embed | Reshape | Warm


def text_shapes(n_texts: int, n_bytes: int) -> list[Shape]:
    """Bytes of each text, tokens of each text (the reply), the texts in UTF-8, their tokens (the reply)."""
    return [("i4", n_texts), ("i4", n_texts), ("u1", n_bytes), ("i4", n_bytes + TOKENS_OVER * n_texts)]


def vector_shapes(n_tokens: int, n_texts: int, n_embd: int) -> list[Shape]:
    """A batch (`batch_shapes`), then the vectors (the reply), float32, one of each text."""
    return [*batch_shapes(n_tokens), ("f4", n_texts * n_embd)]
