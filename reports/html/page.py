"""The page: a diagnostic run or a store of crash reports as one HTML file that asks no network for anything.

It can be read without its script. The script only adds the filter, arrow keys, and what a fold hides when a
link leads into it. Strings of reports are escaped (`page_html`), and should one ever get through, the policy
of the page (CSP) lets it run nothing and load nothing: styles and the script are named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import PurePosixPath

from markupsafe import Markup

from crumplezone.reports.html import matrix as page_matrix
from crumplezone.reports.html import report as page_report
from crumplezone.reports.html import signatures as page_groups
from crumplezone.reports.html.markup import EMPTY, count, facts, join, mebibytes, tag, text, time_text
from crumplezone.reports.printable import printable
from crumplezone.reports.records.report import ModelRecord, Report
from crumplezone.reports.records.run import Ending, News, RunRecord
from crumplezone.reports.store.index import NO_STAMP, Row, row_of
from crumplezone.reports.store.retention import Count

MAX_REPORTS = 200
"""Reports that a page shows in full."""

MAX_BYTES = 16 << 20
"""What the reports of a page may have together; those beyond it are listed only."""

_MAX_ROWS = 2000
_NO_TIME = datetime.fromtimestamp(0, UTC)

_DOCUMENT = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header class="bar"><b>crumplezone</b><nav>{links}</nav>\
<input id="filter" type="search" placeholder="Filter" aria-label="Filter" aria-keyshortcuts="/" hidden>
</header>
<main>
{body}
</main>
<footer hidden><kbd>/</kbd> filter <kbd>\N{UPWARDS ARROW}</kbd> <kbd>\N{DOWNWARDS ARROW}</kbd> move \
<kbd>Enter</kbd> open or close <kbd>Esc</kbd> clear</footer>
<script>{script}</script>
</body>
</html>
""")


def pick(rows: Sequence[Row]) -> list[str]:
    """Ids of the reports that a page has room for: the latest in full of each signature, then the newest.

    Args:
        rows: Of a store, newest first: `Store.rows`.
    """
    known = [row for row in rows if not row.problem]
    full = {row.signature: row.id for row in reversed(known) if not row.same_as}
    return list(dict.fromkeys([*full.values(), *(row.id for row in known)]))[:MAX_REPORTS]


def render(
    run: RunRecord | None,
    reports: Sequence[Report],
    rows: Sequence[Row] = (),
    removed: Mapping[str, Count] | None = None,
) -> str:
    """Write the page.

    Args:
        run: The run to show; None for a store alone.
        reports: Those to show in full, see `pick`. No more than `MAX_BYTES` of them fit, in this order.
        rows: All reports to list and to count, newest first. [default: those of ``reports``]
        removed: What the store no longer holds, by signature: `Store.counts`.
    """
    listed = list(rows) or _rows(reports)
    found = page_groups.groups(run, listed, removed or {})
    sections = [_lead(run, listed, found)]
    if run:
        sections.append(_section("matrix", "Matrix", page_matrix.matrix(run), page_matrix.cases(run)))
    groups = page_groups.table(found, run.fixed if run else ())
    sections.append(_section("groups", _counted("Signatures", len(found)), groups))
    entries = _entries(run, reports, listed)
    sections.append(_section("reports", _counted("Reports", len(listed)), *entries))
    links = [("#matrix", "Matrix")] if run else []
    links += [("#groups", "Signatures"), ("#reports", "Reports")]
    return _document(
        _title(run, len(listed)), join(tag("a", name, href=to) for to, name in links), join(sections)
    )


def _rows(reports: Iterable[Report]) -> list[Row]:
    made = [row_of(report, NO_STAMP, 0, _NO_TIME) for report in reports]
    return sorted(made, key=lambda row: (row.crashed_at, row.id), reverse=True)


