"""The command line, as a user runs it: real processes, real weights, kill -9 included."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cli import COMMAND, crumplezone
from tests.support.models import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    tiny_gguf.write_tiny_llama(path, n_vocab=128)
    return path


def run(tmp_path: Path, model: Path, prompts: str, *more: str) -> subprocess.CompletedProcess[str]:
    given = ("--model", model, "--prompts", prompts, "--out", "out.jsonl", "--max-tokens", "8")
    return crumplezone("run", *given, *more, cwd=tmp_path)


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_demo_survives_a_real_crash(tmp_path: Path) -> None:
    done = crumplezone("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SIGSEGV" in done.stdout
    assert "cured by the rung safe" in done.stdout
    (report,) = (tmp_path / "reports").glob("[!.]*")
    assert str(report) in done.stdout
    listed = crumplezone("triage", "list", cwd=tmp_path)
    assert report.name in listed.stdout
    shown = crumplezone("triage", "show", report.name, cwd=tmp_path)
    assert "llama_context::encode" in shown.stdout
    assert crumplezone("triage", "show", "nonsense", cwd=tmp_path).returncode == 2


def test_run_txt_jsonl_and_stdin(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    done = run(tmp_path, model, "a.txt")
    assert done.returncode == 0, done.stderr
    assert sorted((line["index"], line["prompt"]) for line in lines(tmp_path)) == [
        (0, "one"),
        (1, "two"),
        (2, "three"),
    ]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "id": 7}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    again = run(tmp_path, model, "b.jsonl")
    assert (again.returncode, len(lines(tmp_path))) == (0, 3)
    (tmp_path / "out.jsonl").unlink()
    piped = crumplezone(
        "run", "--model", model, "--prompts", "-", "--out", "out.jsonl", cwd=tmp_path, stdin="from stdin\n"
    )
    assert (piped.returncode, lines(tmp_path)[0]["prompt"]) == (0, "from stdin")


def test_seeds_and_stop_strings(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("one\none\none\n")

    def completions(*options: str) -> list[str]:
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        done = run(tmp_path, model, "in.txt", "--temperature", "1", *options)
        assert done.returncode == 0, done.stderr
        return [line["completion"] for line in sorted(lines(tmp_path), key=lambda line: line["index"])]

    seeded = completions("--seed", "3")
    assert completions("--seed", "3") == seeded
    assert len(set(seeded)) == 3
    assert completions("--seed", "4")[:2] == seeded[1:]
    assert completions() != seeded
    stop = seeded[0][2]
    assert completions("--seed", "3", "--stop", stop, "--stop", "nowhere")[0] == seeded[0].partition(stop)[0]
    wrong = run(tmp_path, tmp_path / "no such model", "in.txt", "--stop", "")
    assert (wrong.returncode, "stop[0]" in wrong.stderr) == (2, True)


def test_kill_and_run_again_completes_each_prompt_once(tmp_path: Path) -> None:
    prompts = [f"number {i} of the prompts is" for i in range(24)]
    (tmp_path / "in.txt").write_text("\n".join(prompts) + "\n")
    arguments = ["run", "--prompts", "in.txt", "--out", "out.jsonl", "--max-tokens", "12", "--n-seq-max", "2"]
    with subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.PIPE) as first:
        out = tmp_path / "out.jsonl"
        wait_for_lines(out, 3, first)
        children = psutil.Process(first.pid).children(recursive=True)
        pidfds = [os.pidfd_open(child.pid) for child in children]
        first.kill()
    assert pidfds
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 1)[0], "a cell outlived its supervisor by a second"
        os.close(pidfd)
    with out.open("a") as file:
        file.write('{"index": 23, "prom')  # as a kill in the middle of a write would leave it
    again = crumplezone(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sorted(line["index"] for line in lines(tmp_path)) == list(range(24))
    assert "were there already" in again.stderr


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    libc, modified = ctypes.CDLL(None), 2  # IN_MODIFY
    with (
        open(libc.inotify_init1(os.O_CLOEXEC), "rb", buffering=0) as changes,
        open(os.pidfd_open(process.pid), "rb", buffering=0) as end,
    ):
        assert libc.inotify_add_watch(changes.fileno(), os.fsencode(path.parent), modified) >= 0
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            ready, _, _ = select.select([changes, end], [], [], 60)
            assert ready == [changes], end in ready and process.stderr and process.stderr.read()
            changes.read(65536)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.jsonl", '{"prompt": "fine"}\n{"prompt": \n', "line 2"),
        ("in.jsonl", '{"prompt": 3}\n', "line 1"),
        ("in.txt", "fine\n\nfine\n", "line 2"),
        ("in.txt", "", "no line"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_bad_prompts_are_one_clear_error(
    tmp_path: Path, model: Path, name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = run(tmp_path, model, name)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_models_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("hello\n")
    (tmp_path / "text.gguf").write_text("this is no model at all, only text")
    (tmp_path / "empty.gguf").touch()
    tiny_gguf.write_truncated(tmp_path / "truncated.gguf")
    tiny_gguf.write_block_count_zero(tmp_path / "aborts.gguf")
    expected = {
        "nowhere.gguf": "cannot be read",
        "empty.gguf": "is empty",
        "text.gguf": "is not GGUF",
        "truncated.gguf": "not within the file bounds",
        "aborts.gguf": "GGML_ASSERT",
    }
    for name, said in expected.items():
        done = run(tmp_path, Path(name), "in.txt")
        assert done.returncode == 3, done.stderr
        assert said in done.stderr
        assert name in done.stderr
        assert "Traceback" not in done.stderr


def test_bad_output(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("hello\n")
    done = crumplezone("run", "--model", model, "--prompts", "in.txt", "--out", "no/such/dir/o", cwd=tmp_path)
    assert (done.returncode, "cannot be written" in done.stderr) == (2, True)
    (tmp_path / "out.jsonl").write_text('{"index": 0, "prompt": "another"}\n')
    done = run(tmp_path, model, "in.txt")
    assert (done.returncode, "line 1 of --out" in done.stderr) == (2, True)
    assert "another" in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (("triage", "list", "--reports", "s3://bucket"), "--reports"),
        (("exec", "--reports", "s3://bucket", "--", "true"), "--reports"),
        (("demo", "--reports", "s3://bucket"), "reports"),
        (("ci", "--out", "s3://bucket/run"), "--out"),
    ],
)
def test_a_url_makes_no_directory(command: tuple[str, ...], field: str, tmp_path: Path) -> None:
    done = crumplezone(*command, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{field} is 's3:/bucket" in done.stderr
    assert "directory on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("hello\n")
    (tmp_path / "out.jsonl").write_text("precious, and without a line end")
    done = run(tmp_path, model, "in.txt")
    assert (done.returncode, "last line of --out" in done.stderr) == (2, True)
    assert (tmp_path / "out.jsonl").read_text() == "precious, and without a line end"


def test_fifos_and_deep_json_are_refused_at_once(tmp_path: Path, model: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "in.txt").write_text("hello\n")
    (tmp_path / "deep.jsonl").write_text('{"prompt": "x", "a": ' + "[" * 100_000)
    assert "not a regular file" in run(tmp_path, Path("fifo"), "in.txt").stderr
    given = ("run", "--model", model, "--prompts", "in.txt", "--out", "fifo")
    assert crumplezone(*given, cwd=tmp_path).returncode == 2
    deep = run(tmp_path, model, "deep.jsonl")
    assert (deep.returncode, "line 1" in deep.stderr, "Traceback" in deep.stderr) == (2, True, False)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("hello\n", encoding="utf-8-sig")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n', encoding="utf-8-sig")
    assert run(tmp_path, model, "in.txt").returncode == 0
    (line,) = lines(tmp_path)
    assert line["prompt"] == "hello"
    out = tmp_path / "out.jsonl"
    out.write_text(out.read_text(), encoding="utf-8-sig")  # from an editor, with the answer
    done = run(tmp_path, model, "in.jsonl")
    assert (done.returncode, len(out.read_bytes().splitlines())) == (0, 1), done.stderr


def test_a_prompt_that_does_not_fit_fails_alone(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("short\n" + "long " * 300 + "\nalso short\n")
    done = run(tmp_path, model, "in.txt", "--n-ctx", "256", "--n-seq-max", "1")
    assert done.returncode == 1, done.stderr
    by_index = {line["index"]: line for line in lines(tmp_path)}
    assert "256 tokens per sequence" in by_index[1]["error"]
    assert [by_index[i].get("error") for i in (0, 2)] == [None, None]


def test_interrupt_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a prompt\n" * 50)
    arguments = ["run", "--prompts", "in.txt", "--out", "out.jsonl", "--max-tokens", "8", "--n-seq-max", "2"]
    with subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.PIPE) as process:
        wait_for_lines(tmp_path / "out.jsonl", 2, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert len(lines(tmp_path)) >= 2
