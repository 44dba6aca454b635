"""The heat map of a run, and the list of its cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import PurePosixPath
from typing import get_args
from urllib.parse import quote

from markupsafe import Markup

from crumplezone.reports.html.markup import EMPTY, count, duration, fold, join, mebibytes, symbol, tag, text
from crumplezone.reports.html.report import link
from crumplezone.reports.records.run import CaseRecord, Ending, News, Path, RunRecord, Shape

LETTERS = {
    Ending.PASS: "P",
    Ending.MISMATCH: "M",
    Ending.CRASH: "C",
    Ending.HANG: "H",
    Ending.OOM: "O",
    Ending.REFUSED: "R",
    Ending.ERROR: "E",
}
_BAD = (*(Ending.CRASH, Ending.HANG, Ending.OOM, Ending.MISMATCH, Ending.REFUSED), Ending.ERROR, Ending.PASS)
_NEWS = (News.NEW, News.UNKNOWN, News.FIXED, News.KNOWN, News.EXPECTED)
_PATHS = get_args(Path)
_MAX_CASES = 4096
_MAX_COLUMNS = 64
_MAX_DIFF = 240

Column = tuple[str, Path]  # model and path


def matrix(run: RunRecord) -> Markup:
    """A row per shape, a column per model and path, and in each cell the ending's letter and colour."""
    numbered = list(enumerate(run.cases[:_MAX_CASES]))
    columns = _columns(case for _, case in numbered)
    cells: dict[tuple[str, Column], tuple[int, CaseRecord]] = {}
    for number, case in numbered:
        place = shape_words(case.shape), (case.model, case.shape.path)
        if place not in cells or _BAD.index(case.ending) < _BAD.index(cells[place][1].ending):
            cells[place] = number, case
    if not cells:
        return tag("p", "No case has ended yet.", class_="quiet")
    rows = [
        tag(
            "tr", tag("th", *_row_label(words), scope="row"), *(_cell(cells.get((words, c))) for c in columns)
        )
        for words in dict.fromkeys(words for words, _ in cells)
    ]
    table = tag("table", _head(columns), tag("tbody", *rows), class_="map", id="map")
    readout = tag("p", " ", id="readout", role="status", class_="quiet", hidden=True)
    return join([tag("div", table, class_="scroll"), readout, _legend(run.cases)])


def _columns(cases: Iterable[CaseRecord]) -> list[Column]:
    found: dict[Column, None] = dict.fromkeys((case.model, case.shape.path) for case in cases)
    models = list(dict.fromkeys(model for model, _ in found))
    return sorted(found, key=lambda each: (models.index(each[0]), _PATHS.index(each[1])))[:_MAX_COLUMNS]


def shape_words(shape: Shape) -> str:
    """A shape without its path: "3x10, kv_unified"; what is as by default is not said."""
    usual = Shape()
    said = [f"{shape.sequences}x{shape.tokens}"]
    if (shape.type_k, shape.type_v) != (usual.type_k, usual.type_v):
        said.append(
            f"KV {shape.type_k}" if shape.type_k == shape.type_v else f"K {shape.type_k} V {shape.type_v}"
        )
    for name in ("n_batch", "n_ubatch", "kv_unified", "flash_attn", "n_threads", "pooling"):
        value = getattr(shape, name)
        if value != getattr(usual, name):
            said.append(name if value is True else f"{name} {value}")
    return ", ".join(said)


def _row_label(words: str) -> Iterator[Markup]:
    size, _, rest = words.partition(", ")
    yield tag("b", size)
    if rest:
        yield tag("span", " " + rest, class_="quiet")


def _head(columns: Sequence[Column]) -> Markup:
    models = list(dict.fromkeys(model for model, _ in columns))
    first = [
        tag("th", text(_model_name(model), 64), colspan=sum(c[0] == model for c in columns), scope="colgroup")
        for model in models
    ]
    second = [tag("th", tag("span", path), scope="col") for _, path in columns]
    corner = tag("th", "sequences x tokens", rowspan=2, class_="quiet", scope="col")
    return tag("thead", tag("tr", corner, *first), tag("tr", *second))


