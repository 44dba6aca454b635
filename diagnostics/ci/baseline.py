"""The baseline of diagnostic runs: the failures that are known, and what a run shows against them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from crumplezone.errors import InputError
from crumplezone.reports.analysis.same import canonical, is_same
from crumplezone.reports.records.report import Signature
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News
from crumplezone.reports.store import files

SCHEMA_VERSION = 2
MAX_BYTES = 16 << 20

_Failure = Literal["mismatch", "crash", "hang", "oom", "refused"]


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A signature that is expected, and the cases it was seen in."""

    title: str
    cases: list[str]
    fault_class: str = ""  # of the signature, like what follows; a baseline of schema 1 has its id alone
    key: list[str] = []
    place: str = ""

    def signature(self, name: str) -> Signature:
        """The signature of this id."""
        return Signature(name, self.fault_class, self.key, self.title, place=self.place)


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is expected to fail.

    Attributes:
        signatures: By id. A known crash is known in whatever case it comes, and however little of its stack
            could be read.
        cases: How a case ends that fails in another way, by its id. Where a hang or an OOM was when it was
            killed is chance: its signature may be another every time.
    """

    signatures: dict[str, Known] = {}
    cases: dict[str, _Failure] = {}
    schema_version: int = SCHEMA_VERSION

    def judge(self, case: CaseRecord) -> News:
        """What the ending of a case is against this baseline."""
        if case.ending is Ending.ERROR:
            return News.UNKNOWN
        if case.ending is Ending.PASS:
            listed = any(case.id in known.cases for known in self.signatures.values())
            return News.FIXED if listed or case.id in self.cases else News.EXPECTED
        if signature := _crash(case):
            return News.KNOWN if self._matches(signature) else News.NEW
        return News.KNOWN if self.cases.get(case.id) == case.ending.value else News.NEW

    def fixed(self, cases: Iterable[CaseRecord]) -> list[Fixed]:
        """What is gone: signatures that no case has, where all that had them passed; cases that passed."""
        passed, met = set[str](), set[str]()
        for case in cases:
            if case.ending is Ending.PASS:
                passed.add(case.id)
            if signature := _crash(case):
                met |= self._matches(signature)
        gone = [
            Fixed(signature, known.title, known.cases)
            for signature, known in self.signatures.items()
            if signature not in met and known.cases and passed.issuperset(known.cases)
        ]
        return gone + [Fixed("", ending, [name]) for name, ending in self.cases.items() if name in passed]

    def updated(self, cases: Sequence[CaseRecord]) -> Baseline:
        """A baseline that expects what these cases did; of all others it expects what this one does."""
        told = [case for case in cases if case.ending is not Ending.ERROR]
        renewed = {case.id for case in told}
        heads = canonical([*self._known(), *filter(None, map(_crash, told))])
        seen: dict[str, tuple[Signature, set[str]]] = {}

        def expect(signature: Signature, names: Iterable[str]) -> None:
            head = heads.get(signature.id, signature)
            seen.setdefault(head.id, (head, set()))[1].update(names)

        failures = {case: ending for case, ending in self.cases.items() if case not in renewed}
        for case in told:
            if crash := _crash(case):
                expect(crash, [case.id])
            elif case.ending is not Ending.PASS:
                failures[case.id] = msgspec.convert(case.ending.value, _Failure)
        for signature in self._known():  # after the cases, which tell more of a signature than schema 1 did
            expect(signature, set(self.signatures[signature.id].cases) - renewed)
        signatures = {
            name: Known(signed.title, sorted(ids), signed.fault_class, signed.key, signed.place)
            for name, (signed, ids) in sorted(seen.items())
            if ids
        }
        return Baseline(signatures, dict(sorted(failures.items())))

    def resolved(self, cases: Sequence[CaseRecord]) -> list[CaseRecord]:
        """The cases, each with the signature that its crash is known by, here or among themselves."""
        heads = canonical([*self._known(), *(case.signature for case in cases if case.signature)])
        return [
            msgspec.structs.replace(case, signature=heads[case.signature.id])
            if case.signature and case.signature.id in heads
            else case
            for case in cases
        ]

    def _known(self) -> list[Signature]:
        return [known.signature(name) for name, known in self.signatures.items()]

    def _matches(self, signature: Signature) -> set[str]:
        """The ids of what is known that can be the same crash."""
        return {known.id for known in self._known() if is_same(signature, known)}


def _crash(case: CaseRecord) -> Signature | None:
    """What a crash is known by."""
    return case.signature if case.ending is Ending.CRASH else None


class _Version(msgspec.Struct):
    schema_version: int


def read(path: Path, *, missing_ok: bool = False) -> Baseline:
    """Read a baseline; an empty one if there is no file, and that is fine.

    Raises:
        InputError: It cannot be read, or is no baseline.
    """
    try:
        data = files.unmarked(files.read(Path(os.path.realpath(path)), MAX_BYTES)[0])
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            limit = (
                f"is of a newer crumplezone (schema {version}, here {SCHEMA_VERSION}): upgrade crumplezone"
            )
            raise InputError("--baseline", str(path), limit)
        return msgspec.json.decode(data, type=Baseline)
    except FileNotFoundError as error:
        if missing_ok:
            return Baseline()
        raise InputError("--baseline", str(path), "does not exist; --update-baseline writes it") from error
    except OSError as error:
        raise InputError("--baseline", str(path), f"cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("--baseline", str(path), f"is no baseline: {error}") from error


def check_writable(path: Path) -> None:
    """Find out before a run that its baseline could not be written after it.

    Raises:
        InputError: The directory is missing, or is not to be written.
    """
    directory = Path(os.path.realpath(path)).parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError("--baseline", str(path), f"cannot be written: {directory} is no directory of yours")


def write(path: Path, baseline: Baseline) -> None:
    """Write a baseline by one rename.

    Raises:
        InputError: It cannot be written; what was there is untouched.
    """
    path = Path(os.path.realpath(path))
    try:
        data = msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n"
        files.replace(path.parent, path.name, data, mode=0o666)
    except OSError as error:
        raise InputError("--baseline", str(path), f"cannot be written: {error.strerror}") from error
