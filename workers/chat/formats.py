"""Chat templates by name, for models that bring none."""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# A system message has no place of its own: it goes before the first of the user.
_MISTRAL_INSTRUCT = (
    "{{ bos_token }}"
    "{% set ns = namespace(before='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ ns.before }}{{ message.content }} [/INST]"
    "{% set ns.before = '' %}"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{% set ns.before = ns.before + message.content + '\n\n' %}"
    "{% endif %}"
    "{% endfor %}"
)

FORMATS = {"chatml": _CHATML, "llama-3": _LLAMA_3, "mistral-instruct": _MISTRAL_INSTRUCT}
STOPS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "mistral-instruct": "</s>"}
"""What a model writes at the end of its turn, where that is no token which ends a generation."""
