"""Models of other quantisations, made from the embedded one and kept in a cache folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peer import Peer, serve
from crumplezone import embedded_model

QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")


def model(quant: str, cache: Path) -> Path:
    """The path of SmolLM2 in this quantisation; "Q4_1" is the embedded file itself.

    Raises:
        PeerError: llama.cpp could not make it.
    """
    source = embedded_model()
    if quant == "Q4_1":
        return source
    path = cache / f"{source.stem.rsplit('.', 1)[0]}.{quant}.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        with Peer("models") as peer:  # llama.cpp has no place in the process that measures
            peer.ask("quantise", source=str(source), target=str(half), quant=quant)
        half.rename(path)
    return path


def _quantise(source: str, target: str, quant: str) -> None:
    import llama_cpp.llama_cpp as C  # noqa: N812 - the C API

    params = C.llama_model_quantize_default_params()
    params.ftype = getattr(C, f"LLAMA_FTYPE_MOSTLY_{quant}")
    params.allow_requantize = True  # the embedded model is Q4_1: good enough to be timed
    if C.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama_model_quantize cannot make {quant}")


if __name__ == "__main__":
    serve(lambda: {"quantise": _quantise})
