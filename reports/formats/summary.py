"""A diagnostic run in GitHub's Markdown, for a job's summary, and as annotations of its log.

Most strings of a run come from files and crashed children. They stand in code spans only, and in no table.
"""

# Without `from __future__ import annotations`: a function has that name.

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import msgspec

from crumplezone.reports.formats.markdown import span
from crumplezone.reports.printable import printable
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, RunRecord, Shape, grouped

MAX_ANNOTATIONS = 10
"""GitHub shows so many errors of a step: https://docs.github.com/en/rest/checks/runs (as of 2026)."""

# With these, a summary stays below the mebibyte that GitHub takes of a step, whatever the run holds.
_MAX_GROUPS = 32
_MAX_CASES = 6
_MAX_ROWS = 64
_MAX_LINE = 160
_MAX_MESSAGE = 1024

_SECTIONS = {News.NEW: "New failures", News.UNKNOWN: "Not known", News.KNOWN: "Known failures"}


def render(run: RunRecord) -> str:
    """Write the summary: the judgement, what is new, what is known, and a table of shapes and paths."""
    lines = [f"## {headline(run)}", "", *_facts(run)]
    failed = [case for case in run.cases if case.ending is not Ending.PASS]
    for news, title in _SECTIONS.items():
        groups = grouped(case for case in failed if case.news is news)
        lines += _section(title, [_group(group) for group in groups])
    lines += _section("Fixed", [_fixed(each) for each in run.fixed])
    return "\n".join([*lines, *_tables(run.cases), ""])


def headline(run: RunRecord) -> str:
    """The judgement in a line, without any string of the run."""
    news = Counter(case.news for case in run.cases)
    new = len(grouped(case for case in run.cases if case.news is News.NEW))
    parts = [f"{new} new {_plural(new, 'failure')}"] if new else []
    parts += [f"{news[News.UNKNOWN]} not known"] if news[News.UNKNOWN] else []
    parts += [f"{len(run.fixed)} fixed"] if run.fixed else []
    parts += ["interrupted"] if not run.complete else []
    return f"Crumplezone: {', '.join(parts) or 'as expected'}"


def annotations(run: RunRecord) -> list[str]:
    """GitHub's workflow commands for what is new and for what is not known, at most `MAX_ANNOTATIONS`.

    Returns:
        Lines to be printed; each is one ``::error``. The format:
        https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands.
    """
    wanted = [case for news in (News.NEW, News.UNKNOWN) for case in run.cases if case.news is news]
    groups = grouped(wanted)
    lines = [_annotation(group) for group in groups]
    if len(lines) > MAX_ANNOTATIONS:
        more = len(lines) - MAX_ANNOTATIONS + 1
        lines[MAX_ANNOTATIONS - 1 :] = [f"::error title=crumplezone::{more} more: see the job's summary"]
    return lines


def _annotation(group: Sequence[CaseRecord]) -> str:
    first = group[0]
    news = "new " if first.news is News.NEW else ""
    title = _property(f"{news}{first.ending.value}: {first.title or first.id}")
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    report = f"; report {first.report}" if first.report else ""
    return f"::error title={title}::{_data(f'{first.id}{more}: {_cause(first)}{report}')}"


def _data(text: str) -> str:
    """As actions/toolkit escapes it (packages/core/src/command.ts), but a line feed is none any more."""
    return printable(text[:_MAX_MESSAGE]).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _cause(case: CaseRecord) -> str:
    return case.detail or case.title or case.ending.value


