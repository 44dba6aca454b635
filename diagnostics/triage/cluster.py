"""Near-duplicates: signatures whose stacks are so alike that they are probably one bug.

The similarity is that of ReBucket (Dang et al., "ReBucket: A Method for Clustering Duplicate Crash Reports
Based on Call Stack Similarity", ICSE 2012): two frames that match count less the deeper they lie and the more
their depths differ. Both coefficients and the threshold are those of CASR (libcasr, stacktrace.rs).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_FROM_TOP = 0.04
_SHIFTED = 0.13
_THRESHOLD = 0.3  # of the distance, which is 1 - similarity

_DEPTH = 64  # frames of a stack that are compared
_DISTINCT_MAX = 256  # stacks of one class and top frame that are compared: work grows with the square

_PADDING = -1  # the code of no frame
_INDEX = np.arange(1, _DEPTH + 1)
_GAIN = np.exp(
    -_FROM_TOP * np.minimum.outer(_INDEX, _INDEX) - _SHIFTED * np.abs(np.subtract.outer(_INDEX, _INDEX))
)
"""What the match of frame i of one stack and frame j of the other is worth."""
_IDEAL = np.cumsum(np.diag(_GAIN))
"""What n matches in equal places are worth."""


@dataclass(frozen=True)
class Stack:
    """One stack to be clustered.

    Attributes:
        fault_class: As in the signature: "SIGSEGV", "abort", "hang".
        frames: Normalised, innermost first, as `reports.signature.frames` makes them.
    """

    fault_class: str
    frames: tuple[str, ...]


def clusters(items: Sequence[Stack]) -> list[list[int]]:
    """Part stacks into clusters of near-duplicates, by complete linkage.

    Of two stacks, only what both have is compared, so one that was cut short is like the whole one; the
    innermost 64 frames count. No two stacks of a cluster are 0.3 or more apart, and none differ in class or
    innermost frame. Where more than 256 different stacks share these, the rarest are not compared: each stays
    by itself.

    Returns:
        Indices into `items`: each once, ascending within a cluster; clusters ordered by their first.
    """
    buckets: defaultdict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = defaultdict(dict)
    for index, item in enumerate(items):
        frames = item.frames[:_DEPTH]
        buckets[item.fault_class, *frames[:1]].setdefault(frames, []).append(index)
    found = [cluster for bucket in buckets.values() for cluster in _linked(bucket)]
    return sorted(sorted(cluster) for cluster in found)


def _linked(bucket: dict[tuple[str, ...], list[int]]) -> list[list[int]]:
    # This order makes the result independent of the order of the items.
    stacks = sorted(bucket, key=lambda frames: (-len(bucket[frames]), frames))
    members = [list(bucket[frames]) for frames in stacks]
    compared = stacks[:_DISTINCT_MAX]
    if len(compared) < 2:
        return members
    distance = _distances(compared)
    while True:
        one, other = np.unravel_index(np.argmin(distance), distance.shape)
        if distance[one, other] >= _THRESHOLD:
            return [cluster for cluster in members if cluster]
        members[one] += members[other]
        members[other] = []
        # Complete linkage: two clusters are as far apart as their farthest members.
        distance[one] = distance[:, one] = np.maximum(distance[one], distance[other])
        distance[other] = distance[:, other] = distance[one, one] = np.inf


def _distances(stacks: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
    """The distances of all pairs, float64 (n, n); infinite on the diagonal."""
    codes = _codes(stacks)
    distance = np.full((len(stacks), len(stacks)), np.inf)
    for index in range(len(stacks) - 1):
        row = 1 - _similarities(codes[:, index], codes[:, index + 1 :])
        distance[index, index + 1 :] = distance[index + 1 :, index] = row
    return distance


def _codes(stacks: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Frames as numbers, a stack per column, int64 (64, n)."""
    numbers: dict[str, int] = {}
    codes = np.full((_DEPTH, len(stacks)), _PADDING)
    for column, stack in enumerate(stacks):
        for place, frame in enumerate(stack[:_DEPTH]):
            codes[place, column] = numbers.setdefault(frame, len(numbers))
    return codes


def _similarities(one: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The similarity of one stack, int64 (64,), to each of others, int64 (64, n); none of them empty."""
    length = np.count_nonzero(one != _PADDING)
    # best[j]: the worth of the best matches in order, of the frames so far with the first j of each other.
    best = np.zeros((_DEPTH + 1, others.shape[1]))
    for code, gain in zip(one[:length], _GAIN[:length], strict=True):
        matched = others == code
        if matched.any():
            np.maximum(best[1:], best[:-1] + matched * gain[:, np.newaxis], out=best[1:])
            np.maximum.accumulate(best, axis=0, out=best)
    shorter = np.minimum(length, np.count_nonzero(others != _PADDING, axis=0))
    worth: npt.NDArray[np.float64] = best[-1] / _IDEAL[shorter - 1]
    return worth.clip(max=1.0)
