"""What is asked of a text cell, which has a vocabulary. Texts and tokens travel through the arena."""

from __future__ import annotations

from typing import Annotated

import msgspec

from crumplezone.sandbox.ipc.arena import Shape
from crumplezone.workers.protocol.config import Size
from crumplezone.workers.protocol.messages import Warm

OVER = 16  # tokens of a text beyond one for each byte: the special ones

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**32)]
Id = Annotated[int, msgspec.Meta(ge=-1, le=2**24)]
Word = Annotated[str, msgspec.Meta(max_length=1024)]


class TextInfo(msgspec.Struct, frozen=True):
    """What a text cell says of its model."""

    n_vocab: Size


class SpecialTokens(msgspec.Struct, frozen=True):
    """Ids of the tokens that a model has for a purpose; -1 where it has none.

    Attributes:
        bos: Beginning of sequence.
        eos: End of sequence.
        eot: End of turn.
        sep: Separator.
        nl: Newline.
        pad: Padding.
        fim_pre: Before the text in front of a gap that is to be filled (infill).
        fim_suf: Before the text behind it.
        fim_mid: Before what fills it.
        add_bos: Whether the model wants a BOS in front of a text.
        add_eos: Whether it wants an EOS behind it.
        bos_text: The text of the BOS; empty if there is none.
        eos_text: Of the EOS.
        eog: All tokens that end a generation.
    """

    bos: Id
    eos: Id
    eot: Id
    sep: Id
    nl: Id
    pad: Id
    fim_pre: Id
    fim_suf: Id
    fim_mid: Id
    add_bos: bool
    add_eos: bool
    bos_text: Word
    eos_text: Word
    eog: Annotated[list[Id], msgspec.Meta(max_length=4096)]


class ToTokens(msgspec.Struct, tag="to_tokens", frozen=True):
    """Tokenise the UTF-8 text in the arena (`tokens_shapes`)."""

    n_bytes: int
    room: int  # tokens
    add_special: bool
    parse_special: bool


class AsTokens(msgspec.Struct, frozen=True):
    """How many tokens there are; of more than there was room for, none lies in the arena."""

    n_tokens: Bytes


class ToText(msgspec.Struct, tag="to_text", frozen=True):
    """Tell the text of the tokens in the arena (`text_shapes`)."""

    n_tokens: int
    room: int  # bytes
    special: bool  # the text of special tokens, too


class AsText(msgspec.Struct, frozen=True):
    """How many bytes of UTF-8 there are; of more than there was room for, none lies in the arena."""

    n_bytes: Bytes


class AskTemplate(msgspec.Struct, tag="template", frozen=True):
    """Write the model's chat template of this name (None: its default one) into the arena."""

    name: str | None
    room: int  # bytes


class Render(msgspec.Struct, tag="render", frozen=True):
    """Render messages by a chat template, and tokenise that (`render_shapes`).

    What looks like a special token in what the messages say is text.
    """

    n_context: int  # bytes of a JSON object: what the template is given
    n_template: int  # bytes
    room: int  # bytes of the rendered text, and tokens


class Rendered(msgspec.Struct, frozen=True):
    """How long the text and its tokens in the arena are."""

    n_bytes: Bytes
    n_tokens: Bytes


class MakeGrammar(msgspec.Struct, tag="grammar", frozen=True):
    """Write a grammar into the arena (`grammar_shapes`), if llama.cpp can use it.

    The arena holds a JSON object: ``rules`` is the grammar, in GBNF, and ``schemas`` has the JSON schema of
    each rule that is missing in it.
    """

    n_bytes: int
    room: int  # bytes


class AskSpecial(msgspec.Struct, tag="special", frozen=True):
    """Tell the `SpecialTokens`."""


TextRequest = ToTokens | ToText | AskTemplate | Render | MakeGrammar | AskSpecial | Warm


def tokens_shapes(request: ToTokens) -> list[Shape]:
    """The text; its tokens (the reply)."""
    return [("u1", request.n_bytes), ("i4", request.room)]


def text_shapes(request: ToText) -> list[Shape]:
    """The tokens; their text (the reply)."""
    return [("i4", request.n_tokens), ("u1", request.room)]


def render_shapes(request: Render) -> list[Shape]:
    """The context and the template; the rendered text and its tokens (the reply)."""
    sizes = request.n_context, request.n_template, request.room
    return [*(("u1", size) for size in sizes), ("i4", request.room + OVER)]


def grammar_shapes(request: MakeGrammar) -> list[Shape]:
    """What is asked; the grammar (the reply)."""
    return [("u1", request.n_bytes), ("u1", request.room)]
