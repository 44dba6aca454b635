"""Random batches, good and bad, through strict validation into real cells: does one ever kill its cell?

`make soak`. What is accepted must decode without a crash, with finite logits; what is refused must leave
the memory as it was. Sequences are removed, copied and kept in between, so that batches meet every memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from crumplezone import Batch, Decoder, Rung, embedded_model
from crumplezone.errors import CrumplezoneError, InputError

N_SEQ, N_CTX_SEQ = 4, 256
Random = np.random.Generator


def random_batch(random: Random, decoder: Decoder) -> Batch:
    """Mostly valid; each kind of mistake now and then."""
    batch = Batch(64, 8)
    follows = {seq_id: decoder.memory.pos_max(seq_id) + 1 for seq_id in range(N_SEQ)}
    for seq_id in random.permutation(N_SEQ + (random.random() < 0.01))[
        : random.integers(0, N_SEQ + 1)
    ].tolist():
        for _ in range(int(random.integers(1, 6))):
            token = int(random.integers(-2, decoder.info.n_vocab + 2) if random.random() < 0.01 else 5)
            position = None
            if random.random() < 0.05:
                position = follows.get(seq_id, 0) + int(random.integers(-2, 3))
            index = batch.add_token(seq_id, token, position, output=bool(random.random() < 0.3))
            follows[seq_id] = follows.get(seq_id, 0) + 1
            if random.random() < 0.005:
                batch.add_seq(index, int(random.integers(0, N_SEQ)))
            if random.random() < 0.002:
                batch.set_pos(index, int(random.choice([-1, -7, 2**31 - 1, 10**6])))
    return batch


def churn(random: Random, decoder: Decoder) -> None:
    """Change the memory."""
    memory, seq_id = decoder.memory, int(random.integers(0, N_SEQ))
    last = memory.pos_max(seq_id)
    match int(random.integers(0, 6)):
        case 0:
            memory.remove(seq_id)
        case 1 if last > 0:
            memory.remove(seq_id, int(random.integers(0, last + 1)))
        case 2:
            memory.copy(seq_id, (seq_id + 1) % N_SEQ)
        case 3 if random.random() < 0.1:
            memory.keep(seq_id)
        case 4 if random.random() < 0.1:
            memory.clear()
        case _ if last > N_CTX_SEQ // 2:
            memory.remove(seq_id)


def one(random: Random, decoder: Decoder) -> str:
    """Try one batch; what came of it."""
    batch = random_batch(random, decoder)
    before = decoder.memory.next_positions
    try:
        result = decoder.decode(batch)
    except InputError:
        return "refused" if (decoder.memory.next_positions == before).all() else "CHANGED"
    rungs = {result.rung(seq_id) for seq_id in result.seq_ids}
    return "native" if rungs == {Rung.NATIVE} else "no slot" if not result.reports else "CRASHED"


def main() -> None:
    """Run them and exit 1 if a cell died."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="Default: SmolLM2.")
    arguments = parser.parse_args()
    random, seen, start = np.random.default_rng(arguments.seed), Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as reports:
        options = {"n_ctx": N_CTX_SEQ * N_SEQ, "n_seq_max": N_SEQ, "n_threads": 1}
        with Decoder(arguments.model or embedded_model(), **options, reports=reports) as decoder:  # type: ignore[arg-type]
            pid = decoder.pid
            for number in range(arguments.batches):
                if number % 5 == 0:
                    churn(random, decoder)
                try:
                    seen[one(random, decoder)] += 1
                except CrumplezoneError as error:
                    print(f"batch {number}: {type(error).__name__}: {error}")
                    seen["error"] += 1
            died = decoder.pid != pid
    print(f"{arguments.batches} batches, {time.perf_counter() - start:.0f} s: {dict(seen)}; died: {died}")
    sys.exit(died or bool(seen["CRASHED"] + seen["CHANGED"] + seen["error"]))


if __name__ == "__main__":
    main()
