"""What leaves the store: Markdown for an issue, SARIF, and a zip of it all."""

from __future__ import annotations

import io
import json
import zipfile

import msgspec
import pytest

from crumplezone.errors import ReportError
from crumplezone.reports.analysis.signature import VERSION, sign
from crumplezone.reports.formats import bundle, markdown, sarif, text
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import (
    Evidence,
    Exit,
    Frame,
    Report,
    Signature,
    Thread,
    Verdict,
    VerdictKind,
)
from tests.support.processes.cells import die
from tests.support.records.exports import NASTY, parsed, validated
from tests.support.records.reports import full

SIGNATURE = Signature("ab" * 32, "SIGSEGV", ["get_rows"], "SIGSEGV in get_rows")


@pytest.fixture(scope="module")
def real() -> Report:
    """A real crash, with all that a job would add."""
    evidence = die("segv")
    report = msgspec.structs.replace(
        full(),
        evidence=evidence,
        environment=schema.Environment({"llama.cpp": "b1", "python": "3.13"}, "a CPU", ["avx2"], "AVX2 = 1"),
        verdict=Verdict(VerdictKind.BATCH_ONLY, "every sequence got its result on the rung safe"),
    )
    return msgspec.structs.replace(report, signature=sign(report))


def hostile(nasty: str) -> Report:
    """Every string that a child, a model or a caller chooses is nasty."""
    report = full(hostile=nasty)
    frames = [Frame(nasty, "/lib/" + nasty, nasty, nasty, nasty, 3), Frame(module=nasty, offset=nasty)]
    thread = Thread(7, nasty, crashed=True, native=frames, python=frames)
    evidence = msgspec.structs.replace(
        report.evidence,
        threads=[thread],
        code_bytes=nasty,
        assertion=schema.Assertion(nasty, nasty, nasty, 1),
    )
    return msgspec.structs.replace(
        report,
        evidence=evidence,
        batch=msgspec.structs.replace(full().batch or schema.BatchRecord([], [], [], []), operation=nasty),
        environment=schema.Environment({nasty: nasty}, nasty, [nasty], nasty, {nasty: nasty}),
        signature=Signature(nasty, nasty, [nasty], nasty, nasty),
        verdict=Verdict(VerdictKind.INPUT, nasty),
        caller=frames,
    )


def test_an_issue_holds_all_that_is_known(real: Report) -> None:
    issue = markdown.render(real, "import llama_cpp\n")
    assert issue.startswith("# `SIGSEGV in ")
    titles = [
        "What happened",
        "How to reproduce",
        "Native stack",
        "Python stack",
        "Registers and code",
        "Batch",
    ]
    titles += ["Context", "Model", "Environment", "Ladder and verdict", "Signature"]
    places = [issue.index(f"\n## {title}\n") for title in titles]
    assert places == sorted(places)
    assert real.signature is not None
    assert "faulthandler_fatal_error" not in issue  # above the trampoline is our own handler
    for part in (
        "- address: `0x18`",
        "```python\nimport llama_cpp\n```",
        "handle (",
        "libc.so.6+0x",
        f"rip     {real.evidence.registers['rip']}",
        real.evidence.code_bytes,
        "| 0 | 10 | 0 | 9 | 1 |",
        "12 tokens in 2 sequences.",
        "n_ctx: 512",
        "file: tiny.gguf",
        "llama.cpp: b1",
        "AVX2 = 1",
        "verdict: batch-only, because every sequence got its result",
        real.signature.id,
    ):
        assert part in issue
    assert "crumplezone triage script" in markdown.render(real)
    assert "redacted" in markdown.render(msgspec.structs.replace(real, redacted=True))


@pytest.mark.parametrize("nasty", NASTY)
def test_no_string_of_a_report_is_markup(nasty: str) -> None:
    marker = "MARK" + nasty + "MARK"
    issue = markdown.render(hostile(marker), f"print(1)\n{marker}")
    ours = parsed(markdown.render(hostile("harmless"), "print(1)\nharmless"))
    tokens = parsed(issue)
    assert [(token.type, token.tag) for token in tokens] == [(token.type, token.tag) for token in ours]
    shown = [token for token in tokens if "MARK" in token.content]
    assert {token.type for token in shown} == {"code_inline", "fence"}
    assert all(line.isprintable() for line in issue.split("\n"))
    assert {token.content for token in tokens if "html" in token.type} == {
        token.content for token in ours if "html" in token.type
    }


