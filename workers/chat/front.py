"""The half of `Decoder` that knows texts: tokens, chat templates, chat."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError
from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.chat.answers.parser import Shape
from crumplezone.workers.chat.families import GENERIC, THINK, Family, family_of
from crumplezone.workers.chat.formats import FORMATS, STOPS
from crumplezone.workers.chat.messages import Json, checked_messages, mapping
from crumplezone.workers.chat.stream import ChatCompletion, ChatStream
from crumplezone.workers.chat.tools import Tools, answer_grammar, answer_schema, checked_tools, told_in_text
from crumplezone.workers.generate.requests.request import GivenPrompt, Request, RequestOptions
from crumplezone.workers.generate.requests.stream import Stream
from crumplezone.workers.protocol.text import SpecialTokens
from crumplezone.workers.text.texts import Texts, Tokens, encoded

_OWN = {"messages", "tools", "tool_choice", "bos_token", "eos_token", "raise_exception", "strftime_now"}
_WITH_TOOLS = "tool_use"  # the name that models give to a second template, for requests with tools


@dataclass(frozen=True)
class _Template:
    source: str
    name: str  # as messages have it
    family: Family


class Chats:
    """What a decoder does in its text cells, and on top of its completions."""

    _turn: Turn
    _texts: Texts | None = None

    if TYPE_CHECKING:

        def submit_prompt(self, prompt: GivenPrompt | Request, **options: Unpack[RequestOptions]) -> Stream:
            """See `Decoder.submit_prompt`."""

    def tokenize(
        self, text: str, *, add_special: bool = True, special: bool = False
    ) -> npt.NDArray[np.int32]:
        """Token ids of a text, int32, shape (n,). It waits for no other call.

        Args:
            text: Of at most 16 MiB in UTF-8. Half a surrogate pair counts as U+FFFD.
            add_special: Add the special tokens that the model wants around a text (BOS, EOS).
            special: Whether special tokens that are written out in the text (``<|im_end|>``) are taken for
                these tokens. If a stranger writes the text, he could end his turn, and begin another's.

        Raises:
            InputError: It is no text, or too long.
            CellDied: The tokenizer crashed.
            ModelError: A new cell was needed, and the model cannot be loaded again.
        """
        with self._turn.passing():
            return self._open_texts().tokenize(text, add_special=add_special, parse_special=special)

    def detokenize(self, tokens: Tokens, *, special: bool = True) -> str:
        """The text of tokens. What is no UTF-8 becomes U+FFFD. It waits for no other call.

        Args:
            tokens: Ids, at most 2**24.
            special: Whether special tokens have a text (``<|im_end|>``), or none.

        Raises:
            TokenError: One of them is no token of this model.
            CellDied, ModelError: As `tokenize`.
        """
        with self._turn.passing():
            return self._open_texts().detokenize(tokens, special=special)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Ids of the tokens that the model has for a purpose: its BOS, what ends a generation, infill, ...

        Raises:
            CellDied, ModelError: As `tokenize`.
        """
        with self._turn.passing():
            return self._open_texts().special()

    def schema_to_grammar(self, schema: Mapping[str, Any]) -> str:
        """A grammar (GBNF) of the JSON texts that satisfy a JSON schema, for the option ``grammar``.

        Of numbers, no bounds are held; of texts, ``pattern`` (between ``^`` and ``$``), the lengths and the
        formats date, time, date-time and uuid are.

        Raises:
            InputError: It is no schema, or has what cannot be made a grammar.
            CellDied, ModelError: As `tokenize`.
        """
        with self._turn.passing():
            rules, schemas = answer_grammar(mapping("schema", schema), thinking=False)
            return self._open_texts().grammar("schema", rules, schemas)

    def apply_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_format: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The messages of a chat as the model reads them.

        Args:
            messages: As for `submit_chat`.
            tools: Likewise.
            chat_format: Likewise.
            template_kwargs: Likewise.
            add_generation_prompt: End with what begins the answer.

        Raises:
            InputError: As `submit_chat`.
            CellDied, ModelError: As `tokenize`.
        """
        with self._turn.passing():
            template = self._template(chat_format, with_tools=bool(tools))
            begin = bool(add_generation_prompt)
            checked = checked_tools(tools, "auto")
            text, _ = self._rendered(
                template, checked_messages(messages), checked, template_kwargs, begin=begin
            )
        return text

    def submit_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = "auto",
        response_format: Mapping[str, Any] | None = None,
        chat_format: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[RequestOptions],
    ) -> ChatStream:
        """Answer the messages of a chat, together with whatever else is in flight.

        Args:
            messages: In OpenAI's shape, texts only. What looks like a special token in them is text.
            tools: That may be called, likewise.
            tool_choice: "auto", "none", "required", or a mapping that names the one to be called. One that
                has to be called is called with arguments that satisfy its schema.
            response_format: A mapping whose ``type`` is "text", "json_object" or "json_schema".
            chat_format: "chatml", "llama-3" or "mistral-instruct", or the name of one of the model's
                templates; None: its own one.
            template_kwargs: More for the template (``{"enable_thinking": False}``).
            options: As for `submit_prompt`.

        Returns:
            A future of the `ChatCompletion`; iterate over it for deltas as they come. It can be cancelled.

        Raises:
            InputError: Something of this is none, the template refuses it, or the model has no template.
            CellDied, ModelError: As `tokenize`.
        """
        given = checked_messages(messages)
        known = checked_tools(tools, tool_choice)
        schema = answer_schema(response_format)
        with self._turn.passing():
            template = self._template(chat_format, with_tools=bool(known.usable))
            text, tokens = self._rendered(template, given, known, template_kwargs)
            thinking = text.rstrip().endswith(THINK)
            limits = self._held(known, schema, template.family, options, thinking=thinking)
        names = () if schema else tuple(known.names)
        shape = Shape(template.family, names, thinking, secrets.token_hex(8))
        return ChatStream(self.submit_prompt(tokens, **_asked(options, limits, chat_format)), shape, text)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatCompletion:
        """`submit_chat`, waited for.

        Raises:
            InputError, CellDied, ModelError: As `submit_chat`.
            CrumplezoneError: It failed.
        """
        done = self.submit_chat(messages, **options).result()
        if done.completion.error:
            raise done.completion.error
        return done

    def _open_texts(self) -> Texts:
        self._turn.check_open()
        assert self._texts is not None
        return self._texts

    def _template(self, chat_format: object, *, with_tools: bool) -> _Template:
        """The template that is asked for.

        Raises:
            InputError: There is none such.
        """
        if isinstance(chat_format, str) and chat_format in FORMATS:
            return _Template(FORMATS[chat_format], f"the chat format {chat_format}", GENERIC)
        texts, known = self._open_texts(), ", ".join(FORMATS)
        if chat_format is None:
            source = (texts.template(_WITH_TOOLS) if with_tools else "") or texts.template(None)
            if not source:
                limit = f"the model has no chat template: name a format, one of {known}"
                raise InputError("chat_format", None, limit)
        elif not (_is_name(chat_format) and (source := texts.template(str(chat_format)))):
            limit = f"must be one of {known}, or the name of one of the model's templates"
            raise InputError("chat_format", chat_format, limit)
        return _Template(source, "the model's chat template", family_of(source))

    def _rendered(
        self, template: _Template, messages: list[Json], tools: Tools, more: object, *, begin: bool = True
    ) -> tuple[str, npt.NDArray[np.int32]]:
        """The prompt, and its tokens; ``begin``: with what begins the answer."""
        kwargs = {} if more is None else mapping("template_kwargs", more)
        encoded("template_kwargs", kwargs)
        if own := _OWN & kwargs.keys():
            raise InputError("template_kwargs", min(own), "is given to every template already")
        if "tools" not in template.source:
            messages = told_in_text(messages, tools)
        context = {"add_generation_prompt": begin, **kwargs, "messages": messages}
        if tools.usable:
            context |= {"tools": tools.usable, "tool_choice": tools.choice}
        return self._open_texts().render(template.source, template.name, context)

    def _held(
        self, tools: Tools, schema: Json | None, family: Family, options: Mapping[str, Any], *, thinking: bool
    ) -> dict[str, Any]:
        """The grammar that the answer is held to, as an option."""
        if schema is None and not tools.forced:
            return {}
        if options.get("grammar"):
            other = "tool_choice" if tools.forced else "response_format"
            raise InputError("grammar", options.get("grammar"), f"must not be given together with {other}")
        if schema is None:
            rules, schemas = tools.grammar(family, thinking=thinking)
            field = "tools"
        elif tools.usable:
            limit = "must be 'text' where tools may be called: pass tool_choice='none'"
            raise InputError("response_format.type", "a schema", limit)
        else:
            rules, schemas = answer_grammar(schema, thinking=thinking)
            field = "response_format"
        return {"grammar": self._open_texts().grammar(field, rules, schemas)}


def _is_name(chat_format: object) -> bool:
    """Whether a model may have a template of this name: half a surrogate pair, for one, is in none."""
    return isinstance(chat_format, str) and chat_format.isprintable() and chat_format != ""


def _asked(options: RequestOptions, limits: Mapping[str, Any], chat_format: str | None) -> RequestOptions:
    """The options of the completion.

    Raises:
        InputError: One of them is none of a chat.
    """
    if options.get("echo"):
        raise InputError("echo", True, "must be False: an answer does not begin with its messages")
    asked: dict[str, Any] = {**options, **limits}
    if end := STOPS.get(chat_format or ""):
        given = options.get("stop", ())
        asked["stop"] = [given, end] if isinstance(given, str) else [*given, end]
    return cast(RequestOptions, asked)
