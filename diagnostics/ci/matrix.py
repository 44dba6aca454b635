"""The matrix of a diagnostic run: from a TOML file, or the built-in one, to cases."""

from __future__ import annotations

import fnmatch
import itertools
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from crumplezone.diagnostics.ci.case import Case
from crumplezone.errors import InputError
from crumplezone.reports.records.run import Shape
from crumplezone.reports.store import files

DEFAULT = """\
deadline = 60  # seconds for each native call

# The reference matrix.
[[cases]]
path = ["decode", "process", "encode", "safe"]
tokens = [1, 10]

[[cases]]
path = ["decode", "process", "encode", "safe"]
sequences = 3
tokens = 10

[[cases]]
path = ["decode", "process", "encode", "safe"]
sequences = 16
tokens = 512

# From here on, one thing at a time is not as usual.
[[cases]]
sequences = 3
tokens = 10
kv_unified = true

[[cases]]
sequences = 3
tokens = 10
flash_attn = ["on", "off"]

[[cases]]
sequences = 3
tokens = 10
type_k = "q8_0"
type_v = "q8_0"
flash_attn = "on"  # a quantised V needs it

[[cases]]
sequences = 3
tokens = 10
n_threads = 1

[[cases]]
sequences = 16
tokens = 512
n_ubatch = 32

[[cases]]
path = "embed"
sequences = 2  # with 3, which 2048 is no multiple of, llama.cpp aborts
tokens = 10
pooling = "mean"
"""
"""The built-in matrix, in the format of `--matrix`."""

MAX_BYTES = 1 << 20
CASES_MAX = 10_000
_MAX_NUMBER = 2**20  # what is too much for a model or a context is refused case by case
_MAX_PROBLEMS = 20

_SHARD = re.compile(r"([0-9]{1,4})/([0-9]{1,4})")
_NAMED_ALWAYS = ("path", "sequences", "tokens")


def _types() -> dict[str, Any]:
    """The type of each key of a case, with its bounds."""
    number = Annotated[int, msgspec.Meta(ge=1, le=_MAX_NUMBER)]
    return {name: number if kind is int else kind for name, kind in get_type_hints(Shape).items()}


_KEYS: dict[str, Any] = {
    "deadline": Annotated[float, msgspec.Meta(gt=0, le=3600)],
    "memory_mib": Annotated[int, msgspec.Meta(ge=1, le=_MAX_NUMBER * 16)],
    "cases": Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)],
}
_SHAPE_KEYS = _types()


@dataclass(frozen=True)
class Matrix:
    """What is asked of each model.

    Attributes:
        shapes: Without duplicates, in the order of the file.
        deadline: Seconds for each native call, and for the start of each cell.
        memory: Bytes of resident memory of one cell, or None: what the machine has.
    """

    shapes: list[Shape]
    deadline: float = 60.0
    memory: int | None = None


def default() -> Matrix:
    """The built-in matrix: some two minutes on two cores with the embedded model, at most."""
    return _parse("the built-in matrix", DEFAULT)


