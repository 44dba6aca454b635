"""The command line before any command: version, completion, --quiet and NO_COLOR, on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crumplezone
from tests.support.cli import COMMAND, read_until

MODULE = [sys.executable, "-m", "crumplezone"]
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d(?:;\d+)*m")  # console_codes(4), ECMA-48 SGR


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> list[str]:
    """Arguments of a `run` of two prompts that takes no time."""
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    given = f"--prompts in.txt --out out.jsonl --n-ctx 512 --n-seq-max 2 --max-tokens 4 --model {tiny}"
    return ["run", *given.split()]


def call(cwd: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "CRUMPLEZONE_REPORTS": str(cwd / "reports"), **env}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=given, capture_output=True, text=True, timeout=100
    )


def on_terminal(cwd: Path, *arguments: str, **env: str) -> str:
    """What a terminal of colours is sent."""
    ours, its = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    given = {**kept, "CRUMPLEZONE_REPORTS": str(cwd / "reports"), "TERM": "xterm-256color", **env}
    with subprocess.Popen([*MODULE, *arguments], cwd=cwd, env=given, stdin=its, stdout=its, stderr=its):
        os.close(its)
        shown = read_until(ours, b"").decode()
    os.close(ours)
    return shown


@pytest.mark.parametrize("command", [MODULE, COMMAND])
def test_the_version(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"crumplezone {crumplezone.__version__}\n")


def test_completion_is_on_and_clutters_no_other_help(tmp_path: Path) -> None:
    env = {"_CRUMPLEZONE_COMPLETE": "complete_bash", "COMP_WORDS": "crumplezone tri", "COMP_CWORD": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("crumplezone")],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["triage"]
    assert "--install-completion" in call(tmp_path, "--help").stdout
    for command in ("run", "exec", "triage", "triage list"):
        shown = call(tmp_path, *command.split(), "--help").stdout
        assert "--quiet" in shown
        assert "completion" not in shown


@pytest.mark.parametrize("behind", [False, True])
def test_quiet_leaves_results(tmp_path: Path, job: list[str], behind: bool) -> None:
    loud = call(tmp_path, *job)
    assert "2 prompts" in loud.stderr
    (tmp_path / "out.jsonl").unlink()
    done = call(tmp_path, *([*job, "--quiet"] if behind else ["-q", *job]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in written} == {"one", "two"}


def test_quiet_shows_no_progress_on_a_terminal(tmp_path: Path, job: list[str]) -> None:
    assert "prompts" in on_terminal(tmp_path, *job)
    (tmp_path / "out.jsonl").unlink()
    assert on_terminal(tmp_path, *job, "--quiet") == ""


def test_quiet_leaves_errors(tmp_path: Path, job: list[str]) -> None:
    (tmp_path / "in.txt").write_text("short\n" + "long " * 400 + "\n")
    failed = call(tmp_path, "--quiet", *job)
    assert (failed.returncode, "1 failed" in failed.stderr) == (1, True)
    (tmp_path / "out.jsonl").unlink()
    refused = call(tmp_path, "--quiet", *job, "--model", "nowhere.gguf")
    assert (refused.returncode, "cannot be read" in refused.stderr) == (3, True)


def test_quiet_leaves_what_ci_found(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "m.toml").write_text("[[cases]]\nsequences = 1\n")
    given = ("ci", "--matrix", "m.toml", "--model", str(tiny))
    assert "pass" in call(tmp_path, *given).stderr
    done = call(tmp_path, *given, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "results: crumplezone-ci/index.html" in done.stdout


def test_quiet_leaves_out_what_was_written(tmp_path: Path) -> None:
    page = ("triage", "html", "--out", "page.html")
    loud = call(tmp_path, *page).stderr
    assert ("No crash reports" in loud, "wrote page.html" in loud) == (True, True)
    (tmp_path / "page.html").unlink()
    assert call(tmp_path, *page, "--quiet").stderr == ""
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_no_color(tmp_path: Path, job: list[str], fails: bool) -> None:
    arguments = [*job, *(["--model", "nowhere.gguf"] if fails else [])]
    assert COLOUR.search(on_terminal(tmp_path, *arguments))
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    shown = on_terminal(tmp_path, *arguments, NO_COLOR="1")
    assert ("cannot be read" if fails else "2/2") in shown
    assert not COLOUR.search(shown)
    for usage in (["--help"], ["nonsense"], ["run"]):
        assert "\x1b[" not in on_terminal(tmp_path, *usage, NO_COLOR="1")
