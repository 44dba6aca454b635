"""What a redacted report still says, and what it does not."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.errors import ReportError
from crumplezone.reports.analysis.redact import RULES, redact
from crumplezone.reports.analysis.signature import sign
from crumplezone.reports.formats.text import render
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Evidence, Exit, Frame, Mapping, Report
from crumplezone.reports.store.redaction_key import KEY_NAME, redaction_key
from crumplezone.reports.store.store import Store
from tests.support.processes.cells import die
from tests.support.records.messages import PIECES

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
MAPS = [Mapping("0x7f0000001000", "0x7f0000002000", "r-xp"), Mapping("0x400000", "0x401000", "rw-p")]


def structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """Every struct that a type can hold."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for argument in typing.get_args(kind):
        yield from structs(argument)


def all_structs() -> list[type[msgspec.Struct]]:
    """In one order, for all processes that run tests."""
    found: set[type[msgspec.Struct]] = set()
    new: set[type[msgspec.Struct]] = {Report}
    while new:
        found |= new
        new = {
            inner for kind in new for hint in typing.get_type_hints(kind).values() for inner in structs(hint)
        }
        new -= found
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", all_structs(), ids=lambda kind: kind.__name__)
def test_every_field_of_the_schema_has_a_rule(kind: type[msgspec.Struct]) -> None:
    hints = typing.get_type_hints(kind)
    assert set(RULES[kind]) == set(hints), "decide in redact.py what may be shown of a new field"
    for name, hint in hints.items():
        assert any(structs(hint)) == (RULES[kind][name] == "structs"), name


def test_a_field_without_a_rule_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {name: rule for name, rule in RULES[Report].items() if name != "result"}
    monkeypatch.setitem(typing.cast("dict[Any, Any]", RULES), Report, rules)
    assert redact(Report("x", "", Evidence(Exit.KILLED, 1), result="a secret"), KEY).result == ""


FORMS = [
    "/home/{}/lib.so",
    "cannot open /home/{}/lib.so: no such file",
    "[Errno 2] No such file: '/home/{} of someone/lib.so'",
    'File "/home/x/{}/run.py", line 3',
    "key=~/{}/file,../{}/file;(./{}/file)",
    "work/{}/file",
    "{}/model.gguf",
    "//{}/share/file",
]


SPOKEN = [
    "terminate called after throwing an instance of 'std::runtime_error'\n  what():  {}",
    "terminate called after throwing an instance of 'X': {}",
    "fatal error: {}",
    "unsupported '{}'",
    "cannot read /home/{} of someone/x.gguf",
    "GGML_ASSERT(a) failed\n{}",
]
LINES = ["{}", "{}\n\nx {}", "Thread {} (most recent call first):", " /{}/{} ", "  <{}>", "  what():  {}"]
TOLD = ["cell 7: it sent 'a {}'", "create_completion failed: {}", "cell 12: crashed: {}", '"{}"']


