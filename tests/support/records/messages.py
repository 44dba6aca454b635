"""Messages of llama.cpp with paths in them."""

from __future__ import annotations

PATHS = {
    "/usr/lib/libc.so.6": "libc.so.6",
    "open /a/b/c failed": "open c failed",
    "'/a b/c d/e f' and \"/x/y\"": "'e f' and \"y\"",
    "~/secret/x": "x",
    "../x/y.cpp:12": "y.cpp:12",
    "src/llama.cpp:3": "llama.cpp:3",
    "a=/x/y/,b=/z/": "a=y,b=z",
    "GGML_ASSERT(n_tokens/n_seqs == x / y) failed": None,
    "hparams.n_embd/hparams.n_head": None,
    "std::operator/(path const&)": None,
    "12 tokens/s": None,
    "/single": None,
    "": None,
}


PIECES = [
    "/home/x/",
    "a/b",
    " ",
    "'",
    '"',
    "x.cpp",
    ":12",
    "GGML_ASSERT(",
    ") failed",
    "~/",
    "what():  ",
    "/",
    "y z",
]