def _model_name(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(".gguf")


def _cell(found: tuple[int, CaseRecord] | None) -> Markup:
    if found is None:
        return tag("td")
    number, case = found
    said = f"{case.id}: {case.ending.value}{_news_words(case)}{f', {case.detail}' if case.detail else ''}"
    letter = tag("a", LETTERS[case.ending], href=f"#c-{number}", title=text(said, 400))
    return tag("td", letter, class_=f"{case.ending.value} {case.news.value}")


def _news_words(case: CaseRecord) -> str:
    return "" if case.news is News.EXPECTED else f" ({case.news.value})"


def _legend(cases: Sequence[CaseRecord]) -> Markup:
    seen = {case.ending for case in cases}
    keys = [
        tag("li", tag("span", LETTERS[ending], class_=f"key {ending.value} new"), f" {ending.value}")
        for ending in Ending
        if ending in seen
    ]
    news = {case.news for case in cases}
    if News.KNOWN in news:
        keys.append(tag("li", tag("span", "C", class_="key crash known"), " pale: known to the baseline"))
    if News.FIXED in news:
        keys.append(tag("li", tag("span", "P", class_="key pass fixed"), " framed: fixed"))
    return tag("ul", *keys, class_="legend")


def cases(run: RunRecord) -> Markup:
    """The list of cases, those first that need somebody; those that passed as they should are folded away."""
    numbered = list(enumerate(run.cases[:_MAX_CASES]))
    order = sorted(
        numbered, key=lambda each: (_NEWS.index(each[1].news), _BAD.index(each[1].ending), each[0])
    )
    quiet = [each for each in order if each[1].news is News.EXPECTED]
    loud = [each for each in order if each[1].news is not News.EXPECTED]
    parts = [_table(loud), fold(f"{count(len(quiet), 'case')} as expected", _table(quiet))]
    if len(run.cases) > _MAX_CASES:
        parts.append(tag("p", f"and {len(run.cases) - _MAX_CASES:,} more: run.json has all", class_="quiet"))
    return join(parts)


def _table(numbered: Sequence[tuple[int, CaseRecord]]) -> Markup:
    if not numbered:
        return EMPTY
    rows = [_case(number, case) for number, case in numbered]
    return tag("table", tag("tbody", *rows), class_="cases")


def _case(number: int, case: CaseRecord) -> Markup:
    ending = tag("span", case.ending.value, class_=f"tag {case.ending.value} {case.news.value}")
    news = "" if case.news in (News.EXPECTED, News.UNKNOWN) else case.news.value
    said = []
    if case.signature:
        said.append(tag("a", symbol(case.title), href="#" + quote(f"g-{case.signature.id[:64]}")))
    if case.more:
        said.append(tag("span", text(case.more, 400)))
    if case.report:
        said.append(tag("a", "report", href=link(case.report)))
    differs = _difference(case.text, case.safe_text) if case.ending is Ending.MISMATCH else EMPTY
    spent = f"{duration(case.ms)}{f', {mebibytes(case.peak_rss)}' if case.peak_rss else ''}"
    return tag(
        "tr",
        tag("td", ending, " ", tag("b", news, class_=f"news {case.news.value}")),
        tag("td", case.id, class_="case"),
        tag("td", Markup(" \N{MIDDLE DOT} ").join(said), differs, class_="said"),
        tag("td", spent, class_="number"),
        id=f"c-{number}",
    )


def _difference(native: str, safe: str) -> Markup:
    """Both texts, marked from where they part."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(native, safe, strict=False)))
    start = max(0, same - 40)
    both = [
        tag(
            "div",
            tag("b", name),
            text(("\N{HORIZONTAL ELLIPSIS}" if start else "") + found[start:same]),
            tag("mark", text(found[same : same + _MAX_DIFF])),
        )
        for name, found in (("native ", native), ("safe ", safe))
    ]
    return tag("div", *both, class_="difference")


def by_report(run: RunRecord | None) -> Mapping[str, CaseRecord]:
    """The case of each report."""
    return {case.report: case for case in run.cases if case.report} if run else {}