def test_an_issue_is_never_longer_than_github_takes() -> None:
    many, numbers = hostile("`x|" * 500), list(range(9999))
    frames = [Frame("f" * 3000, "/lib/x.so", offset="0x1")] * 500
    thread = Thread(7, crashed=True, native=frames, python=frames)
    report = msgspec.structs.replace(
        many,
        evidence=msgspec.structs.replace(
            many.evidence, threads=[thread], registers={f"r{i}": "0x1" * 99 for i in range(999)}
        ),
        batch=schema.BatchRecord(numbers, numbers, numbers, [True] * 9999),
        context={f"{i}" * 99: "y" * 999 for i in range(999)},
        ladder=[schema.LadderStep("safe", schema.Outcome.OK, list(range(999)), "z" * 999)] * 999,
    )
    for script in (None, "x = 1\n" * 3000, "y" * 10**6):
        issue = markdown.render(report, script)
        assert 10_000 < len(issue) <= markdown.MAX_CHARACTERS
        assert {token.type for token in parsed(issue) if "zzz" in token.content} <= {"fence"}
    assert "Left out, as too long for an issue" in issue
    assert "too long" in markdown.render(full(), "y" * 10**6)


def test_a_report_with_almost_nothing_is_an_issue_too() -> None:
    for kind in Exit:
        issue = markdown.render(Report("x", "", Evidence(kind, 1)))
        assert issue.startswith(f"# `{kind.value}`")
        assert "## Native stack" not in issue


def test_sarif_of_a_real_crash_is_valid_and_says_where(real: Report) -> None:
    (run,) = validated(sarif.render([real]))["runs"]
    (rule,), (result,) = run["tool"]["driver"]["rules"], run["results"]
    assert real.signature is not None
    assert rule["id"] == result["ruleId"] == real.signature.id
    assert rule["shortDescription"]["text"] == real.signature.title
    assert result["partialFingerprints"] == {f"crumplezoneSignature/v{VERSION}": real.signature.id}
    assert result["message"]["text"] == text.summary(real)
    native, python = result["stacks"]
    names = [frame["location"]["logicalLocations"][0]["fullyQualifiedName"] for frame in python["frames"]]
    assert "handle" in names
    assert any(frame.get("module", "").startswith("libc.so") for frame in native["frames"])
    assert any(
        frame["location"]
        .get("physicalLocation", {})
        .get("artifactLocation", {})
        .get("uri", "")
        .endswith("/stunts.py")
        for frame in python["frames"]
    )
    assert result["properties"]["verdict"] == "batch-only"
    assert result["properties"]["versions"]["llama.cpp"] == "b1"


def test_reports_of_one_signature_are_one_result() -> None:
    signed = [msgspec.structs.replace(full(f"id-{i}"), signature=SIGNATURE) for i in range(3)]
    (run,) = validated(sarif.render([*signed, full("a"), full("b")]))["runs"]
    assert [result["occurrenceCount"] for result in run["results"]] == [3, 1, 1]
    assert run["results"][0]["properties"]["reports"] == ["id-0", "id-1", "id-2"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [SIGNATURE.id, "unsigned-signal"]
    assert validated(sarif.render([]))["runs"][0]["results"] == []


@pytest.mark.parametrize("nasty", [*NASTY, "", "x" * 100_000, "/a b%/ä?#"])
def test_sarif_of_a_hostile_report_is_valid_and_bounded(nasty: str) -> None:
    log = sarif.render([hostile(nasty), Report("x", nasty, Evidence(Exit.HANG, 1, detail=nasty))])
    shown = json.dumps(validated(log), ensure_ascii=False)
    assert shown.isprintable()
    assert len(shown) < 200_000


def test_a_zip_holds_it_all_and_is_the_same_each_time(real: Report) -> None:
    data = bundle.bundle(real, "import llama_cpp\n")
    assert data == bundle.bundle(real, "import llama_cpp\n")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert schema.decode(files["report.json"]) == real
    assert files["report.txt"].decode() == text.render(real)
    assert files["report.md"].decode() == markdown.render(real, "import llama_cpp\n")
    validated(json.loads(files["report.sarif.json"]))
    assert files["reproduce.py"] == b"import llama_cpp\n"
    with zipfile.ZipFile(io.BytesIO(bundle.bundle(real))) as archive:
        assert "reproduce.py" not in archive.namelist()


def test_a_zip_is_bounded() -> None:
    with pytest.raises(ReportError, match="more than"):
        bundle.bundle(full(), "#" * bundle.MAX_BYTES)
