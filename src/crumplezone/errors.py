"""Every error that a user of Crumplezone can meet. Each message says what to do next."""

from __future__ import annotations

import numbers
import operator
import re
from typing import Any


def _rebuild(cls: type[CrumplezoneError], args: tuple[Any, ...], state: dict[str, Any]) -> CrumplezoneError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class CrumplezoneError(Exception):
    """Base of all errors of this package. Survives pickling with its attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _shown(value: object) -> str:
    """A stranger's object may have no text: an integer of 5,000 digits, a list in 5,000 lists, any class."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - whatever a foreign __repr__ raises
        return f"<{type(value).__name__}>"


class InputError(CrumplezoneError, ValueError):
    """A value that cannot be accepted.

    Attributes:
        field: What was wrong, as the caller named it (``"tokens[3]"``, ``"line 7"``).
        value: What was given.
        limit: The rule that it broke.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = _shown(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field} is {shown}: {limit}")
        self.field, self.value, self.limit = field, value, limit


def check_integer(
    field: str, value: object, low: int, high: int, why: str = "", *, error: type[InputError] = InputError
) -> None:
    """Raise `InputError` (or a kind of it) unless a value is an integer from ``low`` to ``high``."""
    limit = f"must be from {low} to {high}{why}"
    try:
        # numpy's integers are no int, but know __index__; so does bool, which nobody means here.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise error(field, value, f"must be an integer; {limit}")
    if not low <= number <= high:
        raise error(field, value, limit)


def check_number(field: str, value: object, low: float, high: float) -> None:
    """Raise `InputError` unless a value is a number from ``low`` to ``high``; NaN is none."""
    # numpy's numbers are no float; a huge int cannot be made one.
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not low <= value <= high:  # type: ignore[operator]
        raise InputError(field, value, f"must be a number from {low:g} to {high:g}")


def check_local(field: str, path: object) -> None:
    """Raise `InputError` if a path that is to be written is a URL: it would be a directory with that name."""
    # `Path` takes away one of its two slashes.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(field, str(path), "must be a directory on this machine: upload it afterwards")


def check_texts(field: str, value: object) -> None:
    """Raise `InputError` unless a value can be iterated over, and is no single text."""
    try:
        if not isinstance(value, str | bytes):
            iter(value)  # type: ignore[call-overload]
            return
    except TypeError:
        pass
    raise InputError(field, value, "must be a list of texts, or another iterable of them")


class ModelError(CrumplezoneError, ValueError):
    """A model file that is missing, is not GGUF, or that llama.cpp could not load.

    Attributes:
        path: The model file.
        report: Directory of the crash report, if the loader crashed.
    """

    def __init__(self, path: str, problem: str, report: str | None = None) -> None:
        super().__init__(f"model {path}: {problem}")
        self.path, self.report = path, report


class ContextError(ModelError):
    """A model of which llama.cpp makes no context with these parameters."""


class CellDied(CrumplezoneError):
    """A cell ended before it replied. Inside the package, the ladder catches this.

    Attributes:
        incident: A `crumplezone.sandbox.autopsy.incident.Incident`, whose `of` knows the type that this leaf
            cannot name; None after unpickling.
    """

    def __init__(self, message: str, incident: object = None) -> None:
        super().__init__(message)
        self.incident = incident

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, {"incident": None})


class CellRefused(CrumplezoneError):
    """A cell is alive and answered a request with an error.

    Attributes:
        kind: The exception's class name in the child.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ShortageError(CrumplezoneError):
    """This process cannot have the memory, or the descriptor, that a job needs just now. Nothing was lost."""

    def __init__(self, needed: str, problem: object) -> None:
        super().__init__(f"{needed} could not be had ({problem}): free memory or descriptors, and try again")


class QueueFullError(CrumplezoneError):
    """A request that finds no room among those that wait. Nothing was begun.

    Attributes:
        waiting: How many jobs wait.
        size: The most that may (`Decoder(queue_size=...)`).
    """

    def __init__(self, waiting: int, size: int, more: int = 1) -> None:
        super().__init__(
            f"{waiting} jobs wait, and queue_size is {size}: there is no room for {more} more. Try again "
            "when some are done, or make the decoder with a larger queue_size"
        )
        self.waiting, self.size = waiting, size


class SequenceError(CrumplezoneError):
    """One sequence that no rung of the ladder could decode; the others of its batch were returned.

    Attributes:
        seq_id: The sequence (for `Decoder.generate`, the prompt's index).
        report: Directory of the crash report, if it crashed.
        rc: What llama.cpp returned, if that was how the last rung failed.
    """

    def __init__(self, seq_id: int, problem: str, report: str | None = None, rc: int | None = None) -> None:
        where = f"; report: {report}" if report else ""
        super().__init__(f"sequence {seq_id} failed alone: {problem}{where}")
        self.seq_id, self.report, self.rc = seq_id, report, rc


class BatchError(CrumplezoneError):
    """The native rung failed and `safe_fallback` is off.

    Attributes:
        report: Directory of the crash report, if it crashed.
        rc: What llama.cpp returned, if it did not crash.
    """

    def __init__(self, problem: str, report: str | None = None, rc: int | None = None) -> None:
        where = f"; report: {report}" if report else ""
        super().__init__(
            f"native batch failed: {problem}{where}. Pass safe_fallback=True to get the results."
        )
        self.report, self.rc = report, rc


class MemoryLostError(CrumplezoneError):
    """A decoder's memory that no new cell could be given after a crash. It is empty now."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the memory could not be given to a new cell ({problem}); it is empty now: decode from 0 again"
        )


class NotShownError(CrumplezoneError):
    """A recorded crash that did not happen again."""


class UsageError(CrumplezoneError):
    """Something used where it cannot work: closed, busy, in another process, or in one that is patched."""


class ReportError(CrumplezoneError):
    """A crash report that cannot be found, read or written."""


class BatchFullError(InputError):
    """More tokens than a batch was made for."""


class TokenError(InputError):
    """A token id, or an embedding in its place, that cannot be accepted."""


class SequenceIdError(InputError):
    """A sequence id that is out of range, or that stands where it may not."""


class PositionError(InputError):
    """A position that is out of range, or not the next one of its sequence."""
