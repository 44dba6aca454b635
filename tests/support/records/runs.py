"""Diagnostic runs to test with."""

from __future__ import annotations

from typing import Any

from crumplezone.reports.records.report import Environment, ModelRecord, Signature
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, RunRecord, Shape
from tests.support.records.reports import ID

MODEL = "tiny.gguf"
ENCODE = Signature("ab" * 32, "SIGSEGV", ["llama_context::encode", "llama_encode"], "SIGSEGV in encode")


def case(name: str, ending: Ending, news: News, hostile: str = "", **fields: Any) -> CaseRecord:
    """A case with `hostile` in every string that a file or a child chooses."""
    return CaseRecord(
        id=f"{MODEL} {name}{hostile}",
        model=MODEL + hostile,
        ending=ending,
        news=news,
        **{"shape": Shape(), "detail": f"{ending.value} it was{hostile}", "ms": 1500.0, **fields},
    )


def full_run(hostile: str = "", **fields: Any) -> RunRecord:
    """A run with a case of every kind."""
    keys = [key + hostile for key in ENCODE.key]
    signature = Signature(ENCODE.id + hostile, "SIGSEGV" + hostile, keys, ENCODE.title + hostile)
    crash: dict[str, Any] = {"signature": signature, "report": ID}
    cases = [
        case("decode 1x1", Ending.PASS, News.EXPECTED, hostile, detail=""),
        case("decode 3x10", Ending.PASS, News.FIXED, hostile, detail="", shape=Shape("decode", 3, 10)),
        case("encode 1x1", Ending.CRASH, News.NEW, hostile, shape=Shape("encode"), **crash),
        case("encode 3x10", Ending.CRASH, News.NEW, hostile, shape=Shape("encode", 3, 10), **crash),
        case(
            "decode 3x10 q8_0",
            *(Ending.MISMATCH, News.NEW, hostile),
            shape=Shape("decode", 3, 10, type_k="q8_0", kv_unified=True),
            text="one" + hostile,
            safe_text="two" + hostile,
        ),
        case("process 1x1", Ending.HANG, News.KNOWN, hostile, shape=Shape("process")),
        case("process 3x10", Ending.OOM, News.KNOWN, hostile, shape=Shape("process", 3, 10)),
        case("embed 3x1", Ending.REFUSED, News.KNOWN, hostile, shape=Shape("embed", 3, 1)),
        case("safe 1x1", Ending.ERROR, News.UNKNOWN, hostile, shape=Shape("safe")),
    ]
    given: dict[str, Any] = {
        "planned": len(cases),
        "cases": cases,
        "complete": True,
        "models": [ModelRecord(f"/models/{MODEL}{hostile}", 1)],
        "environment": Environment({"llama.cpp": "b1" + hostile}, "a CPU" + hostile),
        "baseline": "known.json" + hostile,
        "fixed": [Fixed("cd" * 32 + hostile, "abort in split" + hostile, [f"{MODEL} decode 3x10{hostile}"])],
    }
    return RunRecord(started_at="2026-11-21T15:00:00+00:00", **given | fields)
