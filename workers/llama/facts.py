"""The part of `Llama` that only tells of its model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from crumplezone.workers.llama.calls.client import decoded
from crumplezone.workers.llama.calls.session import Session
from crumplezone.workers.llama.completions import task_of
from crumplezone.workers.protocol.config import Token
from crumplezone.workers.protocol.llama import LlamaInfo, common_prefix


class Facts:
    """What a model knows of itself, and its tokenizer."""

    _session: Session
    _metadata: dict[str, str] | None = None

    @property
    def _info(self) -> LlamaInfo:
        assert self._session.info is not None
        return self._session.info

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata."""
        if self._metadata is None:
            task = task_of("metadata_items", {})
            self._metadata = self._session.query(task, decoded(dict[str, str]))
        return self._metadata

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a UTF-8 text."""
        tokens: list[int] = self._session.query(task_of("tokenize", locals()), decoded(list[Token]))
        return tokens

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of token ids, UTF-8 that may be cut inside a character."""
        text: bytes = self._session.query(task_of("detokenize", locals()), bytes)
        return text

    def tokenizer(self) -> LlamaTokenizer:
        """The model's tokenizer."""
        return LlamaTokenizer(self)

    def n_ctx(self) -> int:
        """Tokens of context."""
        return self._info.n_ctx

    def n_embd(self) -> int:
        """Length of an embedding."""
        return self._info.n_embd

    def n_vocab(self) -> int:
        """Number of tokens that the model knows."""
        return self._info.cell.n_vocab

    def token_eos(self) -> int:
        """The end-of-sequence token, or -1."""
        return self._info.token_eos

    def token_bos(self) -> int:
        """The beginning-of-sequence token, or -1."""
        return self._info.token_bos

    def token_nl(self) -> int:
        """The newline token, or -1."""
        return self._info.token_nl

    def pooling_type(self) -> int:
        """How embeddings are pooled: LLAMA_POOLING_TYPE_*."""
        return self._info.pooling_type

    @staticmethod
    def logits_to_logprobs(
        logits: npt.NDArray[np.single] | list[float], axis: int = -1
    ) -> npt.NDArray[np.single]:
        """Logarithm of the softmax of logits along an axis, float32."""
        array = np.asarray(logits, np.single)
        largest = np.amax(array, axis=axis, keepdims=True)
        shifted = array - np.where(np.isfinite(largest), largest, np.single(0))
        with np.errstate(divide="ignore"):
            done: npt.NDArray[np.single] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return done

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """How many tokens two sequences have in common from the start."""
        return common_prefix(a, b)


class LlamaTokenizer:
    """What `Llama.tokenizer` returns."""

    def __init__(self, llama: Facts) -> None:
        self._llama = llama

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._llama.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Text of token ids."""
        return self._llama.detokenize(tokens, prev_tokens, special)

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenize(text.encode("utf-8", "ignore"), add_bos, special)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids."""
        return self.detokenize(tokens).decode("utf-8", "ignore")
