"""The same calls on `crumplezone.lowlevel` and on ``llama_cpp``; run as a program, the original's answers."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

N_CTX_SEQ, N_SEQ, N_BATCH, N_VOCAB, N_EMBD = 256, 2, 300, 128, 32

Token = tuple[int, int, int, bool]  # seq_id, token, position, output


def fill(api: Any, tokens: Sequence[Token]) -> Any:
    """A ``llama_batch`` of these, filled as every example of llama.cpp fills it."""
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (seq_id, token, position, output) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, output
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq_id
    return batch


def sequence(seq_id: int, tokens: Sequence[int], begin: int = 0) -> list[Token]:
    last = begin + len(tokens) - 1
    return [(seq_id, token, begin + i, begin + i == last) for i, token in enumerate(tokens)]


class Player:
    """Makes the calls and writes down what comes back."""

    def __init__(self, api: Any, ctx: Any) -> None:
        self.api, self.ctx, self.memory = api, ctx, api.llama_get_memory(ctx)
        self.seen: list[tuple[str, Any]] = []

    def note(self, name: str, value: Any) -> None:
        self.seen.append((name, value))

    def decode(self, name: str, tokens: Sequence[Token], *rows: int) -> None:
        batch = fill(self.api, tokens)
        self.note(name, self.api.llama_decode(self.ctx, batch))
        self.api.llama_batch_free(batch)
        self.rows(name, *rows)
        self.spans(name)

    def one(self, name: str, tokens: Sequence[int], *rows: int) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        self.note(name, self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(array, len(tokens))))
        self.rows(name, *rows)
        self.spans(name)

    def rows(self, name: str, *rows: int) -> None:
        for i in rows:
            row = self.api.llama_get_logits_ith(self.ctx, i)
            self.note(f"{name}: row {i}", [float(row[j]) for j in range(N_VOCAB)])

    def spans(self, name: str) -> None:
        low, high = self.api.llama_memory_seq_pos_min, self.api.llama_memory_seq_pos_max
        held = [(low(self.memory, i), high(self.memory, i)) for i in range(N_SEQ)]
        self.note(f"{name}: memory", [list(span) for span in held])


def codes(player: Player) -> None:
    player.decode("two sequences", sequence(0, [5, 6, 7]) + sequence(1, [8, 9]), 2, 4, -1, -2)
    player.one("get_one goes on", [10, 11], -1, 1)
    player.decode("invalid token", sequence(0, [N_VOCAB], 5))
    player.decode("negative token", sequence(0, [-1], 5))
    player.decode("sequence out of range", sequence(N_SEQ, [5]))
    player.decode("a gap before", sequence(0, [5], 6))
    player.decode("a gap within", [(0, 5, 5, True), (0, 5, 7, True)])
    player.decode("going back", sequence(0, [5], 2))
    player.note("nothing", player.api.llama_decode(player.ctx, player.api.llama_batch()))
    player.decode("no row", [(0, 5, 5, False)])
    player.one("filling up", [5] * (N_CTX_SEQ - 6))
    player.one("full", [5])
    player.decode("one of two is full", sequence(1, [5, 6], 2) + sequence(0, [5], N_CTX_SEQ))


def memory(player: Player) -> None:
    api, held = player.api, player.memory
    api.llama_memory_clear(held, True)
    player.decode("begin", sequence(0, [5, 6, 7, 8]))
    player.note("rm a tail", api.llama_memory_seq_rm(held, 0, 2, -1))
    player.decode("after rm", sequence(0, [9], 2), 0)
    api.llama_memory_seq_cp(held, 0, 1, -1, -1)
    player.decode("after cp", sequence(1, [10], 3), 0)
    player.note("rm the begin", api.llama_memory_seq_rm(held, 1, 0, 2))
    player.spans("rm the begin")
    api.llama_memory_seq_add(held, 1, -1, -1, -2)
    player.decode("after add", sequence(1, [11], 2), 0)
    player.decode("going back", sequence(0, [12], 1))
    player.note("rm of all", api.llama_memory_seq_rm(held, -1, -1, -1))
    player.spans("rm of all")


def extended(player: Player) -> None:
    api, ctx = player.api, player.ctx
    batch = api.llama_batch_ext_init(ctx)
    for seq_id, tokens in ((0, [5, 6]), (1, [7])):
        for pos, token in enumerate(tokens):
            i = api.llama_batch_ext_add_token(batch, seq_id, token)
            player.note("add", i)
            player.note("set_pos", api.llama_batch_ext_set_pos(batch, i, ctypes.byref(api.llama_pos(pos))))
        player.note("set_output", api.llama_batch_ext_set_output_logits(batch, i, True))
    player.note("index out of range", api.llama_batch_ext_set_output_logits(batch, 99, True))
    player.note("process", api.llama_process(ctx, api.LLAMA_PROCESS_TYPE_DECODE, batch))
    player.rows("process", 1, 2, -1)
    player.spans("process")
    api.llama_batch_ext_clear(batch)
    player.note("no sequence", api.llama_batch_ext_add_token(batch, N_SEQ, 5))
    player.note("null token", api.llama_batch_ext_add_token(batch, 0, -1))
    api.llama_batch_ext_free(batch)


def embeddings(player: Player) -> None:
    api, ctx = player.api, player.ctx
    api.llama_memory_clear(player.memory, True)
    api.llama_set_embeddings(ctx, True)
    player.decode("with embeddings", sequence(0, [5, 6, 7]), 1, 2)
    for i in (0, 2, -1):
        row = api.llama_get_embeddings_ith(ctx, i)
        player.note(f"embedding {i}", [float(row[j]) for j in range(N_EMBD)])
    api.llama_set_embeddings(ctx, False)


SCENES: dict[str, Callable[[Player], None]] = {
    scene.__name__: scene for scene in (codes, memory, extended, embeddings)
}


def encode(api: Any, ctx: Any) -> int:
    code: int = api.llama_encode(ctx, fill(api, sequence(0, [5, 6, 7])))
    return code


def null_sequence(api: Any, ctx: Any) -> int:
    batch = fill(api, sequence(0, [5, 6, 7]))
    batch.seq_id[1] = ctypes.POINTER(ctypes.c_int32)()
    code: int = api.llama_decode(ctx, batch)
    return code


def no_sequence(api: Any, ctx: Any) -> int:
    batch = fill(api, sequence(0, [5]))
    batch.n_seq_id[0] = 0
    code: int = api.llama_decode(ctx, batch)
    return code


def too_many(api: Any, ctx: Any) -> int:
    code: int = api.llama_decode(ctx, fill(api, sequence(0, [5] * 200) + sequence(1, [5] * (N_BATCH - 199))))
    return code


DEADLY = {call.__name__: call for call in (encode, null_sequence, no_sequence, too_many)}


def play(api: Any, ctx: Any, scene: str) -> list[tuple[str, Any]]:
    """Make the calls of a scene on an empty context."""
    player = Player(api, ctx)
    SCENES[scene](player)
    return player.seen


def main(model_path: str, deadly: str = "") -> None:
    """Make the deadly call of this name; or print what every scene gives, and the original's names."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = N_CTX_SEQ * N_SEQ, N_SEQ, N_BATCH
    params.n_threads = params.n_threads_batch = 1
    params.kv_unified = False  # as in a cell
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())

    def context() -> Any:
        return llama_cpp.llama_init_from_model(model, params)

    if deadly:
        DEADLY[deadly](llama_cpp, context())
    else:
        answers = {scene: play(llama_cpp, context(), scene) for scene in SCENES}
        print(json.dumps({"answers": answers, "names": dir(llama_cpp)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
