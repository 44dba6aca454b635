"""Child side: texts to tokens and back, without a context. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36), include/llama.h unless noted.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np
import numpy.typing as npt

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native.model import model_of
from crumplezone.workers.native.text import grammars, templates
from crumplezone.workers.native.text.templates import Literals, TemplateError
from crumplezone.workers.protocol.config import CellConfig
from crumplezone.workers.protocol.messages import Warm, Warmed
from crumplezone.workers.protocol.text import (
    AskSpecial,
    AskTemplate,
    AsText,
    AsTokens,
    MakeGrammar,
    Render,
    Rendered,
    SpecialTokens,
    TextInfo,
    TextRequest,
    ToText,
    ToTokens,
    grammar_shapes,
    render_shapes,
    text_shapes,
    tokens_shapes,
)

_INT32 = ctypes.POINTER(ctypes.c_int32)
# Those that llama_tokenize does not read in a text without parse_special (llama_vocab::impl, st_partition).
_CONTROL = C.LLAMA_TOKEN_ATTR_CONTROL | C.LLAMA_TOKEN_ATTR_UNKNOWN


class TextCell:
    """A vocabulary and the metadata of a model; no weights, where a zygote has not loaded them already.

    Args:
        config: An encoded `CellConfig`, of which only the model counts.
        room: The cell's arena.
        preloaded: What `preload` returned, in a forked cell.

    Raises:
        LoadError: The vocabulary could not be loaded; the message is llama.cpp's own.
    """

    request_type: Any = TextRequest

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        wanted = msgspec.msgpack.decode(config, type=CellConfig)
        self._arena, self._recorder = room.arena, room.recorder
        self._model = model_of(preloaded, wanted.file(), room, vocab_only=True)
        self.vocab = C.llama_model_get_vocab(self._model.pointer)
        self._n_vocab = int(C.llama_vocab_n_tokens(self.vocab))

    def info(self) -> TextInfo:
        """Facts of the vocabulary."""
        return TextInfo(self._n_vocab)

    def handle(self, request: TextRequest) -> msgspec.Struct:
        """Answer one request."""
        match request:
            case ToTokens():
                return AsTokens(self._to_tokens(request))
            case ToText():
                return AsText(self._to_text(request))
            case AskTemplate():
                return AsText(self._template(request))
            case Render():
                return self._render(request)
            case MakeGrammar():
                return AsText(self._grammar(request))
            case AskSpecial():
                return self._special()
            case Warm():
                return Warmed()

    def tokens(
        self, text: bytes, room: npt.NDArray[np.int32], *, add_special: bool, parse_special: bool
    ) -> int:
        """Put the tokens of a text into an array; how many there are, or would be with more room."""
        with self._recorder.phase("tokenize", len(text)):
            found = C.llama_tokenize(
                self.vocab,
                text,
                len(text),
                room.ctypes.data_as(_INT32),
                len(room),
                add_special,
                parse_special,
            )
        return abs(int(found))

    def _to_tokens(self, request: ToTokens) -> int:
        raw, room = self._arena.arrays(tokens_shapes(request))
        special = {"add_special": request.add_special, "parse_special": request.parse_special}
        return self.tokens(raw.tobytes(), room, **special)

    def _to_text(self, request: ToText) -> int:
        tokens, room = self._arena.arrays(text_shapes(request))
        text = room.ctypes.data_as(ctypes.c_char_p)
        ids = tokens.ctypes.data_as(_INT32)
        with self._recorder.phase("detokenize", len(tokens)):
            found = C.llama_detokenize(self.vocab, ids, len(tokens), text, len(room), False, request.special)
        return abs(int(found))

    def _template(self, request: AskTemplate) -> int:
        name = request.name.encode() if request.name else None
        text = C.llama_model_chat_template(self._model.pointer, name) or b""
        self._put(text, self._arena.arrays([("u1", request.room)])[0])
        return len(text)

    def _render(self, request: Render) -> Rendered:
        raw, template, room, tokens = self._arena.arrays(render_shapes(request))
        with self._recorder.phase("render", request.n_context):
            literals = Literals(self._control)
            context = literals.marked(templates.parsed(raw.tobytes()))
            bos, eos = C.llama_vocab_bos(self.vocab), C.llama_vocab_eos(self.vocab)
            context |= {"bos_token": self._text(bos), "eos_token": self._text(eos)}
            rendered = templates.render(template.tobytes().decode(), context, request.room)
        parts = [(text.encode("utf-8", "replace"), parse) for text, parse in literals.parts(rendered)]
        whole = b"".join(text for text, _ in parts)
        if len(whole) > len(room):  # marks may be shorter than what they stand for
            raise TemplateError(f"it makes more than {len(room)} bytes of them")
        self._put(whole, room)
        return Rendered(len(whole), self._tokenized(parts, tokens))

    def _tokenized(self, parts: list[tuple[bytes, bool]], room: npt.NDArray[np.int32]) -> int:
        """The tokens of a rendered text, with one BOS if the model wants one; the template may have it."""
        n = 0
        bos = C.llama_vocab_bos(self.vocab)
        for text, parse in parts:
            n += self.tokens(text, room[n:], add_special=False, parse_special=parse)
            if n > len(room):
                raise TemplateError(f"they become more than {len(room)} tokens")
        if C.llama_vocab_get_add_bos(self.vocab) and bos >= 0 and n < len(room) and (not n or room[0] != bos):
            room[1 : n + 1] = room[:n].copy()
            room[0] = bos
            n += 1
        return n

    def _grammar(self, request: MakeGrammar) -> int:
        raw, room = self._arena.arrays(grammar_shapes(request))
        asked = templates.parsed(raw.tobytes())
        with self._recorder.phase("grammar", request.n_bytes):
            text = grammars.grammar(asked["rules"], asked["schemas"])
            made = text.encode("utf-8", "replace")
            if len(made) > len(room):
                raise grammars.UnusableError(
                    f"as a grammar it has {len(made)} bytes; {len(room)} are the limit"
                )
            grammars.check(self.vocab, self._model.native_logs, text)
        self._put(made, room)
        return len(made)

    def _special(self) -> SpecialTokens:
        vocab = self.vocab
        names = ("bos", "eos", "eot", "sep", "nl", "pad", "fim_pre", "fim_suf", "fim_mid")
        ids = {name: int(getattr(C, f"llama_vocab_{name}")(vocab)) for name in names}
        return SpecialTokens(
            **ids,
            add_bos=bool(C.llama_vocab_get_add_bos(vocab)),
            add_eos=bool(C.llama_vocab_get_add_eos(vocab)),
            bos_text=self._text(ids["bos"]),
            eos_text=self._text(ids["eos"]),
            eog=[token for token in range(self._n_vocab) if C.llama_vocab_is_eog(vocab, token)],
        )

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches the text of a special token."""
        texts = sorted(self._control_texts(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def _control_texts(self) -> Iterator[str]:
        for token in range(self._n_vocab):
            if C.llama_vocab_get_attr(self.vocab, token) & _CONTROL and (text := self._text(token)):
                yield text

    def _text(self, token: int) -> str:
        """The text of a token as the vocabulary has it; empty for none."""
        raw = C.llama_vocab_get_text(self.vocab, token) if token >= 0 else b""
        return (raw or b"").decode("utf-8", "replace")

    @staticmethod
    def _put(text: bytes, room: npt.NDArray[np.uint8]) -> None:
        if len(text) <= len(room):
            room[: len(text)] = np.frombuffer(text, np.uint8)
