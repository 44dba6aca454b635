"""What `minimise` tries: a batch with less in it, in a context with less room."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from crumplezone.reports.records.report import BatchRecord
from crumplezone.workers.protocol.config import CellConfig

_replace = msgspec.structs.replace


@dataclass(frozen=True)
class Candidate:
    """A batch, and a context to send it to."""

    config: CellConfig
    batch: BatchRecord

    @property
    def key(self) -> bytes:
        """Equal for equal ones."""
        return hashlib.sha256(msgspec.msgpack.encode((self.config, self.batch))).digest()

    @property
    def context(self) -> dict[str, Any]:
        """The parameters, as a report has them."""
        return self.config.parameters()

    @property
    def owners(self) -> list[int]:
        """The sequence of each token."""
        if self.batch.generating:
            return [each.seq_id for each in self.batch.generating for _ in each.tokens]
        return self.batch.seq_ids

    @property
    def seq_ids(self) -> list[int]:
        """Distinct, in their order."""
        return list(dict.fromkeys(self.owners))

    @property
    def all_ids(self) -> list[int]:
        """Those, and the ones that share their tokens or are held; -1 stands for none."""
        shared = [seq_id for seq_ids in self.batch.shared.values() for seq_id in seq_ids]
        every = dict.fromkeys([*self.owners, *shared, *(each.seq_id for each in self.batch.held)])
        return [seq_id for seq_id in every if seq_id != -1]

    @property
    def n_tokens(self) -> int:
        """Of the batch itself, without what is held."""
        return len(self.owners)

    def only(self, kept: list[int]) -> Candidate | None:
        """What is left with these tokens alone, by index."""
        if not kept:
            return None
        keep = _only_generating if self.batch.generating else _only_rows
        return Candidate(self.config, keep(self.batch, set(kept)))

    def merged(self) -> Candidate:
        """With what was held in front of the batch."""
        rows = [
            (held.seq_id, token, position)
            for held in self.batch.held
            for token, position in zip(held.tokens, held.positions, strict=True)
        ]
        seq_ids, tokens, positions = (list(column) for column in zip(*rows, strict=True))
        batch, n = self.batch, len(rows)
        return self.with_batch(
            tokens=tokens + batch.tokens,
            positions=positions + batch.positions,
            seq_ids=seq_ids + batch.seq_ids,
            outputs=[False] * n + batch.outputs,
            held=[],
            **moved(batch, {i: n + i for i in range(len(batch.tokens))}),
        )

    def forgotten(self) -> Candidate:
        """Without what was held; the sequences begin at 0."""
        ends = {held.seq_id: max(held.positions) + 1 for held in self.batch.held}
        rows = zip(self.batch.positions, self.batch.seq_ids, strict=True)
        positions = [max(position - ends.get(seq_id, 0), -1) for position, seq_id in rows]
        return self.with_batch(positions=positions, held=[])

    def renumbered(self) -> Candidate:
        """With sequences from 0 up, in their order."""
        ids = {-1: -1} | {seq_id: i for i, seq_id in enumerate(self.all_ids)}
        batch = self.batch
        return self.with_batch(
            seq_ids=[ids[seq_id] for seq_id in batch.seq_ids],
            shared={i: [ids[seq_id] for seq_id in shared] for i, shared in batch.shared.items()},
            held=[_replace(each, seq_id=ids[each.seq_id]) for each in batch.held],
            generating=[_replace(each, seq_id=ids[each.seq_id]) for each in batch.generating],
        )

    def with_batch(self, **fields: Any) -> Candidate:
        """The same with another batch."""
        return Candidate(self.config, _replace(self.batch, **fields))


def _only_generating(batch: BatchRecord, kept: set[int]) -> BatchRecord:
    left, begin = [], 0
    for each in batch.generating:
        tokens = [token for i, token in enumerate(each.tokens, begin) if i in kept]
        n_prompt = sum(i in kept for i in range(begin, begin + each.n_prompt))
        begin += len(each.tokens)
        if tokens:
            left.append(_replace(each, tokens=tokens, n_prompt=n_prompt))
    # The last native call of the original is none of this one's.
    return _replace(batch, tokens=[], positions=[], seq_ids=[], outputs=[], generating=left)


def _only_rows(batch: BatchRecord, kept: set[int]) -> BatchRecord:
    """Positions stay without gaps, and a sequence that had an output keeps one. Odd positions stay odd."""
    positions, outputs = list(batch.positions), list(batch.outputs)
    sequences: dict[int, list[int]] = {}
    for i, seq_id in enumerate(batch.seq_ids):
        sequences.setdefault(seq_id, []).append(i)
    for rows in sequences.values():
        left = [i for i in rows if i in kept]
        first = batch.positions[rows[0]]
        if [batch.positions[i] for i in rows] == list(range(first, first + len(rows))):
            for position, i in enumerate(left, first):
                positions[i] = position
        if left and any(outputs[i] for i in rows) and not any(outputs[i] for i in left):
            outputs[left[-1]] = True
    order = sorted(kept)
    return _replace(
        batch,
        tokens=[batch.tokens[i] for i in order],
        positions=[positions[i] for i in order],
        seq_ids=[batch.seq_ids[i] for i in order],
        outputs=[outputs[i] for i in order],
        **moved(batch, {i: place for place, i in enumerate(order)}),
    )


def moved(batch: BatchRecord, places: dict[int, int]) -> dict[str, Any]:
    """What a batch says of single tokens, with these at other places, and those not among them gone."""
    names = {f"seq_id[{i}]": f"seq_id[{place}]" for i, place in places.items()}
    return {
        "shared": {str(places[int(i)]): ids for i, ids in batch.shared.items() if int(i) in places},
        "nulls": [names.get(name, name) for name in batch.nulls if name in names or "[" not in name],
    }
