"""Child side: how the next token of a sequence is drawn, by llama.cpp's own samplers.

Facts are those of llama.cpp 0c1e57098, src/llama-sampler.cpp.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

from crumplezone.workers.native.engine.candidates import Candidates
from crumplezone.workers.native.engine.trigger import Trigger
from crumplezone.workers.native.grammar import begun, make_grammar
from crumplezone.workers.native.model import NativeLogs
from crumplezone.workers.protocol.generate.sampling import COLDEST, Sampling

END = -1  # instead of a token: the grammar lets none follow
_MIROSTAT_M = 100  # as `llama_cpp.Llama` has it
_BREAKERS_KEPT = 4
_PIECE_MAX = 4096
_TINIEST = 1e-37  # below, a probability may round to 0: see `Sampler._truncation`


class Vocabulary:
    """What samplers need of a model, and what is worth keeping between them. Free it with `close`.

    Args:
        vocab: ``const llama_vocab *``.
        logs: Of llama.cpp.
    """

    def __init__(self, vocab: Any, logs: NativeLogs) -> None:
        self.vocab, self.logs = vocab, logs
        self.n_tokens = int(C.llama_vocab_n_tokens(vocab))
        self.candidates, self.one = Candidates(self.n_tokens), Candidates(1)
        self._room = ctypes.create_string_buffer(_PIECE_MAX)
        self._ends: list[int] | None = None
        self._dry: dict[tuple[object, ...], Any] = {}

    @property
    def ends(self) -> list[int]:
        """The tokens that end a generation."""
        if self._ends is None:
            self._ends = [i for i in range(self.n_tokens) if C.llama_vocab_is_eog(self.vocab, i)]
        return self._ends

    def dry(self, sampling: Sampling) -> Any:
        """A DRY sampler. It takes long to find its breakers in the vocabulary: a copy, where one will do."""
        last_n = sampling.dry_penalty_last_n
        if last_n < 0:
            last_n = min(sampling.max_tokens, 2**16)
        breakers = [text.encode() for text in sampling.dry_sequence_breakers]
        values = sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, last_n
        key = (*values, *breakers)
        if key not in self._dry:
            if len(self._dry) == _BREAKERS_KEPT:
                C.llama_sampler_free(self._dry.pop(next(iter(self._dry))))
            texts = (ctypes.c_char_p * len(breakers))(*breakers)
            self._dry[key] = C.llama_sampler_init_dry(self.vocab, *values, texts, len(breakers))
        return C.llama_sampler_clone(self._dry[key])

    def piece(self, token: int) -> bytes:
        """The text of a token as grammars have it: with that of special tokens."""
        n = C.llama_token_to_piece(self.vocab, token, self._room, _PIECE_MAX, 0, True)
        return self._room.raw[: max(n, 0)]

    def grammar(self, text: str, root: str = "root") -> Any:
        """See `make_grammar`."""
        return make_grammar(self.vocab, self.logs, text, root)

    def close(self) -> None:
        """Free what was kept. Idempotent."""
        while self._dry:
            C.llama_sampler_free(self._dry.popitem()[1])


class Sampler:
    """Draws the tokens of one sequence, unless they are simply the likeliest (`Sampling.plain`).

    The samplers are those of `llama_cpp.Llama`, in its order, if no other is asked for, and so is their
    noise: that of one generator, from which each token takes one number. So after a crash it is moved on by
    as many numbers as tokens were drawn (`llama_sampler_dist_apply`; where Mirostat and XTC take one depends
    on the logits: see `again`). Penalties count what was drawn, not the prompt, as there.

    Close it: the samplers are native objects.

    Args:
        sampling: How.
        vocabulary: Of the model.
        drawn: Tokens that were drawn before, elsewhere. If `Sampling.looks_back`, call `again` for them.
        stop_tokens: What ends the text besides the model's own tokens.

    Raises:
        GrammarError: llama.cpp cannot parse the grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: Vocabulary,
        drawn: Sequence[int] = (),
        stop_tokens: Iterable[int] = (),
    ) -> None:
        self._sampling, self._vocabulary = sampling, vocabulary
        self._n_drawn = 0
        self._changed = False  # greedy: whether the likeliest token may be another than the logits say
        self._ended = False  # a trigger fired with what the grammar does not accept
        self._grammar: Any = vocabulary.grammar(sampling.grammar) if sampling.grammar else None
        self._trigger: Trigger | None = None
        if self._grammar and sampling.grammar_lazy:
            self._trigger = Trigger(sampling.grammar_triggers)
        self._chains: list[Any] = []
        self._chain()
        self._banned = self._ban(stop_tokens)
        noise = None
        if sampling.greedy:
            self._greedy()
        else:
            noise = self._selecting()
        if not sampling.looks_back:
            for token in drawn:
                self._accept_known(token)
            self._skip(noise, len(drawn))

    def draw(self, context: Any, index: int, row: npt.NDArray[np.float32], likeliest: int) -> int:
        """The next token, which then counts for the penalties and the grammar, or `END`.

        Args:
            context: Whose logits are drawn from; none of them may be NaN, and the largest is finite.
            index: Of the output in the batch.
            row: Its logits.
            likeliest: The token that has the largest.
        """
        if self._grammar:
            token = self._by_grammar(row, likeliest)
            if token != END:
                self._accept(token)
            return token
        token = int(C.llama_sampler_sample(self._chains[0], context, index))
        self._drew()
        return token

    def again(self, row: npt.NDArray[np.float32], token: int) -> None:
        """Move on as `draw` did when it drew a token that is known.

        Args:
            row: The logits from which it was drawn.
            token: It.
        """
        candidates = self._vocabulary.candidates
        candidates.fill(row)
        candidates.apply(self._chains[0])
        if self._grammar and not self._trigger:
            candidates.apply(self._grammar)
        if self._grammar and candidates.logits.max() != -math.inf:
            candidates.apply(self._chains[1])
        self._accept_known(token)

    def close(self) -> None:
        """Free the samplers. Idempotent."""
        while self._chains:
            C.llama_sampler_free(self._chains.pop())  # and with it, those that were added
        if self._grammar:
            C.llama_sampler_free(self._grammar)
            self._grammar = None

    # What the chains are made of.

    def _chain(self) -> None:
        self._chains.append(C.llama_sampler_chain_init(C.llama_sampler_chain_default_params()))

    def _add(self, sampler: Any) -> Any:
        C.llama_sampler_chain_add(self._chains[-1], sampler)
        return sampler

    def _ban(self, stop_tokens: Iterable[int]) -> bool:
        """Let no token end the text, now or ever: the first sampler of all. Whether that is to be undone."""
        sampling = self._sampling
        if not (sampling.ignore_eos or sampling.min_tokens):
            return False
        ends = set(self._vocabulary.ends)
        if sampling.min_tokens and not sampling.ignore_eos:
            ends |= {token for token in stop_tokens if token < self._vocabulary.n_tokens}
        self._bias(dict.fromkeys(ends, -math.inf))
        return not sampling.ignore_eos

    def _bias(self, biases: dict[int, float]) -> None:
        array = (C.llama_logit_bias * len(biases))(*(C.llama_logit_bias(*each) for each in biases.items()))
        self._add(C.llama_sampler_init_logit_bias(self._vocabulary.n_tokens, len(biases), array))

    def _greedy(self) -> None:
        """What changes the likeliest token, and what selects it; with a grammar, `_likeliest` does."""
        if self._sampling.logit_bias:
            self._bias(self._sampling.logit_bias)
        for name in self._sampling.samplers:
            if name == "penalties":
                self._penalties()
            elif name == "dry":
                self._dry()
        self._changed = bool(C.llama_sampler_chain_n(self._chains[0]))
        if not self._grammar:
            self._add(C.llama_sampler_init_greedy())

    def _penalties(self) -> None:
        how = self._sampling
        if how.penalises:
            penalties = how.repeat_penalty, how.frequency_penalty, how.presence_penalty
            n_vocab = self._vocabulary.n_tokens
            self._add(C.llama_sampler_init_penalties(n_vocab, how.penalty_last_n, *penalties))

    def _dry(self) -> None:
        if self._sampling.dry:
            self._add(self._vocabulary.dry(self._sampling))

    def _selecting(self) -> Any:
        """All samplers of a draw. Returns the one whose noise has to be moved on, or None."""
        sampling = self._sampling
        if sampling.logit_bias:
            self._bias(sampling.logit_bias)
        names = list(sampling.samplers)
        if names[:1] == ["penalties"]:
            self._penalties()
            del names[0]
        if self._grammar:  # is applied between the chains: before anything leaves tokens out
            self._chain()
        for name in names:
            if name == "penalties":
                self._penalties()
            elif name == "dry":
                self._dry()
            elif not sampling.mirostat_mode:
                self._truncation(name)
        if sampling.mirostat_mode:
            self._mirostat()
            return None
        return self._add(C.llama_sampler_init_dist(sampling.seed))

    def _truncation(self, name: str) -> None:
        how = self._sampling
        match name:
            case "top_n_sigma":
                self._add(C.llama_sampler_init_top_n_sigma(how.top_n_sigma))
            case "top_k":
                self._add(C.llama_sampler_init_top_k(how.top_k))
            case "typical_p" if how.typical_p < 1:
                # Of a probability that is 0 it takes the logarithm, and then sorts by NaN.
                self._add(C.llama_sampler_init_min_p(_TINIEST, 1))
                self._add(C.llama_sampler_init_typical(how.typical_p, 1))
            case "top_p":
                self._add(C.llama_sampler_init_top_p(how.top_p, 1))
            case "min_p":
                self._add(C.llama_sampler_init_min_p(how.min_p, 1))
            case "xtc":
                self._add(C.llama_sampler_init_xtc(how.xtc_probability, how.xtc_threshold, 1, how.seed))
            case "temperature":
                self._temperature()

    def _temperature(self) -> None:
        how = self._sampling
        if how.dynatemp_range:
            # Not down to 0: see COLDEST.
            delta = min(how.dynatemp_range, how.temperature - COLDEST)
            self._add(C.llama_sampler_init_temp_ext(how.temperature, delta, how.dynatemp_exponent))
        else:
            self._add(C.llama_sampler_init_temp(how.temperature))

    def _mirostat(self) -> None:
        how = self._sampling
        target = how.seed, how.mirostat_tau, how.mirostat_eta
        if how.mirostat_mode == 1:
            n_vocab = self._vocabulary.n_tokens
            self._add(C.llama_sampler_init_mirostat(n_vocab, *target, _MIROSTAT_M))
        else:
            self._add(C.llama_sampler_init_mirostat_v2(*target))

    # What they do.

    def _by_grammar(self, row: npt.NDArray[np.float32], likeliest: int) -> int:
        if self._ended:
            return END
        if self._sampling.greedy:
            return self._likeliest(row, likeliest)
        candidates = self._vocabulary.candidates
        candidates.fill(row)
        candidates.apply(self._chains[0])
        if not self._trigger:
            candidates.apply(self._grammar)
        if candidates.logits.max() == -math.inf:  # what selects would take any, and the grammar would abort
            return END
        candidates.apply(self._chains[1])
        return candidates.selected

    def _likeliest(self, row: npt.NDArray[np.float32], token: int) -> int:
        """The likeliest token that the grammar accepts. To ask it of all of them takes milliseconds."""
        candidates = self._vocabulary.candidates
        if self._changed:
            candidates.fill(row)
            candidates.apply(self._chains[0])
            token = int(candidates.logits.argmax())
        if self._lets_pass(token):
            return token
        if not self._changed:
            candidates.fill(row)
        candidates.apply(self._grammar)
        token = int(candidates.logits.argmax())
        return token if candidates.logits[token] != -math.inf else END

    def _accept(self, token: int) -> None:
        for chain in self._chains:
            C.llama_sampler_accept(chain, token)
        if self._trigger:
            if fired := self._trigger.fires(token, self._vocabulary.piece(token)):
                self._begin(*fired)
        elif self._grammar and not self._ended:
            C.llama_sampler_accept(self._grammar, token)
        self._drew()

    def _accept_known(self, token: int) -> None:
        """Another cell says that it was drawn: llama.cpp aborts if it is wrong."""
        self._ended |= bool(self._grammar) and not self._lets_pass(token)
        self._accept(token)

    def _begin(self, before: bytes, tokens: list[int]) -> None:
        """From here on the grammar holds."""
        self._trigger = None
        if before:
            C.llama_sampler_free(self._grammar)
            texts = begun(self._sampling.grammar, before.decode("utf-8", "replace"))
            self._grammar = self._vocabulary.grammar(*texts)
        for token in tokens:
            if not self._lets_pass(token):
                self._ended = True
                break
            C.llama_sampler_accept(self._grammar, token)

    def _lets_pass(self, token: int) -> bool:
        """Whether the grammar does so, if it holds already."""
        if self._trigger:
            return True
        one = self._vocabulary.one
        one.fill_one(token, 0.0)
        one.apply(self._grammar)
        return bool(one.logits[0] != -math.inf)

    def _drew(self) -> None:
        self._n_drawn += 1
        if self._banned and self._n_drawn >= self._sampling.min_tokens:
            C.llama_sampler_free(C.llama_sampler_chain_remove(self._chains[0], 0))
            self._banned = False

    def _skip(self, noise: Any, n: int) -> None:
        """Take so many numbers from a generator: one for each time that it selects."""
        if noise:
            one = self._vocabulary.one
            for _ in range(n):
                one.fill_one(0, 0.0)
                one.apply(noise)
