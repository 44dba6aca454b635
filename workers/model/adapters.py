"""LoRA adapters and control vectors of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, check_integer, check_number


@dataclass(frozen=True)
class Adapters:
    """What changes the model of a context.

    Attributes:
        lora: Paths of LoRA adapters and their scales.
        vector: A control vector, float32, n_embd values for each layer from 1; empty for none.
        layers: The first and the last layer that the vector is added to.
    """

    lora: tuple[tuple[str, float], ...] = ()
    vector: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    layers: tuple[int, int] = (0, 0)

    @classmethod
    def checked(
        cls,
        lora: Mapping[str | Path, float],
        control: npt.ArrayLike | None,
        layers: tuple[int, int],
        n_embd: int,
    ) -> Adapters:
        """Make it of what a caller gave.

        Raises:
            InputError: A file cannot be read, or a value is out of range.
        """
        if not isinstance(lora, Mapping):
            raise InputError("lora", lora, "must be a mapping of paths to scales")
        found = []
        for path, scale in lora.items():
            check_number(f"scale of {path}", scale, -1e6, 1e6)
            if not Path(path).is_file():
                raise InputError("lora", str(path), "must be the path of a LoRA adapter (GGUF)")
            found.append((str(Path(path).absolute()), float(scale)))
        try:
            vector = np.empty(0, np.float32) if control is None else np.asarray(control, np.float32).ravel()
        except (TypeError, ValueError) as error:
            raise InputError("control", control, f"must be numbers ({error})") from error
        if len(vector) % n_embd or not np.isfinite(vector).all():
            limit = f"must be finite, and n_embd = {n_embd} values for each layer"
            raise InputError("control", vector.shape, limit)
        check_integer("layers[0]", layers[0], 0, 2**16)
        check_integer("layers[1]", layers[1], -1, 2**16)
        n_layers = len(vector) // n_embd
        return cls(tuple(found), vector, (int(layers[0]), n_layers if layers[1] < 0 else int(layers[1])))