def _facts(run: RunRecord) -> list[str]:
    endings = Counter(case.ending for case in run.cases)
    counts = ", ".join(f"{endings[ending]} {ending.value}" for ending in Ending if endings[ending])
    of = f" of {run.planned}" if len(run.cases) != run.planned else ""
    ran = f"{len(run.cases)}{of} {_plural(run.planned, 'case')}: {counts or 'none ran'}."
    lines = [ran] if run.complete else [ran, "**Interrupted**: `--resume` goes on."]
    pairs = [("model", PurePosixPath(model.path).name) for model in run.models[:_MAX_CASES]]
    pairs += [("llama.cpp", run.environment.versions.get("llama.cpp", "")), ("cpu", run.environment.cpu)]
    pairs += [("started", run.started_at), ("ended", run.ended_at)]
    pairs += [("shard", run.shard), ("baseline", run.baseline)]
    return [*lines, "", *(f"- {name}: {span(value, _MAX_LINE)}" for name, value in pairs if value)]


def _section(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"- ... and {len(items) - _MAX_GROUPS} more"] if len(items) > _MAX_GROUPS else []
    return ["", f"### {title}", "", *items[:_MAX_GROUPS], *more]


def _group(group: Sequence[CaseRecord]) -> str:
    first = group[0]
    lines = [f"- **{first.ending.value}** {span(first.title or first.detail, _MAX_LINE)}"]
    lines.append(f"  - {len(group)} {_plural(len(group), 'case')}: {_names(case.id for case in group)}")
    if first.signature and first.signature.key:
        frames = [span(part, _MAX_LINE) for part in first.signature.key[:3]]
        lines.append(f"  - top frames: {' < '.join(frames)}")
    if first.signature and first.more:
        lines.append(f"  - {span(first.more, _MAX_LINE)}")
    if first.ending is Ending.MISMATCH:
        texts = (("native", first.text), ("safe", first.safe_text))
        lines += [f"  - {name}: {span(text, _MAX_LINE)}" for name, text in texts]
    if first.report:
        lines.append(f"  - report: {span(f'reports/{first.report}', _MAX_LINE)}")
    return "\n".join(lines)


def _fixed(fixed: Fixed) -> str:
    return f"- {span(fixed.title or fixed.signature, _MAX_LINE)}: {_names(fixed.cases)}"


def _names(ids: Iterable[str]) -> str:
    names = [span(each, _MAX_LINE) for each in ids]
    more = [f"and {len(names) - _MAX_CASES} more"] if len(names) > _MAX_CASES else []
    return ", ".join([*names[:_MAX_CASES], *more])


def _tables(cases: Sequence[CaseRecord]) -> list[str]:
    """A table for each model: a row for each shape, a column for each path."""
    lines: list[str] = []
    for model in list(dict.fromkeys(case.model for case in cases))[:_MAX_CASES]:
        own = [case for case in cases if case.model == model]
        paths = list(dict.fromkeys(case.shape.path for case in own))
        rows: dict[str, dict[str, str]] = {}
        for case in own:
            rows.setdefault(describe(case.shape), {})[case.shape.path] = _mark(case)
        lines += ["", f"### {span(model, _MAX_LINE)}", ""]
        lines += [f"| tokens | {' | '.join(paths)} |", f"|:--{'|:-:' * len(paths)}|"]
        for label, row in list(rows.items())[:_MAX_ROWS]:
            lines.append(f"| {label} | {' | '.join(row.get(path, '') for path in paths)} |")
        if len(rows) > _MAX_ROWS:
            lines += ["", f"... and {len(rows) - _MAX_ROWS} more shapes"]
    return lines


def describe(shape: Shape) -> str:
    """A shape in words, without its path: "10 in 3 sequences, kv_unified"."""
    usual = Shape(shape.path, shape.sequences, shape.tokens)
    plain = f"{shape.tokens} in {shape.sequences} {_plural(shape.sequences, 'sequence')}"
    values = msgspec.structs.asdict(shape)
    odd = [
        name if value is True else f"{name}={value}"
        for name, value in values.items()
        if value != getattr(usual, name)
    ]
    return ", ".join([plain, *odd])


def _mark(case: CaseRecord) -> str:
    news = f" ({case.news.value})" if case.news not in {News.EXPECTED, News.UNKNOWN} else ""
    return f"**{case.ending.value}{news}**" if case.news is News.NEW else f"{case.ending.value}{news}"