class Planter:
    """Fills every field of a struct, with a secret of its own wherever the field's rule must remove it."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.secrets: list[str] = []

    def secret(self) -> str:
        self.secrets.append(f"SECRET{len(self.secrets)}x")
        return self.secrets[-1]

    def value(self, kind: Any, rule: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(kind)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self.data.draw(st.sampled_from(list(kind)))
        if origin in (typing.Union, types.UnionType):
            choices = [each for each in arguments if each is not type(None)]
            return self.value(str if str in choices else choices[0], rule)
        if origin is list:
            return [self.value(arguments[0], rule) for _ in range(2)]
        if origin is tuple:
            return tuple(self.value(arguments[0], rule) for _ in range(2))
        if origin is dict:
            keys = {self.value(arguments[0], "text" if rule == "table" else "keep") for _ in range(2)}
            return {key: self.value(arguments[1], rule) for key in keys}
        if kind is str:
            return self.text(rule)
        if kind is int and rule == "tokens":
            number = 7_000_000_000 + len(self.secrets)
            self.secrets.append(str(number))
            return number
        return kind(1)

    def text(self, rule: str) -> str:
        if rule == "keep":
            return "shown"
        if rule == "base":
            return f"/home/{self.secret()}/lib.so"
        if rule in {"text", "texts", "table"}:
            form = self.data.draw(st.sampled_from(FORMS))
            return form.replace("{}", self.secret())
        if rule in {"spoken", "told"}:
            form = self.data.draw(st.sampled_from(SPOKEN if rule == "spoken" else TOLD))
            return form.replace("{}", self.secret())
        return self.data.draw(st.sampled_from(LINES)).replace("{}", self.secret())

    def struct(self, kind: type[msgspec.Struct]) -> Any:
        hints = typing.get_type_hints(kind)
        return kind(**{name: self.value(hints[name], rule) for name, rule in RULES[kind].items()})


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_secret_is_left_in_a_redacted_report(data: st.DataObject) -> None:
    planter = Planter(data)
    report = msgspec.structs.replace(planter.struct(Report), redacted=False)
    assert len(planter.secrets) > 50
    before, after = schema.encode(report).decode(), schema.encode(redact(report, KEY)).decode()
    assert all(secret in before for secret in planter.secrets)
    assert [secret for secret in planter.secrets if secret in after] == []


def test_a_folder_with_a_space_is_removed_from_texts_too() -> None:
    report = Report(
        "x",
        "",
        Evidence(Exit.FAILED_START, 1, detail="cannot load /home/Jane Roe/my model.gguf now"),
        model=schema.ModelRecord("/home/Jane Roe/my model.gguf"),
    )
    clean = redact(report, KEY)
    assert clean.evidence.detail == "cannot load my model.gguf now"
    assert clean.model is not None
    assert clean.model.path == "my model.gguf"


def test_tokens_keep_their_shape_but_not_their_values() -> None:
    batch = schema.BatchRecord([5, 9, 5, -1], [0, 1, 2, 3], [0] * 4, [True] * 4)
    generating = [schema.Generating(0, [9, 5], 4)]
    report = Report(
        "x", "", Evidence(Exit.SIGNAL, 1), batch=msgspec.structs.replace(batch, generating=generating)
    )
    clean = redact(report, KEY).batch
    assert clean is not None
    a, b, c, d = clean.tokens
    assert a == c
    assert len({a, b, d}) == 3
    assert clean.generating[0].tokens == [b, a]
    assert all(0 < token < 2**31 for token in clean.tokens)
    assert (clean.positions, clean.seq_ids, clean.outputs) == (batch.positions, batch.seq_ids, batch.outputs)
    other = redact(report, OTHER_KEY).batch
    assert other is not None
    assert not set(other.tokens) & set(clean.tokens)


def test_only_registers_that_point_into_a_mapping_stay() -> None:
    registers = {
        "rip": "0x00007f0000001fff",
        "rsp": "0x400000",
        "rax": "0x6f77737361702079",  # text
        "rbx": "0x12",
        "rcx": "0x401000",  # just behind a mapping
        "rdx": "not a number",
    }
    evidence = Evidence(
        Exit.SIGNAL, 1, registers=registers, maps=MAPS, stack_bytes="70617373", code_bytes="0f0b"
    )
    clean = redact(Report("x", "", evidence), KEY).evidence
    assert set(clean.registers) == {"rip", "rsp"}
    assert (clean.stack_bytes, clean.code_bytes) == ("", "0f0b")
    unmapped = Report("x", "", msgspec.structs.replace(evidence, maps=[]))
    assert redact(unmapped, KEY).evidence.registers == {}


def test_variables_of_the_runtimes_stay_and_no_other() -> None:
    variables = {
        "OMP_NUM_THREADS": "4",
        "GGML_NO_BACKTRACE": "1",
        "LD_PRELOAD": "/home/jane/a.so:/opt/b.so",
        "HF_TOKEN": "hf_secret",
        "LLAMA_API_KEY": "secret",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    report = Report("x", "", Evidence(Exit.SIGNAL, 1), environment=schema.Environment(variables=variables))
    assert redact(report, KEY).environment.variables == {
        "OMP_NUM_THREADS": "4",
        "GGML_NO_BACKTRACE": "1",
        "LD_PRELOAD": "a.so:b.so",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (
            "/build/x/ggml/src/ggml.c:12: GGML_ASSERT(a/b == c) failed",
            "ggml.c:12: GGML_ASSERT(a/b == c) failed",
        ),
        ("terminate called without an active exception", None),
        ("terminate called after throwing an instance of 'std::runtime_error'", None),
        ("*** stack smashing detected ***: terminated", None),
        ("double free or corruption (!prev)", None),
        ("free(): invalid pointer", None),
        ("malloc(): unaligned tcache chunk detected", None),
        ("corrupted size vs. prev_size while consolidating", None),
        ("Fatal Python error: Segmentation fault", None),
        ("Current thread 0x00007f12 [python] (most recent call first):", None),
        ('  File "/home/jane roe/app.py", line 7 in <module>', '  File "app.py", line 7 in <module>'),
        ("", None),
    ],
)
def test_lines_in_which_the_process_speaks_of_itself_stay(line: str, kept: str | None) -> None:
    report = Report("x", "", Evidence(Exit.ABORT, 1, stderr_tail=f"{line}\n"))
    assert redact(report, KEY).evidence.stderr_tail == f"{line if kept is None else kept}\n"


def test_what_an_exception_says_is_nowhere_in_a_redacted_report() -> None:
    said = "terminate called after throwing an instance of 'std::runtime_error'\n  what():  near: MY SECRET"
    evidence = Evidence(
        Exit.ABORT, 1, assertion=schema.Assertion(said, "terminate"), stderr_tail=f"{said}\nSECRET too\n"
    )
    report = Report("x", "", evidence)
    report = msgspec.structs.replace(report, signature=sign(report))
    clean = redact(report, KEY)
    assert sign(clean) == clean.signature == report.signature
    assert b"SECRET" not in schema.encode(clean)
    assert "SECRET" not in render(clean)
    assert "std::runtime_error" in clean.evidence.stderr_tail
    # Signatures of version 1 had it in their key.
    old = schema.Signature("ab", "abort", ["near: MY SECRET"], "abort: near: MY SECRET")
    clean = redact(msgspec.structs.replace(report, signature=old), KEY)
    assert b"SECRET" not in schema.encode(clean)
    assert clean.signature is not None
    assert (clean.signature.id, clean.signature.title) == ("ab", "abort")


def test_our_own_sentences_stay_and_what_they_quote_does_not() -> None:
    def told(text: str) -> str:
        return redact(Report("x", "", Evidence(Exit.ABORT, 1), result=text), KEY).result

    for ours in (
        "cured by the rung safe; every sequence got its result",
        "cell 7: crashed",
        "f: cell 7: died",
    ):
        assert told(ours) == ours
    assert told("create_completion failed: no 'prompt'").startswith("create_completion failed")
    assert "prompt" not in told("create_completion failed: no 'prompt'")


def test_other_lines_become_hashes_that_can_be_compared() -> None:
    report = Report(
        "x", "", Evidence(Exit.ABORT, 1, stderr_tail="ask\ntell\nask", log_tail=["ask", "free of"])
    )
    clean = redact(report, KEY).evidence
    first, second, third = clean.stderr_tail.split("\n")
    assert first == third == clean.log_tail[0] != second
    assert first.endswith(" (3 characters)")
    assert len(first.split()[0]) == 12
    assert clean.log_tail[1].endswith("(7 characters)")
    assert redact(report, OTHER_KEY).evidence.log_tail[0] != first


@pytest.mark.parametrize("stunt", ["segv", "ggml_abort", "terminate"])
def test_a_redacted_crash_groups_with_the_others_and_tells_no_path(stunt: str) -> None:
    report = Report("x", "", die(stunt))
    report = msgspec.structs.replace(report, signature=sign(report))
    clean = redact(report, KEY)
    assert clean.redacted
    assert sign(clean) == clean.signature == report.signature
    assert redact(clean, OTHER_KEY) is clean
    assert schema.decode(schema.encode(clean)) == clean
    evidence = clean.evidence
    frames = [frame for thread in evidence.threads for frame in thread.native + thread.python]
    assert frames
    assert [frame for frame in frames if "/" in frame.module + frame.file] == []
    assert b"site-packages/" not in schema.encode(clean)
    assert str(Path(__file__).parent).encode() not in schema.encode(clean)
    assert 'File "stunts.py"' in evidence.faulthandler


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_signature_of_an_assertion_does_not_depend_on_redaction(assertion: str) -> None:
    found = schema.Assertion(assertion, "ggml", "/src/ggml.c", 1)
    report = Report("x", "", Evidence(Exit.ABORT, 1, assertion=found))
    assert sign(redact(report, KEY)) == sign(report)


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    store = tmp_path / "a" / "b"
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: redaction_key(store), range(64)))
    (key,) = keys
    assert len(key) == 32
    assert key != redaction_key(tmp_path / "other")
    assert (store / KEY_NAME).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in store.iterdir()] == [KEY_NAME]
    assert Store(store).rows() == []


def _short(path: Path) -> None:
    path.write_bytes(b"short")


def _link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("plant", [_short, _link, _dangling, Path.mkdir, os.mkfifo])
def test_what_is_no_key_is_refused(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / KEY_NAME)
    with pytest.raises(ReportError, match=r"redaction key .* remove|Remove"):
        redaction_key(tmp_path)


def test_frames_of_the_caller_are_shortened() -> None:
    report = Report("x", "", Evidence(Exit.HANG, 1), caller=[Frame("serve", file="/srv/jane/app.py", line=3)])
    assert redact(report, KEY).caller == [Frame("serve", file="app.py", line=3)]
