"""The groups of the page: all that was seen of one signature, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from markupsafe import Markup

from crumplezone.reports.analysis.same import canonical
from crumplezone.reports.html.markup import EMPTY, box, count, fold, strip, symbol, tag, text, time_text
from crumplezone.reports.html.report import link
from crumplezone.reports.records.run import CaseRecord, Fixed, News, RunRecord
from crumplezone.reports.store import retention
from crumplezone.reports.store.index import Row
from crumplezone.reports.store.retention import Count

_BINS = 24
_LEAST_SPAN = timedelta(hours=1)
_NO_TIME = datetime.fromtimestamp(0, UTC)
_MAX_GROUPS = 256
_MAX_CASES = 24
_SHORT = 12


@dataclass
class Group:
    """One signature.

    Attributes:
        signature: Its id; empty for the reports that cannot be read.
        title: In words.
        confidence: "high" or "low".
        rows: Its reports that the store holds.
        cases: Its cases in the run.
        removed: Its reports that the store no longer holds.
    """

    signature: str
    title: str
    confidence: str = "high"
    rows: list[Row] = field(default_factory=list)
    cases: list[CaseRecord] = field(default_factory=list)
    removed: Count | None = None

    @property
    def count(self) -> int:
        """Crashes, those whose reports were removed included."""
        return max(len(self.rows) + (self.removed.removed if self.removed else 0), len(self.cases))

    @property
    def news(self) -> News | None:
        """What it is to the baseline, if it is in the run."""
        found = {case.news for case in self.cases}
        return next((news for news in (News.NEW, News.KNOWN, News.UNKNOWN) if news in found), None)


def groups(run: RunRecord | None, rows: Iterable[Row], removed: Mapping[str, Count]) -> list[Group]:
    """Group reports and cases by signature: the new ones first, then the most frequent."""
    found: dict[str, Group] = {}
    listed, cases = (
        list(rows),
        [(case, case.signature) for case in (run.cases if run else ()) if case.signature],
    )
    heads = canonical([*(row.identity() for row in listed), *(signed for _, signed in cases)])

    def group(name: str, title: str, confidence: str) -> Group:
        if head := heads.get(name):
            name, title, confidence = head.id, head.title, head.confidence
        return found.setdefault(name, Group(name, title, confidence))

    for row in listed:
        title = row.title if row.signature else "cannot be read"
        group(row.signature, title, row.confidence).rows.append(row)
    for case, signed in cases:
        group(signed.id, signed.title or signed.fault_class, signed.confidence).cases.append(case)
    for name, each in found.items():
        each.removed = retention.removed(each.rows, removed) or removed.get(name)
    return sorted(found.values(), key=lambda group: (group.news is not News.NEW, -group.count, group.title))


def table(found: Sequence[Group], fixed: Sequence[Fixed]) -> Markup:
    """A line per signature with its count and trend, then what is fixed."""
    if not found and not fixed:
        return tag("p", "Nothing has crashed.", class_="quiet")
    times = [row.crashed_at for group in found for row in group.rows]
    begin, end = _span(times)
    rows = [_row(group, begin, end) for group in found[:_MAX_GROUPS]]
    rows += [_fixed(each) for each in fixed[:_MAX_GROUPS]]
    trend = tag("th", "trend ", tag("span", f"{begin:%m-%d %H:%M} to {end:%m-%d %H:%M}Z", class_="quiet"))
    titles = ("count", "signature", "first seen", "last seen")
    heads = [tag("th", title, scope="col") for title in titles]
    head = tag("thead", tag("tr", *heads[:2], trend if times else tag("th"), *heads[2:]))
    left_out = max(len(found), len(fixed)) - _MAX_GROUPS
    more = tag("p", f"and {left_out} more", class_="quiet") if left_out > 0 else EMPTY
    return tag("div", tag("table", head, tag("tbody", *rows), class_="groups"), more)


def _span(times: Sequence[datetime]) -> tuple[datetime, datetime]:
    """What the sparklines cover: one for all, so that they can be compared."""
    if not times:
        return _NO_TIME, _NO_TIME
    begin, end = min(times), max(times)
    return min(begin, end - _LEAST_SPAN), end


def _row(group: Group, begin: datetime, end: datetime) -> Markup:
    news = group.news
    marks = [tag("b", news.value, class_=f"news {news.value}"), " "] if news else []
    marks.append(tag("b", symbol(group.title)))
    if group.confidence == "low":
        marks.append(tag("span", " low confidence", class_="quiet"))
    verdicts = Counter(row.verdict.value for row in group.rows if row.verdict)
    said = [tag("code", text(group.signature, _SHORT))] if group.signature else []
    said += [tag("span", f"{name} {n}") for name, n in verdicts.most_common()]
    seen = [row.crashed_at for row in group.rows]
    if group.removed:
        seen += [group.removed.first_seen, group.removed.last_seen]
        said.append(tag("span", f"{count(group.removed.removed, 'report')} removed"))
    if seen:
        latest = max(group.rows, key=lambda row: (row.same_as == "", row.crashed_at))
        said.append(tag("a", "latest report", href=link(latest.id)))
    first, last = (tag("time", time_text(at(seen))) if seen else "" for at in (min, max))
    return tag(
        "tr",
        tag("td", f"{group.count:,}", class_="count"),
        tag(
            "td",
            tag("div", *marks),
            tag("div", Markup(" \N{MIDDLE DOT} ").join(said), class_="quiet"),
            _cases(group),
        ),
        tag("td", _trend(group, begin, end), class_="trend"),
        tag("td", first, class_="number"),
        tag("td", last, class_="number"),
        id=f"g-{group.signature[:64]}",
    )


def _cases(group: Group) -> Markup:
    names = [tag("li", case.id) for case in group.cases[:_MAX_CASES]]
    if len(group.cases) > _MAX_CASES:
        names.append(tag("li", f"and {len(group.cases) - _MAX_CASES} more"))
    return fold(count(len(group.cases), "case"), tag("ul", *names)) if names else EMPTY


def _trend(group: Group, begin: datetime, end: datetime) -> Markup:
    """How many crashes in each part of the time, as bars."""
    if not group.rows:
        return EMPTY
    parts = Counter(
        min(int(_BINS * ((row.crashed_at - begin) / (end - begin))), _BINS - 1) for row in group.rows
    )
    most = max(parts.values())
    bars = [
        box(at + 0.1, 20 - (height := max(20 * n / most, 2)), 0.8, height) for at, n in sorted(parts.items())
    ]
    ground = box(0, 19.6, _BINS, 0.4)
    label = f"at most {count(most, 'crash') if most == 1 else f'{most:,} crashes'} in one part of {_BINS}"
    return strip(_BINS, 20, [("ground", ground), ("took", "".join(bars))], label, 120)


def _fixed(fixed: Fixed) -> Markup:
    words = f"expected in {count(len(fixed.cases), 'case')}, and not met"
    said = [tag("code", text(fixed.signature, _SHORT)), words] if fixed.signature else [fixed.cases[0]]
    return tag(
        "tr",
        tag("td", "0", class_="count"),
        tag(
            "td",
            tag("div", tag("b", "fixed", class_="news fixed"), " ", tag("b", symbol(fixed.title))),
            tag("div", Markup(" \N{MIDDLE DOT} ").join(said), class_="quiet"),
        ),
        tag("td"),
        tag("td"),
        tag("td"),
    )
