"""When two signatures are of one crash: one of them may know less of it than the other.

A signature is *partial* where its stack could not be followed up to three names (its key ends with "..."),
or where nothing but a place without a name was known (``libllama.so+0x22daa0``). It can belong to a whole one
of the same fault class: to one whose key begins so, or that was seen at the same place of the same build. Two
whole ones never belong together, unless they are equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from crumplezone.reports.records.report import Signature

CUT = "..."
"""The last part of the key of a stack that could not be followed up to three names."""

_CANDIDATES_MAX = 256  # compared with one partial signature: more are as good as none


def is_partial(signature: Signature) -> bool:
    """Whether more could be known of a crash than its signature does."""
    return signature.key[-1:] == [CUT] or _is_place(signature)


def is_same(one: Signature, other: Signature) -> bool:
    """Whether two signatures are of one crash, as far as can be told."""
    return one.id == other.id or _belongs(one, other) or _belongs(other, one)


def only_match(signature: Signature, known: Iterable[Signature]) -> Signature | None:
    """What is known of a crash: a signature equal to its own, else the only one that is of the same crash."""
    found = {each.id: each for each in known if is_same(signature, each)}
    if len(found) == 1:
        return next(iter(found.values()))
    return found.get(signature.id)


def canonical(seen: Iterable[Signature]) -> dict[str, Signature]:
    """Of each partial signature, by its id, the fullest that it belongs to.

    One that could belong to several different ones is not in it: it stays by itself.
    """
    known = {(each.id, each.place): each for each in seen}
    partial: defaultdict[str, list[Signature]] = defaultdict(list)  # one, as seen at several places
    for each in known.values():
        if is_partial(each):
            partial[each.id].append(each)
    near = _Near(known.values() if partial else ())
    heads: dict[str, Signature] = {}
    # The fuller ones first, so that it is known what they belong to themselves.
    for same in sorted(
        partial.values(), key=lambda same: (_is_place(same[0]), -len(same[0].key), same[0].id)
    ):
        fuller = [near.fuller(each) for each in same]
        found = {head.id: head for each in fuller for head in (heads.get(one.id, one) for one in each)}
        if len(found) == 1 and all(fuller):
            heads[same[0].id] = next(iter(found.values()))
    return heads


class _Near:
    """Signatures by what partial ones can be told to belong to them by."""

    def __init__(self, known: Iterable[Signature]) -> None:
        self._at: defaultdict[tuple[str, str], list[Signature]] = defaultdict(list)
        for each in known:
            for at in {each.place, *each.key[:1]}:
                self._at[each.fault_class, at].append(each)

    def fuller(self, partial: Signature) -> list[Signature]:
        """Those that one belongs to; none if there are too many to look at."""
        at = partial.place if _is_place(partial) else partial.key[0]
        near = self._at[partial.fault_class, at]
        return [each for each in near if _belongs(partial, each)] if len(near) <= _CANDIDATES_MAX else []


def _belongs(partial: Signature, other: Signature) -> bool:
    """Whether the other is of the same crash, and knows more of it."""
    if partial.id == other.id or partial.fault_class != other.fault_class:
        return False
    if _is_place(partial):
        return partial.place == other.place and not _is_place(other)
    known = partial.key[:-1]
    return partial.key[-1:] == [CUT] and bool(known) and other.key[: len(known)] == known


def _is_place(signature: Signature) -> bool:
    """Whether nothing but a place is known; the build belongs to it, so that it names one instruction."""
    return len(signature.key) == 1 and signature.place.startswith(f"{signature.key[0]} ")
