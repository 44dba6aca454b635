"""What becomes of crashes: non-finite results, redacted reports, aborts without a sound, storms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crumplezone import Batch, Decoder, Rung, SafeBatchProcessor
from crumplezone.errors import SequenceError
from crumplezone.reports.records.report import Exit, Report, VerdictKind
from crumplezone.reports.store.store import Store
from crumplezone.reports.store.storm import FULL_PER_HOUR
from tests.support.cli import crumplezone
from tests.support.decoders import Dose, Open, read_all, reports_of
from tests.support.models.tiny_gguf import write_tiny_llama
from tests.support.native.decode_poison import Poison

# --- results that are no numbers


@pytest.fixture(scope="module")
def rotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last weights (blk.1.ffn_down) are NaN."""
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "rotten.gguf", n_vocab=128)
    whole, n_bytes = model.read_bytes(), 32 * 64 * 4
    model.write_bytes(whole[:-n_bytes] + b"\xff" * n_bytes)
    return model


def assert_explained(report: Report, last_phase: str) -> None:
    assert report.evidence.exit == Exit.NON_FINITE
    assert report.evidence.detail.startswith("NaN or infinity in the ")
    assert last_phase in [phase.name for phase in report.evidence.flight]
    assert any(thread.native for thread in report.evidence.threads)
    assert any(thread.python for thread in report.evidence.threads)
    assert report.signature is not None
    assert report.signature.fault_class == "non_finite"
    assert report.verdict is not None
    assert report.verdict.kind == VerdictKind.INPUT


def test_rows_that_are_not_finite_are_no_result(rotten: Path, make: Open, store: Store) -> None:
    decoder = make(rotten, 2)
    result = decoder.decode(Batch.of([[4, 5], [6]]))
    assert list(result.errors) == [0, 1]
    for seq_id in (0, 1):
        with pytest.raises(SequenceError, match="NaN or infinity in the logits"):
            result.logits(seq_id)
    written = reports_of(decoder, store)
    assert [report.rung for report in written] == ["native", "safe", "token", "safe", "token"]
    for report in written:
        assert_explained(report, "copy")
        assert report.blamed == [0, 1]
    hidden = decoder.encode(Batch.of([[4, 5]]))
    assert "NaN or infinity in the embeddings" in str(hidden.errors[0])


def test_no_token_is_drawn_from_what_is_not_finite(rotten: Path, make: Open, store: Store) -> None:
    decoder = make(rotten, 1)
    (completion,) = decoder.generate(["abc"], max_tokens=4)
    assert isinstance(completion.error, SequenceError)
    assert (completion.finish_reason, completion.text, completion.tokens) == ("error", "", [])
    written = reports_of(decoder, store)
    assert [report.rung for report in written] == ["native", "safe", "token"]
    for report in written:
        assert_explained(report, "sample")


# --- redaction


TOKENS = [20011, 21013, 22027, 23029]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with token ids that no other number of a report looks like."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "wordy.gguf", n_vocab=24_000)


def crash_a_decoder(model: Path, store: Store, *, redact: bool) -> None:
    with Decoder(model, n_threads=1, preflight=False, reports=store.directory, redact=redact) as decoder:
        assert decoder.encode(Batch.of([TOKENS])).errors == {}


def crash_a_safe_processor(model: Path, store: Store, *, redact: bool) -> None:
    with SafeBatchProcessor(model, n_threads=1, reports=store.directory, redact=redact) as safe:
        assert list(safe.decode(Batch.of([TOKENS])).errors) == [0]


@pytest.mark.parametrize("crash", [crash_a_decoder, crash_a_safe_processor])
def test_a_redacted_report_tells_no_secret(
    crash: Callable[..., None], wordy: Path, store: Store, dose: Dose, tmp_path: Path
) -> None:
    if crash is crash_a_safe_processor:
        dose(Poison(token=TOKENS[2]))
    open_store = Store(tmp_path / "open")
    crash(wordy, store, redact=True)
    crash(wordy, open_store, redact=False)
    redacted, plain = read_all(store), read_all(open_store)
    assert [each.signature and each.signature.id for each in redacted] == [
        each.signature and each.signature.id for each in plain
    ]
    for secret, known in zip(redacted, plain, strict=True):
        assert (secret.redacted, known.redacted) == (True, False)
        told, whole = (
            (place.path(each.id) / "report.json").read_text()
            for place, each in ((store, secret), (open_store, known))
        )
        told += (store.path(secret.id) / "report.txt").read_text()
        for pattern in (*(rf"\b{token}\b" for token in TOKENS), r"(?<![\w.)-])/[\w.-]+/"):
            assert re.search(pattern, whole)
            assert not re.search(pattern, told), re.search(pattern, told)
        assert secret.batch is not None
        assert len(set(secret.batch.tokens)) == len(TOKENS)

    done = crumplezone("triage", "replay", redacted[0].id, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "this report is redacted: its token ids are hashes, so its batch cannot be sent again" in done.stderr
    )


# --- aborts


ABORT = """
import logging, sys
from crumplezone import Batch, Decoder
if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    model, reports = sys.argv[1:]
    with Decoder(model, n_batch=32, n_seq_max=2, n_threads=1, preflight=False, reports=reports) as decoder:
        result = decoder.decode(Batch.of([[5] * 20, [6] * 20]))
    assert result.errors == {}
    print(result.rung(0))
"""


def test_an_abort_makes_no_sound_and_calls_no_debugger(tiny: Path, store: Store, tmp_path: Path) -> None:
    # ggml_print_backtrace forks gdb, or else lldb, unless it is told not to (ggml/src/ggml.c).
    called, tools = tmp_path / "called", tmp_path / "bin"
    tools.mkdir()
    for name in ("gdb", "lldb"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> '{called}'\n")
        (tools / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "GGML_NO_BACKTRACE"}
    env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-c", ABORT, str(tiny), str(store.directory)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "safe\n", "")
    assert not called.exists()
    (report,) = read_all(store)
    assert report.evidence.exit == Exit.ABORT
    assert report.evidence.assertion is not None
    assert "GGML_ASSERT(n_tokens_all <= cparams.n_batch) failed" in report.evidence.assertion.text
    assert report.evidence.assertion.file.endswith("llama-context.cpp")
    assert report.evidence.assertion.line > 0


# --- storms


def test_a_storm_of_equal_crashes_keeps_counting(tiny: Path, make: Open, store: Store) -> None:
    decoder = make(tiny, 1, preflight=False)
    results = []
    for _ in range(12):
        results.append(decoder.encode(Batch.of([[4, 5]])))
        decoder.flush_reports()  # so that each has its turn at the unwinder
    assert {result.rung(0) for result in results} == {Rung.SAFE}
    written = reports_of(decoder, store)
    paths = [path for result in results for path in result.reports]
    assert paths == [str(store.path(report.id)) for report in written]
    assert all(Path(path, "report.json").exists() for path in paths)
    full, slim = written[:FULL_PER_HOUR], written[FULL_PER_HOUR:]
    assert (len(full), len(slim)) == (8, 4)
    assert all(report.batch and report.evidence.threads and not report.same_as for report in full)
    assert {report.same_as for report in slim} <= {report.id for report in full}
    assert all(report.batch is None and report.evidence.fault for report in slim)
    assert len({report.signature and report.signature.id for report in written}) == 1
