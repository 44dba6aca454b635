"""Parameters of models and contexts: as `llama_cpp.Llama` has them, checked, kept in reports and scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumplezone import Decoder
from crumplezone.diagnostics.replay.recipe import read_recipe
from crumplezone.diagnostics.replay.script import script
from crumplezone.errors import InputError
from crumplezone.reports.store.store import Store
from crumplezone.workers.model.parameters import PARAMETERS, check_parameters, parameters_of
from crumplezone.workers.model.settings import configure
from crumplezone.workers.protocol.config import CACHE_TYPES, ROPE_SCALING, SPLIT_MODES, CellConfig
from crumplezone.workers.width import cache as width_cache
from tests.support.decoders import PROMPTS as CRASHED
from tests.support.decoders import Dose, Open, batch_of, outcome, report_of, reports_of
from tests.support.native.decode_poison import Poison
from tests.support.paths import ROOT
from tests.support.reference.llama_contexts import N_TOKENS, OPTIONS, PROMPTS

SIZES: dict[str, Any] = {"n_ctx": 1024, "n_batch": 512, "n_threads": 1}
ODD: dict[str, Any] = {
    "flash_attn": "on",
    "type_k": "q8_0",
    "type_v": "q8_0",
    "kv_unified": True,
    "n_threads_batch": 2,
    "rope_scaling_type": "yarn",
    "rope_freq_base": 20000.0,
    "rope_freq_scale": 0.5,
    "yarn_ext_factor": 0.5,
    "yarn_attn_factor": 0.9,
    "yarn_beta_fast": 30.0,
    "yarn_beta_slow": 2.0,
    "yarn_orig_ctx": 128,
    "offload_kqv": False,
    "op_offload": False,
    "swa_full": False,
    "use_mmap": False,
    "use_mlock": True,
    "split_mode": "row",
    "main_gpu": 1,
    "tensor_split": (0.5, 1.5),
}


def program(what: str, argument: str) -> Any:
    """In a process of its own: this one never loads llama.cpp."""
    command = [sys.executable, "-m", "tests.support.reference.llama_contexts", what, argument]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300).stdout)


@cache
def originals(model: Path) -> Any:
    return program("main", str(model))


def test_cells_get_the_parameters_of_llama(smollm: Path) -> None:
    configs = [configure(smollm, **SIZES | {"n_ctx": 512}, **options) for options in OPTIONS]
    found = program("ours", msgspec.json.encode(configs).decode())
    for (model, context), (its_model, its_context, _) in zip(found, originals(smollm), strict=True):
        assert model == its_model
        for name in its_context.keys() - {"n_threads_batch", "no_perf"}:
            assert context[name] == its_context[name], name
    assert [context["n_threads_batch"] for _, context in found] == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_greedy_texts_are_those_of_llama(smollm: Path, make: Open, number: int) -> None:
    decoder = make(smollm, 4, **OPTIONS[number])
    texts = [done.text for done in decoder.generate(PROMPTS, max_tokens=N_TOKENS)]
    assert texts == originals(smollm)[number][2]


def test_every_parameter_reaches_llama_cpp(tiny: Path) -> None:
    assert ODD.keys() == PARAMETERS
    usual = configure(tiny, **SIZES)
    (model, context), (odd_model, odd_context) = program(
        "ours", msgspec.json.encode([usual, configure(tiny, **SIZES, **ODD)]).decode()
    )
    same = {name for name in context if context[name] == odd_context[name]}
    assert not same & {name if name != "flash_attn" else "flash_attn_type" for name in ODD}
    assert {name for name in model if model[name] != odd_model[name]} == {
        "load_mode",
        "split_mode",
        "main_gpu",
    }


def test_numbers_names_and_none_are_the_same() -> None:
    names = parameters_of(
        {"type_k": "q8_0", "rope_scaling_type": "yarn", "split_mode": "row", "flash_attn": "on"}
    )
    assert names == parameters_of({"type_k": 8, "rope_scaling_type": 2, "split_mode": 2, "flash_attn": True})
    nothing = parameters_of({"type_k": None, "type_v": None, "op_offload": None, "swa_full": None})
    assert CellConfig("m", 1, 1, 1, 1, 1, **nothing) == CellConfig("m", 1, 1, 1, 1, 1, **parameters_of({}))
    numpy: Any = {"n_threads_batch": np.int32(2), "kv_unified": np.True_, "tensor_split": np.ones(2)}
    ours = parameters_of(numpy)
    assert msgspec.json.encode(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type_k": "q2_k"}, "type_k is 'q2_k': must be one of f32, f16"),
        ({"type_k": 4}, "type_k is 4: must be one of"),
        ({"type_v": True}, "type_v is True: must be one of"),
        ({"type_v": "q8_0", "flash_attn": False}, "type_v is 'q8_0': is quantised, which needs flash_attn"),
        ({"flash_attn": 2}, "flash_attn is 2: must be from -1 to 1"),
        ({"rope_scaling_type": "x"}, "rope_scaling_type is 'x': must be one of unspecified, none"),
        ({"rope_freq_base": float("nan")}, "rope_freq_base is nan: must be a number from 0"),
        ({"yarn_ext_factor": -2}, "yarn_ext_factor is -2: must be a number from -1"),
        ({"yarn_orig_ctx": 1.5}, "yarn_orig_ctx is 1.5: must be an integer; must be from 0"),
        ({"n_threads_batch": 513}, "n_threads_batch is 513: must be from 0 to 512"),
        ({"use_mmap": 1}, "use_mmap is 1: must be True or False"),
        ({"main_gpu": 16}, "main_gpu is 16: must be from -1 to 15"),
        ({"split_mode": "tensor", "flash_attn": "off"}, "split_mode is 'tensor': needs flash_attn"),
        ({"tensor_split": [1, -1]}, r"tensor_split\[1\] is -1: must be a number from 0"),
        ({"tensor_split": [1] * 17}, "tensor_split is .*: must be a list of at most 16"),
        ({"tensor_split": "1,2"}, "tensor_split is '1,2': must be a list"),
    ],
)
def test_what_cannot_be_is_refused_before_any_native_call(
    tiny: Path, store: Store, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Decoder(tiny, reports=store.directory, **options)


def test_what_is_no_parameter(tiny: Path) -> None:
    with pytest.raises(TypeError, match="'flash_attention' is no parameter; there are also flash_attn, "):
        configure(tiny, **SIZES, flash_attention=True)  # type: ignore[call-arg]


PARAMETER = {
    "flash_attn": st.sampled_from(["on", "auto"]),  # anything goes with these
    **{name: st.sampled_from(sorted(CACHE_TYPES)) for name in ("type_k", "type_v")},
    "rope_scaling_type": st.sampled_from(sorted(ROPE_SCALING)),
    "split_mode": st.sampled_from(sorted(SPLIT_MODES)),
    **{name: st.booleans() for name in ODD if isinstance(ODD[name], bool)},
    **{name: st.floats(0, 1000) for name in ODD if isinstance(ODD[name], float)},
    **{name: st.integers(0, 15) for name in ("n_threads_batch", "yarn_orig_ctx", "main_gpu")},
    "tensor_split": st.lists(st.floats(0, 1e6), max_size=16),
}


@given(st.fixed_dictionaries({}, optional=PARAMETER))
def test_a_report_has_what_was_given(options: dict[str, Any]) -> None:
    config = CellConfig("m.gguf", 512, 64, 64, 1, 1, **parameters_of(options))  # type: ignore[arg-type]
    context = msgspec.json.decode(msgspec.json.encode(config.parameters()))
    report = msgspec.convert(
        msgspec.to_builtins(report_of(batch_of([5]), "m.gguf", context=context)), type(report_of(None))
    )
    assert read_recipe(report).config == config
    check_parameters({name: context[name] for name in context if name in PARAMETERS})
    compile(script(report), "crash.py", "exec")


def test_a_script_sets_what_is_not_the_default() -> None:
    config = CellConfig("m.gguf", 512, 64, 64, 1, 1)
    assert set(_lines(config)) == set()
    lines = _lines(msgspec.structs.replace(config, **ODD))
    for line in (
        "params.load_mode = 2  # use_mmap False, use_mlock True",
        "params.split_mode = 2  # row",
        "params.main_gpu = 1",
        "params.tensor_split = (ctypes.c_float * 16)(*[0.5, 1.5])",
        "params.type_k = 8  # q8_0",
        "params.flash_attn_type = 1  # on",
        "params.rope_scaling_type = 2  # yarn",
        "params.rope_freq_base = 20000.0",
        "params.yarn_orig_ctx = 128",
        "params.swa_full = False",
        "params.n_threads_batch = 2",
    ):
        assert lines.count(line) == 1, line


def _lines(config: CellConfig) -> list[str]:
    usual = CellConfig("m.gguf", 512, 64, 64, 1, 1)
    texts = [
        script(report_of(batch_of([5]), "m.gguf", context=each.parameters())) for each in (config, usual)
    ]
    return [line for line in texts[0].splitlines() if line not in texts[1].splitlines()]


def test_a_measured_width_is_of_these_parameters(tiny: Path) -> None:
    keys = {
        width_cache.key(configure(tiny, **SIZES, **options))
        for options in ({}, *({k: v} for k, v in ODD.items() if k != "type_v"))
    }
    assert len(keys) == len(ODD)  # one more for none, one fewer without type_v: it needs flash_attn


def test_a_crash_changes_no_text_and_its_report_has_the_parameters(
    tiny: Path, make: Open, dose: Dose, store: Store, tmp_path: Path
) -> None:
    options = {"flash_attn": True, "type_v": "bf16", "rope_freq_base": 500.0, "n_threads_batch": 2}
    undisturbed = list(make(tiny, **options).generate(CRASHED, max_tokens=40))
    assert outcome(undisturbed) != outcome(list(make(tiny).generate(CRASHED, max_tokens=40)))
    dose(Poison(position=30, once=str(tmp_path / "crashed")))
    decoder = make(tiny, **options)
    decoder.resize(n_ctx=2048)
    assert outcome(list(decoder.generate(CRASHED, max_tokens=40))) == outcome(undisturbed)
    (report,) = reports_of(decoder, store)
    given = {name: report.context[name] for name in options}
    assert given == {"flash_attn": "on", "type_v": "bf16", "rope_freq_base": 500.0, "n_threads_batch": 2}


def test_prompts_that_share_a_cache_which_is_too_small_for_all_are_done(tiny: Path, make: Open) -> None:
    apart = list(make(tiny, 4, 512).generate(CRASHED, max_tokens=200))
    shared = make(tiny, 4, 128, kv_unified=True)  # 512 tokens for four that need 220 each
    together = list(shared.generate(CRASHED, max_tokens=200))
    assert [(len(c.tokens), c.finish_reason, c.error) for c in together] == [
        (len(c.tokens), c.finish_reason, None) for c in apart
    ]
