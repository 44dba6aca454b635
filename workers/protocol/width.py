"""What the width measurement asks of its cell, besides what every llama.cpp cell answers."""

from __future__ import annotations

from typing import Annotated

import msgspec

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**44)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=1, le=2**50)]


class Weigh(msgspec.Struct, tag="weigh", frozen=True):
    """Decode two tokens, one by one, in an empty context of one sequence."""


class Weighed(msgspec.Struct, frozen=True):
    """What a sequence costs."""

    first: Bytes  # of its state with one token
    more: Bytes  # with each further token; 0 where the state does not grow
    nanoseconds: Nanoseconds  # of the second token: the first one reads the weights


class Fill(msgspec.Struct, tag="fill", frozen=True):
    """Give every sequence the same ``depth`` tokens."""

    depth: int


class Filled(msgspec.Struct, frozen=True):
    """Done."""


class Step(msgspec.Struct, tag="step", frozen=True):
    """Generation steps, one token for each of the first ``n_seq`` sequences, from where `Fill` left them."""

    n_seq: int
    n_threads: int
    most: int  # steps
    nanoseconds: int  # no further step once these have passed


class Stepped(msgspec.Struct, frozen=True):
    """How many steps there were, one at least, and how long they took together.

    ``waited`` is for how much of that the cell was ready to run, and others had the processor.
    """

    steps: Annotated[int, msgspec.Meta(ge=1)]
    nanoseconds: Nanoseconds
    waited: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
