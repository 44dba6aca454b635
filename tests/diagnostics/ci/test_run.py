"""`crumplezone ci`: real cells, real crashes, interrupted runs, and what it writes."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from crumplezone.diagnostics.ci import matrix
from crumplezone.diagnostics.ci import run as ci
from crumplezone.diagnostics.ci.case import Case, run_case
from crumplezone.diagnostics.ci.output import Output
from crumplezone.diagnostics.ci.pool import run_all
from crumplezone.errors import InputError
from crumplezone.reports.records import run as runs
from crumplezone.reports.records.run import CaseRecord, Ending, News, RunRecord, Shape
from crumplezone.reports.store.store import Store
from crumplezone.workers.cells.targets import TARGETS
from tests.support.cli import COMMAND
from tests.support.decoders import WARN_OF_FORKS, Dose
from tests.support.native import decode_poison as poison
from tests.support.native.decode_poison import Poison
from tests.support.paths import ROOT
from tests.support.records.cases import some

MATRIX = """
deadline = 30
[[cases]]
sequences = 2
tokens = 4
n_threads = 1
[[cases]]
path = "encode"
tokens = 4
n_threads = 1
"""


def run_poisoned(case: Case, store: Path) -> CaseRecord:
    """In a runner: a process of its own, where `dose` has changed nothing but the environment."""
    TARGETS["decode"] = poison.TARGET
    return run_case(case, store)


@pytest.fixture
def dose(dose: Dose, monkeypatch: pytest.MonkeyPatch) -> Dose:
    def give(dosed: Poison) -> None:
        dose(dosed)
        monkeypatch.setattr(run_all, "__defaults__", (f"{__name__}:run_poisoned",))

    return give


# Whole runs.


def plan(tmp_path: Path, tiny: Path, text: str = MATRIX) -> list[Case]:
    (tmp_path / "matrix.toml").write_text(text)
    return matrix.plan(matrix.read(tmp_path / "matrix.toml"), [tiny])


def do(job: ci.Job) -> RunRecord:
    return ci.run(job, lambda _: None)


def test_a_run_its_baseline_and_a_planted_crash(tmp_path: Path, tiny: Path, dose: Dose) -> None:
    job = ci.Job(plan(tmp_path, tiny), tmp_path / "out", tmp_path / "known.json", update=True, jobs=2)
    first = do(job)
    by_path = {case.shape.path: case for case in first.cases}
    assert {path: case.ending for path, case in by_path.items()} == {
        "decode": Ending.PASS,
        "encode": Ending.CRASH,
    }
    crash = by_path["encode"]
    assert crash.signature is not None
    assert "build_input_k_idxs" in crash.signature.title
    assert Store(job.out / "reports").read(crash.report).signature == crash.signature
    assert first.complete
    assert ci.exit_code(first, update=False) == ci.NEW_FAILURES
    assert ci.exit_code(first, update=True) == ci.AS_EXPECTED

    job = ci.Job(job.cases, job.out, job.baseline, jobs=2)
    second = do(job)
    assert ci.exit_code(second, update=False) == ci.AS_EXPECTED
    assert [case.news for case in second.cases] == [News.EXPECTED, News.KNOWN]

    dose(Poison(min_sequences=2))  # decode has both in one call, the safe path has not
    planted = do(job)
    assert ci.exit_code(planted, update=False) == ci.NEW_FAILURES
    (new,) = [case for case in planted.cases if case.news is News.NEW]
    assert (new.shape.path, new.ending) == ("decode", Ending.CRASH)


def test_the_directory(tmp_path: Path, tiny: Path) -> None:
    job = ci.Job(plan(tmp_path, tiny), tmp_path / "out")
    run = do(job)
    assert runs.decode((job.out / "run.json").read_bytes()) == run
    assert {path.name for path in job.out.iterdir()} == {
        *(
            "run.json",
            "junit.xml",
            "results.sarif",
            "summary.md",
            "index.html",
            "run.log",
            "reports",
            "journal.jsonl",
        )
    }
    encoded = next(case for case in run.cases if case.ending is Ending.CRASH)
    for name in ("junit.xml", "results.sarif", "summary.md", "index.html"):
        assert "build_input_k_idxs" in (job.out / name).read_text(), name
    assert f"{encoded.id}: crash in" in (job.out / "run.log").read_text()
    assert run.environment.versions["llama.cpp"]
    assert [Path(model.path) for model in run.models] == [tiny]


def test_a_fixed_crash_is_said(tmp_path: Path, tiny: Path, dose: Dose) -> None:
    cases = matrix.choose(plan(tmp_path, tiny), "decode")
    job = ci.Job(cases, tmp_path / "out", tmp_path / "known.json", update=True)
    with pytest.MonkeyPatch.context():
        dose(Poison(min_sequences=2))
        assert [case.ending for case in do(job).cases] == [Ending.CRASH]
    dose(Poison(min_sequences=99))
    run = do(ci.Job(cases, job.out, job.baseline))
    assert [case.news for case in run.cases] == [News.FIXED]
    assert [fixed.cases for fixed in run.fixed] == [[cases[0].id]]
    assert ci.exit_code(run, update=False) == ci.AS_EXPECTED


def test_a_model_that_does_not_load_is_no_new_failure(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(tiny.read_bytes()[:5000])
    shapes = matrix.Matrix([Shape("decode"), Shape("safe")])
    os.mkfifo(tmp_path / "fifo.gguf")
    models = [tmp_path / f"{name}.gguf" for name in ("broken", "none", "fifo")]
    run = do(ci.Job(matrix.plan(shapes, models), tmp_path / "out"))
    assert {case.ending for case in run.cases} == {Ending.ERROR}
    assert all(case.detail for case in run.cases)
    assert ci.exit_code(run, update=False) == ci.INFRASTRUCTURE


# The directory, before and between.


def start(out: Path, plan: str = "p", *, resume: bool = False) -> Output:
    return Output(out, RunRecord("2026-11-21T00:00:00+00:00", 3), plan, resume=resume)


def finished(case: Case, ending: Ending = Ending.PASS) -> CaseRecord:
    return CaseRecord(case.id, case.model.name, case.shape, ending)


def test_resuming_keeps_what_is_known(tmp_path: Path) -> None:
    one, two, three = some(3)
    output = start(tmp_path / "out")
    output.append(finished(one))
    output.append(finished(two, Ending.ERROR))
    output.close()
    begun = json.loads((tmp_path / "out/run.json").read_bytes())
    assert (begun["complete"], begun["schema_version"]) == (False, 1)  # said, for programs of others
    journal = tmp_path / "out/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"id": "case 3", "mod')  # kill -9 in the middle of a line
    again = start(tmp_path / "out", resume=True)
    assert again.done == {one.id: finished(one)}
    again.append(finished(three))
    again.close()
    once_more = start(tmp_path / "out", resume=True)
    assert list(once_more.done) == [one.id, three.id]
    once_more.close()
    anew = start(tmp_path / "out")
    assert anew.done == {}
    anew.close()
    with pytest.raises(InputError, match="another matrix"):
        start(tmp_path / "out", "another", resume=True)


def test_bad_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/journal.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/run.log")
    (tmp_path / "link").mkdir()
    (tmp_path / "link/run.log").symlink_to(tmp_path / "file")
    for name, said in (
        ("pipe", "cannot be written"),
        ("link", "cannot be written"),
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("site", "index.html"),
        ("other", "of no run"),
    ):
        with pytest.raises(InputError, match=said):
            start(tmp_path / name)
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
    assert (tmp_path / "other/journal.jsonl").read_text() == '{"mine": 1}\n'
    first = start(tmp_path / "out")
    with pytest.raises(InputError, match="another run"):
        start(tmp_path / "out")
    first.close()


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "out").close()
    journal = tmp_path / "out/journal.jsonl"
    head = journal.read_bytes()
    for line in (b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n", b'{"id": 1}\n'):
        journal.write_bytes(head + line)
        with pytest.raises(InputError, match="cannot be read"):
            start(tmp_path / "out", resume=True)


def test_what_the_results_depend_on() -> None:
    one, two = some(2)
    limited = msgspec.structs.replace(one, memory=1 << 30)
    plans = [[one], [one, two], [limited], [msgspec.structs.replace(one, deadline=1.0)]]
    assert len({ci.digest(ci.Job(plan, Path("out"))) for plan in plans}) == len(plans)
    # What the machine has free, and how many run at once, are no part of the matrix.
    assert ci.digest(ci.Job([one], Path("out"), jobs=2, memory=1)) == ci.digest(ci.Job([one], Path("out")))


def test_the_log_of_a_run_is_one_line_a_record(tmp_path: Path) -> None:
    output = start(tmp_path / "out")
    record = logging.LogRecord("llama.cpp", logging.WARNING, "", 0, "a\nb\x1b[31m", (), None)
    output.log.handle(record)
    output.close()
    (line,) = (tmp_path / "out/run.log").read_text().splitlines()
    assert line.endswith(r"llama.cpp: a\nb\x1b[31m")


# The command.


def command(tmp_path: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    done = subprocess.run(
        [*COMMAND, "ci", *map(str, arguments)],
        cwd=tmp_path,
        env={**ours, **WARN_OF_FORKS, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "multi-threaded" not in done.stderr
    return done


def test_the_command_tells_github(tmp_path: Path, tiny: Path) -> None:
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "step.md")}
    (tmp_path / "step.md").write_text("before\n")
    (tmp_path / "m.toml").write_text(MATRIX)
    given = ("--matrix", "m.toml", "--model", tiny, "--only", "encode")
    done = command(tmp_path, *given, **github)
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"^new: crash: tiny encode 1x4.*build_input_k_idxs.*; report \S+$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^::error title=.*build_input_k_idxs", done.stdout, re.MULTILINE)
    assert re.match("before\n.*1 new failure", (tmp_path / "step.md").read_text())
    assert re.search(r"^crash +new .* tiny encode 1x4", done.stderr, re.MULTILINE)


def test_results_may_be_read_by_all_that_the_umask_lets(tmp_path: Path, tiny: Path) -> None:
    os.mkfifo(tmp_path / "step.md")
    (tmp_path / "m.toml").write_text("[[cases]]\n")
    baseline = os.fsdecode(b"\xff.json")  # no UTF-8
    given = ("--matrix", "m.toml", "--model", tiny, "--baseline", baseline, "--update-baseline")
    done = command(tmp_path, *given, GITHUB_STEP_SUMMARY=str(tmp_path / "step.md"))
    assert done.returncode == 0, done.stderr
    assert "step.md cannot be written: " in done.stderr  # nobody reads the pipe, and nobody waits for that
    umask = os.umask(0o077)
    os.umask(umask)
    for file in (tmp_path / baseline, *(tmp_path / "crumplezone-ci").glob("*.*")):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


def test_nobody_reads_what_it_says(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "m.toml").write_text("[[cases]]\ntokens = [1, 2]\n")
    read, write = os.pipe()
    os.close(read)
    arguments = [*COMMAND, "ci", "--matrix", "m.toml", "--model", str(tiny)]
    try:
        done = subprocess.run(arguments, cwd=tmp_path, stdout=write, stderr=write, timeout=100)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert runs.decode((tmp_path / "crumplezone-ci/run.json").read_bytes()).complete


def test_bad_usage_is_said_before_anything_runs(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "m.toml").write_text("[[cases]]\ntoken = 1\n")
    for arguments, said in (
        (["--matrix", "m.toml"], "cases[1].token is no key"),
        (["--update-baseline"], "needs --baseline"),
        (["--out", "m.toml"], "cannot be written"),
    ):
        done = command(tmp_path, "--model", tiny, *arguments)
        assert (done.returncode, done.stdout, said in done.stderr) == (2, "", True), done.stderr
    assert not (tmp_path / "crumplezone-ci").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(tmp_path: Path, tiny: Path, how: signal.Signals) -> None:
    (tmp_path / "m.toml").write_text('[[cases]]\npath = "decode"\ntokens = [1, 2, 3, 4, 5]\nn_threads = 1\n')
    arguments = [*COMMAND, "ci", "--matrix", "m.toml", "--model", str(tiny)]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"pass")
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert b"with --resume goes on" in stdout
    partial = runs.decode((tmp_path / "crumplezone-ci/run.json").read_bytes())
    assert not partial.complete
    assert 1 <= len(partial.cases) < 5
    done = command(tmp_path, "--matrix", "m.toml", "--model", tiny, "--resume", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    whole = runs.decode((tmp_path / "crumplezone-ci/run.json").read_bytes())
    assert (whole.complete, len(whole.cases), whole.started_at) == (True, 5, partial.started_at)
    kept = [
        json.loads(line)["id"]
        for line in (tmp_path / "crumplezone-ci/journal.jsonl").read_text().splitlines()[1:]
    ]
    assert sorted(kept) == sorted(case.id for case in whole.cases)  # none was run twice


def test_interrupted_after_the_last_case(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "m.toml").write_text("[[cases]]\n")
    arguments = [*COMMAND, "ci", "--matrix", "m.toml", "--model", str(tiny)]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"pass")
        process.send_signal(signal.SIGINT)  # it has yet to ask a cell what the model is, and to write it all
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"the same command with --resume goes on" in stdout + stderr
    done = command(tmp_path, "--matrix", "m.toml", "--model", tiny, "--resume")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "crumplezone-ci/journal.jsonl").read_text().splitlines()) == 1 + 1


def test_the_terminal_is_not_told_of_everything(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "m.toml").write_text(f"[[cases]]\nsequences = {list(range(2, 72))}\n")
    done = command(tmp_path, "--matrix", "m.toml", "--model", tiny)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert (said[0], said[-2]) == ("Crumplezone: 70 new failures", "and 6 more")
    assert sum(line.startswith("new: refused: ") for line in said) == 64


def test_the_workflow_and_the_document_use_options_that_there_are(tmp_path: Path) -> None:
    known = set(re.findall(r"--[a-z-]+", command(tmp_path, "--help", COLUMNS="200").stdout))
    for name in (".github/workflows/diagnostics.yml", "docs/ci.md"):
        used = re.findall(r"crumplezone ci\b(.*)", (ROOT / name).read_text())
        assert used, name
        assert set(itertools.chain.from_iterable(re.findall(r"--[a-z-]+", line) for line in used)) <= known
