"""HTML that no string can break out of: only `tag` makes markup, and what is not markup is escaped.

Beyond what HTML itself needs, control and direction characters are shown as escapes: they could reorder what
people read. Strings are cut, so that no field of a report can make the page large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime

from markupsafe import Markup, escape

from crumplezone.reports.printable import printable

_MAX_TEXT = 240
_MAX_ATTRIBUTE = 1 << 16  # the data of a path; strings of reports are cut before they come here

Child = str | Markup
Attribute = str | int | bool | None

EMPTY = Markup()
_AFTER_COLONS = Markup("::<wbr>")
_AFTER_UNDERSCORE = Markup("_<wbr>")


def text(value: str, limit: int = _MAX_TEXT) -> Markup:
    """A string of a report: at most so many characters, printable, escaped."""
    shown = printable(value[: limit + 1])
    return escape(shown if len(shown) <= limit else shown[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}")


def symbol(value: str, limit: int = _MAX_TEXT) -> Markup:
    """As `text`, with places where a long C++ name may be broken."""
    return text(value, limit).replace("::", _AFTER_COLONS).replace("_", _AFTER_UNDERSCORE)


def tag(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: Of the element; ours, never a string of a report.
        children: `Markup` is taken as it is, other strings become `text`.
        attributes: ``class_`` stands for class, ``data_find`` for data-find. True has no value, False and
            None are left out.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(f"<{name}{given}>{join(children)}</{name}>")  # noqa: S704 - each part is escaped, or ours


def join(children: Iterable[Child]) -> Markup:
    """Several children in one; see `tag`."""
    escaped = "".join(child if isinstance(child, Markup) else text(child) for child in children)
    return Markup(escaped)  # noqa: S704 - as it says


def fold(title: Child, *children: Child, **attributes: Attribute) -> Markup:
    """What is folded away behind its title; empty without children."""
    body = join(children)
    return tag("details", tag("summary", title), body, **attributes) if body else EMPTY


def lines(shown: Iterable[str], limit: int = 16_384, *, tail: bool = False) -> Markup:
    """Preformatted lines with at most so many characters: the first ones, or of a tail the last ones."""
    given = list(shown)
    kept: list[Markup] = []
    room = limit
    for line in reversed(given) if tail else given:
        if room <= 0:
            kept.append(escape("\N{HORIZONTAL ELLIPSIS} cut here: report.json has all of it"))
            break
        kept.append(text(line, room))
        room -= len(line) + 1
    return tag("pre", Markup("\n").join(kept[::-1] if tail else kept)) if kept else EMPTY


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """A list of names and values, without those that are not known."""
    known = [(name, value) for name, value in pairs if value]
    rows = (tag("div", tag("dt", name), tag("dd", value)) for name, value in known)
    return tag("dl", *rows, class_="facts") if known else EMPTY


def strip(columns: int, height: int, paths: Iterable[tuple[str, str]], label: str, width: int = 0) -> Markup:
    """A row of a picture.

    Args:
        columns: Units from left to right. They are stretched to the room there is.
        height: Units from top to bottom.
        paths: Class and data of each; one without data is left out.
        label: The picture in words.
        width: Pixels that it wants; 0: all there are.
    """
    drawn = (tag("path", class_=kind, d=data) for kind, data in paths if data)
    return tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {columns} {height}",
        preserveAspectRatio="none",
        width=width or None,
        role="img",
        aria_label=text(label),
    )


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle, as path data."""
    return f"M{x:.6g} {y:.6g}h{width:.6g}v{height:.6g}h-{width:.6g}z"


def time_text(time: datetime, *, seconds: bool = False) -> str:
    """A time as the page shows it: "2026-11-21 06:04Z"."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M{':%S' if seconds else ''}}Z"


def duration(ms: float) -> str:
    """Milliseconds for people: "8 µs", "0.3 ms", "42 ms", "1.8 s", "3 min"."""
    if not math.isfinite(ms):
        return "?"
    if 0 < ms < 0.1:
        return f"{1000 * ms:.0f} µs"
    if ms < 10:
        return f"{ms:.1f} ms"
    if ms < 1000:
        return f"{ms:.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 120_000 else f"{ms / 60_000:,.0f} min"


def mebibytes(size: int) -> str:
    """Bytes for people: "342 MiB"."""
    return f"{size / (1 << 20):,.0f} MiB"


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 case", "2 cases"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = value if isinstance(value, Markup) else text(str(value), _MAX_ATTRIBUTE)
    return f' {name}="{shown}"'
