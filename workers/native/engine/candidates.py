"""Child side: the tokens among which samplers choose, as llama.cpp has them."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import numpy as np
import numpy.typing as npt

_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Candidates:
    """A ``llama_token_data_array``, to be filled again for each token.

    Args:
        n: Most tokens in it.

    Attributes:
        logits: Of those that were filled in. Where samplers have moved them, they are in another order.
    """

    def __init__(self, n: int) -> None:
        self._rows = np.zeros(n, _DATA)
        self._ids = np.arange(n, dtype=np.int32)
        self._array: Any = C.llama_token_data_array()
        self._pointer = self._rows.ctypes.data_as(C.llama_token_data_p)
        self.logits: npt.NDArray[np.float32] = self._rows["logit"]

    def fill(self, logits: npt.NDArray[np.float32]) -> None:
        """Every token of the vocabulary, with its logit."""
        self._rows["id"], self.logits[:] = self._ids, logits
        self._begin(len(self._rows))

    def fill_one(self, token: int, logit: float) -> None:
        """One token alone."""
        self._rows[0] = token, logit, 0
        self._begin(1)

    def apply(self, sampler: Any) -> None:
        """Let a sampler change, move, leave out or select."""
        C.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def selected(self) -> int:
        """The token that was selected."""
        return int(self._array.data[self._array.selected].id)

    def _begin(self, size: int) -> None:
        self._array.data, self._array.size = self._pointer, size
        self._array.selected, self._array.sorted = -1, False