def _document(title: str, links: Markup, body: Markup) -> str:
    style, script = (_static(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _DOCUMENT.format(
        policy=policy, title=printable(title), links=links, body=body, style=style, script=script
    )
    return str(page)


def _static(name: str) -> Markup:
    ours = files("crumplezone.reports.html").joinpath("static", name).read_text("utf-8")
    return Markup(ours)  # noqa: S704 - a file of this package


def _hash(content: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return Markup("'sha256-{}'").format(digest)


def _counted(title: str, number: int) -> Markup:
    return join([title, tag("span", f"{number:,}")])


def _section(name: str, title: str, *body: Markup) -> Markup:
    return tag("section", tag("h2", title), *body, id=name)


def _title(run: RunRecord | None, reports: int) -> str:
    if run is None:
        return f"{count(reports, 'crash report')} - crumplezone"
    new = sum(case.news is News.NEW for case in run.cases)
    return f"{f'{new} new' if new else 'nothing new'} - diagnostic run {run.started_at[:16]} - crumplezone"


def _lead(run: RunRecord | None, rows: Sequence[Row], groups: Sequence[page_groups.Group]) -> Markup:
    if run is None:
        seen = [row.crashed_at for row in rows]
        when = f", {time_text(min(seen))} to {time_text(max(seen))}" if seen else ""
        said = f"{count(len(groups), 'signature')}{when}"
        return tag(
            "div", tag("h1", count(len(rows), "crash report")), tag("p", said, class_="quiet"), class_="lead"
        )
    return tag("div", tag("h1", _verdict(run)), _incomplete(run), _tally(run), _about(run), class_="lead")


def _verdict(run: RunRecord) -> str:
    """The run in one line: what is new counts, and what could not be found out."""
    news = Counter(case.news for case in run.cases)
    said = [f"{news[kind]:,} {kind.value}" for kind in (News.NEW, News.KNOWN) if news[kind]]
    said += [f"{len(run.fixed):,} fixed"] if run.fixed else []
    said += [f"{news[News.UNKNOWN]:,} not known"] if news[News.UNKNOWN] else []
    if said:
        return f"Diagnostic run: {', '.join(said)}"
    return "Diagnostic run: as expected" if run.complete else "Diagnostic run"


def _incomplete(run: RunRecord) -> Markup:
    if run.complete:
        return EMPTY
    ended = f"{len(run.cases):,} of {count(run.planned, 'case')} ended"
    return tag("p", tag("b", "Incomplete"), f": {ended}. --resume goes on from here.", class_="warning")


def _tally(run: RunRecord) -> Markup:
    endings = Counter(case.ending for case in run.cases)
    chips = [
        tag("li", tag("b", f"{endings[ending]:,}"), f" {ending.value}", class_=f"tag {ending.value} new")
        for ending in Ending
        if endings[ending]
    ]
    return tag("ul", *chips, class_="tally")


def _about(run: RunRecord) -> Markup:
    versions = run.environment.versions
    ended = f" to {run.ended_at[11:19]}" if run.ended_at else ""
    return facts(
        [
            ("started", f"{run.started_at[:19].replace('T', ' ')}{ended}"),
            ("cases", f"{len(run.cases):,} of {run.planned:,}"),
            ("shard", run.shard),
            ("baseline", run.baseline),
            ("model", join(tag("div", _model(model)) for model in run.models[:16])),
            ("cpu", run.environment.cpu),
            *((name, value) for name, value in list(versions.items())[:16]),
        ]
    )


def _model(model: ModelRecord) -> str:
    known = [PurePosixPath(model.path).name, mebibytes(model.size) if model.size else "", model.description]
    return ", ".join(part for part in known if part)


def _entries(run: RunRecord | None, reports: Sequence[Report], rows: Sequence[Row]) -> Iterable[Markup]:
    """The list of reports; as many of them in full as there is room for."""
    cases = page_matrix.by_report(run)
    by_id = {row.id: row for row in rows[:_MAX_ROWS]}
    full: dict[str, Markup] = {}
    room = MAX_BYTES
    for report in reports[:MAX_REPORTS]:
        if row := by_id.get(report.id):
            shown = page_report.entry(row, report, cases.get(row.id), opened=len(rows) == 1)
            room -= len(shown.encode())
            if room < 0:
                break
            full[row.id] = shown
    yield from (
        full.get(row.id) or page_report.entry(row, None, cases.get(row.id), opened=False)
        for row in by_id.values()
    )
    if len(full) < len(rows):
        left = len(rows) - len(full)
        words = f"{count(left, 'report')} not shown in full here: `crumplezone triage show` has each."
        yield tag("p", text(words), class_="quiet")
    if not rows:
        yield tag("p", "None.", class_="quiet")
