"""Completions that the engine and ``llama_cpp.Llama`` must answer alike; run as a program, the original's."""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPT = "The quick brown fox"
SEA = 'root ::= [a-z ]+ ("." | ",")'
NEUTRAL: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}
GREEDY: dict[str, Any] = NEUTRAL | {"temperature": 0.0, "seed": 7, "max_tokens": 24}
WARM: dict[str, Any] = GREEDY | {"temperature": 0.9}

# By name: the arguments of `create_completion`, of which `Sampling` has all but "stop" and "logprobs".
CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature": WARM,
    "another seed": WARM | {"seed": 8},
    "top_k": WARM | {"top_k": 5},
    "top_p": WARM | {"top_p": 0.6},
    "min_p": WARM | {"min_p": 0.2},
    "typical_p": WARM | {"typical_p": 0.4},
    "its own defaults": WARM | {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "mirostat 1": WARM | {"mirostat_mode": 1, "mirostat_tau": 4.0},
    "mirostat 2": WARM | {"mirostat_mode": 2, "mirostat_eta": 0.2},
    "repeat_penalty": GREEDY | {"repeat_penalty": 1.3},
    "frequency_penalty": WARM | {"frequency_penalty": 0.7},
    "presence_penalty": WARM | {"presence_penalty": 0.7, "top_k": 20},
    "logit_bias": GREEDY | {"logit_bias": {40: 8.0, 41: -5.0, 100: 6.0}},
    "warm logit_bias": WARM | {"logit_bias": {40: 8.0, 41: -5.0, 100: 6.0}},
    "grammar": GREEDY | {"grammar": SEA},
    "warm grammar": WARM | {"grammar": SEA, "top_k": 40},
    "penalised grammar": GREEDY | {"grammar": SEA, "repeat_penalty": 1.5},
    "stop": GREEDY | {"stop": ["ar", "a", "ne"]},
    "logprobs": WARM | {"logprobs": 3},
}


def main(model: str) -> dict[str, Any]:
    """The original's answer to each: text, why it ended, and logprobs."""
    import llama_cpp.llama_grammar

    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True}
    llama: Any = llama_cpp.Llama(model, verbose=False, logits_all=True, **options)
    answers = {}
    for name, case in CASES.items():
        llama.reset()
        grammar = case.get("grammar")
        if grammar:
            grammar = llama_cpp.llama_grammar.LlamaGrammar.from_string(grammar, verbose=False)
        choice = llama.create_completion(PROMPT, **case | {"grammar": grammar})["choices"][0]
        likely = choice["logprobs"] or {}
        answers[name] = [choice["text"], choice["finish_reason"], likely.get("token_logprobs")]
    return answers


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1]), default=float))