def read(path: Path) -> Matrix:
    """Read a matrix from a TOML file.

    Raises:
        InputError: It cannot be read, or is no matrix; says everything that is wrong with it.
    """
    try:
        text = files.unmarked(files.read(Path(os.path.realpath(path)), MAX_BYTES)[0]).decode()
    except OSError as error:
        raise InputError("--matrix", str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError("--matrix", str(path), f"must be UTF-8 text ({error})") from error
    return _parse(str(path), text)


def _parse(name: str, text: str) -> Matrix:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError names line and column
        raise InputError("--matrix", name, f"is not TOML: {error}") from error
    problems: list[str] = []
    values = {key: value for key, (value,) in _checked(table, _KEYS, "", problems, lists=False)}
    shapes: dict[Shape, None] = {}  # a set that keeps its order
    for place, case in enumerate(values.get("cases", []), 1):
        shapes |= dict.fromkeys(_product(case, f"cases[{place}]", problems, CASES_MAX - len(shapes)))
    if "cases" not in table:
        problems.append("there is no [[cases]]: give at least one")
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise InputError("--matrix", name, "; ".join([*problems[:_MAX_PROBLEMS], *more]))
    memory = values.get("memory_mib")
    return Matrix(list(shapes), values.get("deadline", 60.0), memory and memory << 20)


def _checked(
    table: Mapping[str, Any], keys: Mapping[str, Any], where: str, problems: list[str], *, lists: bool
) -> Iterator[tuple[str, list[Any]]]:
    """Each key with its values, converted; what is wrong with them goes to the problems."""
    for key, given in table.items():
        if key not in keys:
            problems.append(f"{where}{key:.60} is no key (known are {', '.join(keys)})")
            continue
        values = given if lists and isinstance(given, list) else [given]
        try:
            converted = [msgspec.convert(value, keys[key]) for value in values]
        except msgspec.ValidationError as error:
            known = get_args(keys[key]) if get_origin(keys[key]) is Literal else ()
            limit = f"must be {', '.join(known)}" if known else error
            problems.append(f"{where}{key} is {_shown(given)}: {limit}")
            continue
        if not converted:
            problems.append(f"{where}{key} is empty: give a value or a list of them")
        else:
            yield key, converted


def _shown(value: object) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no number of more than 4,300 digits, though it reads them as hex
        return "a number of thousands of digits"


def _product(case: dict[str, Any], where: str, problems: list[str], room: int) -> Iterator[Shape]:
    """Every combination of the values of one table."""
    axes = dict(_checked(case, _SHAPE_KEYS, f"{where}.", problems, lists=True))
    count = math.prod(map(len, axes.values()))
    if count > room:
        problems.append(f"{where} makes {count:,} cases: a matrix has at most {CASES_MAX:,}")
        return
    for values in itertools.product(*axes.values()):
        yield Shape(**dict(zip(axes, values, strict=True)))


def plan(matrix: Matrix, models: Sequence[Path]) -> list[Case]:
    """All cases of a run.

    Args:
        matrix: What is asked of each model.
        models: A model given twice counts once.

    Raises:
        InputError: Two models cannot be told apart by their names, or one cannot be named.
    """
    named: dict[str, Path] = {}
    for model in models:
        path = model.absolute()
        if named.setdefault(path.stem, path) != path:
            raise InputError("--model", str(path), f"has the name of {named[path.stem]}: rename one of them")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise InputError("--model", ascii(str(path)), "has a name that is not UTF-8; rename it") from None
    return [
        Case(case_id(name, shape), path, shape, matrix.deadline, matrix.memory)
        for name, path in named.items()
        for shape in matrix.shapes
    ]


def case_id(model: str, shape: Shape) -> str:
    """What a case is called in every run: ``"SmolLM2-135M-Q4_1 decode 3x10 n_threads=1"``."""
    given = msgspec.structs.asdict(shape)
    usual = msgspec.structs.asdict(Shape())
    unusual = [
        f"{name}={str(value).lower()}"
        for name, value in given.items()
        if name not in _NAMED_ALWAYS and value != usual[name]
    ]
    return " ".join([model, shape.path, f"{shape.sequences}x{shape.tokens}", *unusual])


def choose(cases: Sequence[Case], only: str = "", shard: str = "") -> list[Case]:
    """Those of the cases that this run is to do.

    Args:
        cases: All.
        only: A pattern that is found anywhere in the ids, with ``*``, ``?`` and ``[...]`` as in a shell.
        shard: ``"2/4"``: every fourth of those, from the second on.

    Raises:
        InputError: No case is called so, or there is no such shard.
    """
    chosen = [case for case in cases if fnmatch.fnmatchcase(case.id, f"*{only}*")]
    if not chosen:
        raise InputError("--only", only, f"is found in none of {len(cases)} cases, such as {cases[0].id!r}")
    if not shard:
        return chosen
    found = _SHARD.fullmatch(shard)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise InputError("--shard", shard, "must be i/n, from 1/n to n/n")
    return chosen[number - 1 :: count]
