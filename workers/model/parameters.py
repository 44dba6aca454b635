"""Parameters of a model and its context that `llama_cpp.Llama` has too: what they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from crumplezone.errors import InputError, check_integer, check_number
from crumplezone.reports.records.llama import CacheType, FlashAttention, RopeScaling, SplitMode
from crumplezone.workers.protocol.config import (
    CACHE_TYPES,
    DEVICES_MAX,
    FLASH_ATTENTION,
    INT32_MAX,
    QUANTIZED,
    ROPE_SCALING,
    SPLIT_MODES,
)

_NAMES: dict[str, Mapping[Any, int]] = {
    "type_k": CACHE_TYPES,
    "type_v": CACHE_TYPES,
    "flash_attn": FLASH_ATTENTION,
    "rope_scaling_type": ROPE_SCALING,
    "split_mode": SPLIT_MODES,
}
_FLAGS = ("kv_unified", "offload_kqv", "op_offload", "swa_full", "use_mmap", "use_mlock")
_INTEGERS = {
    "n_threads_batch": (0, 512),
    "yarn_orig_ctx": (0, INT32_MAX),
    "main_gpu": (-1, DEVICES_MAX - 1),  # -1: with split_mode "none", no GPU at all (src/llama.cpp)
}
_NUMBERS = {
    "rope_freq_base": (0.0, 1e12),
    "rope_freq_scale": (0.0, 1e3),
    "yarn_ext_factor": (-1.0, 1e3),
    "yarn_attn_factor": (-1.0, 1e3),
    "yarn_beta_fast": (-1.0, 1e6),
    "yarn_beta_slow": (-1.0, 1e6),
}
PARAMETERS = frozenset({*_NAMES, *_FLAGS, *_INTEGERS, *_NUMBERS, "tensor_split"})
"""Their names."""


class ContextOptions(TypedDict, total=False):
    """Parameters of `llama_cpp.Llama` 0.3.36 as keyword arguments, with its defaults, so that texts agree.

    What is a number of an enum there may be its name here: ``type_k=8`` or ``"q8_0"``.

    Attributes:
        n_threads_batch: Threads of native calls of more than one token, of one sequence or of several;
            0: as many as ``n_threads``.
        flash_attn: "auto" by default, as llama.cpp has it: where the device can; True or "on"; False or
            "off". Only with it is a token rounded alike in a native call of one token and of many, so that a
            text which goes on after a crash stays the same; without it texts are those of a
            ``llama_cpp.Llama`` that is not given it either.
        type_k: Type of the cached keys, "f16" by default.
        type_v: Likewise of the values. A quantised one needs ``flash_attn``.
        kv_unified: One cache of ``n_ctx`` tokens that all sequences share; False: each has its part of it,
            which is what makes a batch give every sequence what it gets alone. With True they affect each
            other's rounding, and those that do not fit into it together are decoded one at a time.
        rope_scaling_type: "unspecified" (the model's, by default), "none", "linear", "yarn", "longrope".
        rope_freq_base: 0: the model's.
        rope_freq_scale: 0: the model's.
        yarn_ext_factor: Below 0: the model's, which is the default.
        yarn_attn_factor: 1 by default; below 0, here and below: the model's.
        yarn_beta_fast: 32 by default.
        yarn_beta_slow: 1 by default.
        yarn_orig_ctx: 0: the model's.
        offload_kqv: Whether keys and values are on the GPU; True by default.
        op_offload: Whether the GPU does operations on what is in host memory; True by default.
        swa_full: Whether the cache of sliding-window attention has its full size; True by default.
        use_mmap: Whether the model file is mapped, so that cells share its pages; True by default.
        use_mlock: Whether it is locked into memory; False by default.
        split_mode: How a model is split over GPUs: "layer" (default), "none", "row", "tensor".
        main_gpu: The one that is used without splitting.
        tensor_split: Shares of the GPUs; None: by what memory they have.
    """

    n_threads_batch: int
    flash_attn: FlashAttention | bool
    type_k: CacheType | int | None
    type_v: CacheType | int | None
    kv_unified: bool
    rope_scaling_type: RopeScaling | int | None
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    offload_kqv: bool
    op_offload: bool | None
    swa_full: bool | None
    use_mmap: bool
    use_mlock: bool
    split_mode: SplitMode | int
    main_gpu: int
    tensor_split: Sequence[float] | None


_DEFAULTS: dict[str, Any] = {  # of ``llama_cpp.Llama`` where they are not llama.cpp's (llama_cpp/llama.py)
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
_NONE = {
    "type_k": "f16",
    "type_v": "f16",
    "rope_scaling_type": "unspecified",
    "tensor_split": (),
    "op_offload": True,
    "swa_full": True,
}


def parameters_of(options: ContextOptions) -> dict[str, Any]:
    """Fields of a `CellConfig`, from what a caller gave.

    Raises:
        InputError: One is out of range, or does not go with another.
        TypeError: There is no such parameter.
    """
    if unknown := options.keys() - PARAMETERS:
        raise TypeError(f"{min(unknown)!r} is no parameter; there are also {', '.join(sorted(PARAMETERS))}")
    given = _DEFAULTS | {
        name: _NONE[name] if value is None and name in _NONE else value for name, value in options.items()
    }
    for name in _NAMES.keys() & given.keys():
        given[name] = _name_of(name, given[name])
    check_parameters(given)
    flags = {name: bool(given[name]) for name in _FLAGS if name in given}
    integers = {name: int(given[name]) for name in _INTEGERS if name in given}
    numbers = {name: float(given[name]) for name in _NUMBERS if name in given}
    if "tensor_split" in given:
        given["tensor_split"] = tuple(map(float, given["tensor_split"]))
    return given | flags | integers | numbers  # numpy's are welcome, but do not travel


def check_parameters(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `InputError` unless these may be parameters, with names for what is an enum.

    Args:
        values: Some of `PARAMETERS`; the others are llama.cpp's own defaults.
        prefix: Put before the name of a field in the message.
    """
    for name, value in values.items():
        field = prefix + name
        if name in _NAMES:
            if not isinstance(value, str) or value not in _NAMES[name]:
                raise InputError(field, value, f"must be one of {', '.join(_NAMES[name])}")
        elif name in _FLAGS:
            if not isinstance(value, bool | np.bool_):
                raise InputError(field, value, "must be True or False")
        elif name in _INTEGERS:
            check_integer(field, value, *_INTEGERS[name])
        elif name in _NUMBERS:
            check_number(field, value, *_NUMBERS[name])
        else:
            _check_shares(field, value)
    _check_together(values, prefix)


def _name_of(field: str, value: object) -> object:
    """The name of an enum's number, of which True and False are some of ``flash_attn``."""
    if isinstance(value, str) or (isinstance(value, bool | np.bool_) and field != "flash_attn"):
        return value
    names = {number: name for name, number in _NAMES[field].items()}
    check_integer(field, int(value) if isinstance(value, bool | np.bool_) else value, min(names), max(names))
    return names.get(int(value), value)  # type: ignore[call-overload]


def _check_shares(field: str, value: object) -> None:
    limit = f"must be a list of at most {DEVICES_MAX} numbers (llama_max_devices)"
    try:
        shares = [] if isinstance(value, str | bytes) else list(value)  # type: ignore[call-overload]
    except TypeError:
        raise InputError(field, value, limit) from None
    if len(shares) > DEVICES_MAX or isinstance(value, str | bytes):
        raise InputError(field, value, limit)
    for i, share in enumerate(shares):
        check_number(f"{field}[{i}]", share, 0.0, 1e9)


def _check_together(values: Mapping[str, Any], prefix: str) -> None:
    """What llama_init_from_model refuses."""
    if values.get("flash_attn") != "off":
        return
    if values.get("type_v") in QUANTIZED:
        limit = "is quantised, which needs flash_attn to be on or auto"
        raise InputError(f"{prefix}type_v", values["type_v"], limit)
    if values.get("split_mode") == "tensor":
        raise InputError(f"{prefix}split_mode", "tensor", "needs flash_attn to be on or auto")
