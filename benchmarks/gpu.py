"""Whether there is a GPU to use, and how much of it a supervised decoder takes."""

from __future__ import annotations

import shutil
import subprocess
import tempfile

from benchmarks.models import model
from benchmarks.pairing import one
from benchmarks.rows import Plan, Row
from crumplezone import Batch, Decoder


def absence() -> str:
    """Why there is no GPU use to measure; empty if there is."""
    if shutil.which("nvidia-smi") is None:
        return "no GPU on this machine (no nvidia-smi)"
    return ""


def row(plan: Plan) -> Row:
    """GPU memory of a cell that has all layers of the embedded model on the GPU."""
    with (
        tempfile.TemporaryDirectory() as reports,
        Decoder(model("Q4_1", plan.cache), n_seq_max=1, n_gpu_layers=999, reports=reports) as decoder,
    ):
        decoder.decode(Batch.of([[1, 2, 3]]))
        used = _used_mib(decoder.pid)
    if not used:
        return Row("matrix", "GPU use", None, "MiB", note="this llama.cpp is built without GPU support")
    return Row("matrix", "GPU use, all layers", one(used), "MiB")


def _used_mib(pid: int | None) -> float:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split(",") for line in listed.splitlines()]
    return sum(float(used) for found, used in lines if int(found) == pid)
