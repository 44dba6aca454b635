"""A run and reports to make pages of."""

from __future__ import annotations

from itertools import product

from msgspec.structs import replace

from crumplezone.reports.html import page
from crumplezone.reports.records.report import (
    BatchRecord,
    Frame,
    Held,
    LadderStep,
    ModelRecord,
    Outcome,
    Phase,
    Report,
    Sample,
    Signature,
    Thread,
    Verdict,
    VerdictKind,
)
from crumplezone.reports.records.run import CaseRecord, Ending, Fixed, News, RunRecord, Shape
from tests.support.records.reports import TOP, full

HOSTILE = (
    "</script></style></title></textarea>--><script>owned=1</script><img src=//x.test/i onerror=owned=1>"
    "\"' onload='owned=1' href=javascript:owned=1 {policy} \u2028\u202e\x1b[31m\udc80"
)
MODELS = ("SmolLM2-135M-Instruct.Q4_1.gguf", "bge-small-en-v1.5-f16.gguf")
ENCODE = Signature(
    "a1740eb345be7fbfe09e650f02fff3968ecd03b721dd750aa53d0901929a708e",
    "SIGSEGV",
    ["llama_kv_cache_context::build_input_k_idxs"],
    "SIGSEGV in llama_kv_cache_context::build_input_k_idxs",
)
SHAPES = [
    *(Shape(sequences=n, tokens=tokens) for n, tokens in ((1, 1), (1, 10), (3, 10), (16, 512))),
    Shape(sequences=3, tokens=10, kv_unified=True),
    Shape(sequences=3, tokens=10, type_k="q8_0", type_v="q8_0", flash_attn="on"),
    Shape(sequences=16, tokens=512, n_ubatch=32),
    Shape(sequences=16, tokens=512, n_threads=1),
]
ENDINGS = {
    ("safe", 0): (Ending.ERROR, News.UNKNOWN, "model.gguf cannot be read: no such file"),
    ("decode", 5): (Ending.MISMATCH, News.NEW, "sequence 2 differs at token 4"),
    ("decode", 6): (Ending.HANG, News.NEW, "over its deadline of 20 s"),
    ("process", 7): (Ending.OOM, News.KNOWN, "over its limit of 512 MiB"),
    ("process", 4): (Ending.REFUSED, News.KNOWN, "n_ubatch: 8 is less than 16 sequences"),
    ("process", 2): (Ending.PASS, News.FIXED, ""),
}
PATHS = ("decode", "process", "encode", "embed", "safe")


def report(number: int = 0, hostile: str = "", sequences: int = 3, length: int = 12) -> Report:
    """A report with every picture in it, `hostile` in every string."""
    found = full(f"20261121T06{number // 60:02}{number % 60:02}Z-3f9a1c", hostile)
    python = [Frame(f"run{n}{hostile}", file=f"/app/run.py{hostile}", line=n) for n in range(4)]
    runtime = [Frame(f"ffi_call{hostile}", "/lib/libffi.so.8", offset=f"0x{n}a{hostile}") for n in range(6)]
    mine = [
        replace(TOP, symbol=TOP.symbol + hostile),
        Frame(
            f"llama_context::encode(llama_batch const&){hostile}",
            f"/lib/libllama.so{hostile}",
            offset="0x1ea60c",
        ),
    ]
    evidence = replace(
        found.evidence,
        threads=[Thread(7, f"main{hostile}", crashed=True, native=[*mine, *runtime, mine[1]], python=python)]
        + [Thread(n, f"worker{hostile}", doing="futex", native=runtime) for n in range(8, 11)],
        samples=[Sample(ms, int(3.4e8 - 1e4 * ms), 9.0 - ms / 1000) for ms in range(5600, 0, -100)],
        flight=[
            Phase(f"{name}{hostile}", 24, 5000.0 - 400 * n + at, took)
            for n in range(12)
            for at, name, took in ((40.0, "build", 0.4), (38.0, "decode", 37.0), (1.0, "sample", 0.5))
        ]
        + [Phase(f"encode{hostile}", 54, 26.6)],
        peak_rss=358_285_312,
    )
    blamed = min(1, sequences - 1)
    owners = [seq for seq in range(sequences) for _ in range(length)]
    return replace(
        found,
        crashed_at=f"2026-11-{1 + number % 20:02}T06:04:11Z",
        evidence=evidence,
        batch=BatchRecord(
            tokens=[5] * len(owners),
            positions=[4 + n for _ in range(sequences) for n in range(length)],
            seq_ids=owners,
            outputs=[n == length - 1 for _ in range(sequences) for n in range(length)],
            operation=f"encode{hostile}",
            held=[Held(0, [1, 2, 3, 4], [0, 1, 2, 3])],
            passes=[16, 16, 4],
        ),
        ladder=[
            LadderStep(
                "native" + hostile, Outcome.CRASHED, list(range(sequences)), f"cell 7: crashed{hostile}", 46.0
            ),
            *(
                LadderStep("safe", Outcome.CRASHED if n == blamed else Outcome.OK, [n], ms=500.0 + n)
                for n in range(sequences)
            ),
            LadderStep("token", Outcome.REFUSED, [blamed], f"rc 1{hostile}", 80),
        ],
        blamed=[blamed],
        result=f"cured by the rung safe; sequence {blamed} has no result{hostile}",
        signature=replace(
            ENCODE,
            id=f"{number % 7:x}{ENCODE.id[1:]}{hostile}",
            title=f"{ENCODE.title} {number % 7}{hostile}",
            confidence="low" if number % 7 == 3 else "high",
        ),
        verdict=Verdict(VerdictKind.INPUT, f"sequence {blamed} crashed alone too{hostile}"),
    )


def run(hostile: str = "") -> RunRecord:
    """Two models x 40 cases; the encode cases crash with the signature of `report`."""
    cases = []
    for model, path, (at, shape) in product(MODELS, PATHS, enumerate(SHAPES)):
        ending, news, detail = ENDINGS.get((path, at), (Ending.PASS, News.EXPECTED, ""))
        signature, crash = None, ""
        if path == "encode" and model == MODELS[0]:
            ending, news, detail = Ending.CRASH, News.NEW if at < 2 else News.KNOWN, "SIGSEGV"
            signature, crash = report(hostile=hostile).signature, report().id
        said = {"text": f"the cat sat{hostile}", "safe_text": f"the cat ran{hostile}"}
        cases.append(
            CaseRecord(
                f"{model.removesuffix('.gguf')} {path} {shape.sequences}x{shape.tokens} #{at}{hostile}",
                model + hostile,
                replace(shape, path=path),
                ending,
                news,
                detail + hostile,
                signature,
                crash,
                812.5,
                341 << 20,
                **(said if ending is Ending.MISMATCH else {}),
            )
        )
    return RunRecord(
        started_at=f"2026-11-21T06:04:11Z{hostile}",
        planned=len(cases),
        cases=cases,
        ended_at=f"2026-11-21T06:05:44Z{hostile}",
        complete=True,
        shard=f"1/2{hostile}",
        models=[ModelRecord(f"/models/{model}{hostile}", 98 << 20, description=hostile) for model in MODELS],
        environment=report(hostile=hostile).environment,
        baseline=f"known.json{hostile}",
        fixed=[Fixed(f"ffff{hostile}", f"abort: GGML_ASSERT(x){hostile}", [f"a case{hostile}"])],
    )


def everything(hostile: str = "") -> str:
    """A page with every part in it."""
    return page.render(run(hostile), [report(0, hostile), report(1, hostile)])
