"""``llama_cpp.Llama`` with other parameters: what its context is made of, and its greedy texts."""

from __future__ import annotations

import json
import sys
from typing import Any

N_TOKENS = 12
PROMPTS = ["Paris is", "Once upon a time, three little", "Gold is", "def add(a, b):"]
PLAIN: dict[str, Any] = {"flash_attn": False}  # the default of `Llama`, and not ours
OPTIONS: list[dict[str, Any]] = [
    PLAIN,
    {"flash_attn": True},
    {"flash_attn": True, "type_k": 8, "type_v": 8},
    PLAIN | {"rope_freq_base": 20000.0, "rope_freq_scale": 0.5},
    PLAIN | {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_ext_factor": 0.7, "yarn_orig_ctx": 1024},
    PLAIN | {"use_mmap": False, "n_threads_batch": 2, "swa_full": False},
]
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def numbers(params: Any) -> dict[str, Any]:
    """The fields of a ctypes structure that are plain numbers."""
    values = {name: getattr(params, name) for name, *_ in params._fields_}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def main(model: str) -> Any:
    """For each of `OPTIONS`."""
    import llama_cpp

    found = []
    for options in OPTIONS:
        llama: Any = llama_cpp.Llama(model, n_threads=1, verbose=False, **{"n_threads_batch": 1} | options)
        texts = []
        for prompt in PROMPTS:
            llama.reset()
            made = llama.create_completion(prompt, max_tokens=N_TOKENS, **GREEDY)
            texts.append(made["choices"][0]["text"])
        found.append([numbers(llama.model_params), numbers(llama.context_params), texts])
    return found


def ours(configs: str) -> Any:
    """What cells make of encoded `CellConfig`s."""
    import msgspec

    from crumplezone.workers.native.model import context_params, model_params
    from crumplezone.workers.protocol.config import CellConfig

    each = msgspec.json.decode(configs, type=list[CellConfig])
    return [[numbers(model_params(config.file())), numbers(context_params(config))] for config in each]


if __name__ == "__main__":
    print(json.dumps({"main": main, "ours": ours}[sys.argv[1]](sys.argv[2])))
