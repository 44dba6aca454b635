"""What `doctor` learns of the model and of llama.cpp's build, from a cell that has both."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection
from pathlib import Path

from crumplezone.diagnostics.doctor import machine as doctor_machine
from crumplezone.diagnostics.doctor.check import Check, State, in_words
from crumplezone.errors import CellDied, CellRefused, ModelError
from crumplezone.reports.formats import text
from crumplezone.reports.records.report import Evidence, Report
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.sandbox.process.procfs import sizes
from crumplezone.workers.cells.targets import TARGETS
from crumplezone.workers.incidents.environment import environment
from crumplezone.workers.model.file import embedded_model
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CellInfo
from crumplezone.workers.protocol.messages import Warm, Warmed

_DEADLINE = 120.0  # seconds: a model of many gigabytes on a slow disk
_EVERY_JOB = "every job with this model"
_REBUILD = (
    "build it on this machine: pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
)
# Names of ggml-cpu.cpp, ggml_backend_cpu_get_features, and of /proc/cpuinfo: the kernel's
# arch/x86/include/asm/cpufeatures.h and arch/arm64/kernel/cpuinfo.c. ggml says 1 for what it was compiled
# with, whatever the processor can.
_FLAGS = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "AVX_VNNI": "avx_vnni", "F16C": "f16c",
    "FMA": "fma", "BMI2": "bmi2", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
    "NEON": "asimd", "FP16_VA": "asimdhp", "MATMUL_INT8": "i8mm", "DOTPROD": "asimddp", "SVE": "sve",
    "SME": "sme",
}  # fmt: skip


def examine(model: Path | None) -> list[Check]:
    """Load the model in a cell and have it decode a token; what its build says of itself.

    Args:
        model: [default: the embedded one]
    """
    try:
        path = (model or embedded_model()).absolute()
        config = configure(path, n_ctx=256, n_batch=32, n_threads=0)
    except ModelError as error:
        remedy = "--model with a GGUF file that this user may read"
        return [Check("model", State.LACK, str(error), _EVERY_JOB, remedy), _no_build("no model was loaded")]
    size, (left, who) = path.stat().st_size, doctor_machine.room()
    if size > left:
        found = f"{path.name} has {in_words(size)}, but {who} has {in_words(left)} left"
        costs = "every job: it is read from the disk again and again, or killed for memory"
        remedy = "a smaller model, a stronger quantisation, or more memory"
        return [Check("model", State.LACK, found, costs, remedy), _no_build("the model was not tried")]
    began = time.monotonic()
    try:
        with contextlib.closing(Cell(CellSpec(TARGETS["decode"], config, _DEADLINE))) as cell:
            info = cell.info(CellInfo)
            cell.call(Warm(), Warmed, _DEADLINE)
            peak = sizes(cell.pid).get("VmHWM", 0)
    except CellDied as died:
        return _died(path, Incident.of(died).evidence.result())
    except (OSError, RuntimeError, CellRefused) as error:
        found = f"{path.name} does not load: {error}"
        remedy = "download the file again, or a newer llama-cpp-python"
        return [Check("model", State.LACK, found, _EVERY_JOB, remedy), _no_build("no model was loaded")]
    took = time.monotonic() - began
    found = (
        f"{path.name} ({info.description}, {in_words(size)}) decoded a token {took:.1f} s after its cell was "
        f"started; the cell took {in_words(peak)}, {in_words(left)} were left"
    )
    return [Check("model", State.OK, found), build(info.system_info, environment(info).cpu_flags)]


def build(system_info: str, cpu_flags: Collection[str]) -> Check:
    """What llama.cpp was compiled for, against what this processor can.

    Args:
        system_info: What ``llama_print_system_info`` returns: "CPU : AVX2 = 1 | FMA = 1 | ...".
        cpu_flags: Those of /proc/cpuinfo.
    """
    if not cpu_flags:
        return _no_build("/proc/cpuinfo has no flags")
    compiled = {name for name in re.findall(r"(\w+) = 1\b", system_info) if name in _FLAGS}
    has = {name for name, flag in _FLAGS.items() if flag in cpu_flags}
    if alien := sorted(compiled - has):
        found = f"compiled for {', '.join(alien)}, which this processor lacks"
        return Check("llama.cpp build", State.LACK, found, "every job: SIGILL", _REBUILD)
    if unused := sorted(has - compiled):
        found = f"compiled without {', '.join(unused)}, which this processor has"
        return Check("llama.cpp build", State.LACK, found, "speed", _REBUILD)
    return Check("llama.cpp build", State.OK, f"uses what this processor has: {', '.join(sorted(compiled))}")


def _no_build(why: str) -> Check:
    return Check("llama.cpp build", State.UNKNOWN, f"not known: {why}")


def _died(path: Path, evidence: Evidence) -> list[Check]:
    found = f"{path.name}: {text.summary(Report('', '', evidence))}"
    remedy = "download the file again; if it crashes again, `crumplezone run` leaves a report of it"
    checks = [Check("model", State.LACK, found, _EVERY_JOB, remedy)]
    if evidence.fault and evidence.fault.name == "SIGILL":
        what = "it executed an instruction that this processor lacks (SIGILL)"
        return [*checks, Check("llama.cpp build", State.LACK, what, "every job", _REBUILD)]
    return [*checks, _no_build("the cell crashed")]
