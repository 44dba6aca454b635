"""SARIF of a diagnostic run: valid, grouped, and set against the baseline."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from crumplezone.reports.formats import sarif
from crumplezone.reports.records.report import Report
from crumplezone.reports.records.run import Fixed
from tests.support.records.exports import NASTY, validated
from tests.support.records.reports import ID, full
from tests.support.records.runs import ENCODE, MODEL, full_run


def signed() -> Report:
    return msgspec.structs.replace(full(ID), signature=ENCODE)


def rendered(**fields: Any) -> dict[str, Any]:
    (run,) = validated(sarif.render_run(full_run(**fields), {ID: signed()}))["runs"]
    found: dict[str, Any] = run
    return found


def test_each_cause_is_one_result_in_its_state() -> None:
    run = rendered()
    assert [(r["ruleId"], r["level"], r["baselineState"]) for r in run["results"]] == [
        (ENCODE.id, "error", "new"),
        ("mismatch", "error", "new"),
        ("hang", "error", "unchanged"),
        ("oom", "error", "unchanged"),
        ("refused", "warning", "unchanged"),
        ("cd" * 32, "none", "absent"),
    ]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [r["ruleId"] for r in run["results"]]
    crash, mismatch = run["results"][:2]
    assert crash["occurrenceCount"] == 2
    assert crash["properties"]["cases"] == [f"{MODEL} encode 1x1", f"{MODEL} encode 3x10"]
    assert crash["partialFingerprints"] == {"crumplezoneSignature/v1": ENCODE.id}
    assert {stack["message"]["text"] for stack in crash["stacks"]} == {"Native stack", "Python stack"}
    assert (mismatch["properties"]["native"], mismatch["properties"]["safe"]) == ("one", "two")
    assert mismatch["partialFingerprints"] == {"crumplezoneCase/v1": f"mismatch {MODEL} decode 3x10 q8_0"}
    assert (
        mismatch["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == f"{MODEL} decode 3x10 q8_0"
    )


def test_a_result_is_known_again_in_the_next_run() -> None:
    known, after = (
        {str(r["partialFingerprints"]) for r in rendered(**f)["results"]} for f in ({}, {"baseline": ""})
    )
    assert known == after


def test_a_case_that_is_fixed_is_the_result_that_it_was() -> None:
    name = f"{MODEL} decode 3x10 q8_0"
    (was,) = (r for r in rendered()["results"] if r["ruleId"] == "mismatch")
    run = rendered(cases=[], fixed=[Fixed("", "mismatch", [name])])
    (absent,) = run["results"]
    assert (absent["ruleId"], absent["baselineState"]) == ("mismatch", "absent")
    assert absent["partialFingerprints"] == was["partialFingerprints"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["mismatch"]


def test_without_a_baseline_nothing_is_new_or_unchanged() -> None:
    assert all("baselineState" not in result for result in rendered(baseline="", fixed=[])["results"])


def test_what_could_not_be_run_is_no_result() -> None:
    (invocation,) = rendered()["invocations"]
    assert invocation["executionSuccessful"] is False
    assert [each["message"]["text"] for each in invocation["toolExecutionNotifications"]] == [
        f"{MODEL} safe 1x1: error it was"
    ]
    (cut,) = rendered(cases=full_run().cases[:1], complete=False)["invocations"]
    assert cut["toolExecutionNotifications"][0]["message"]["text"] == "interrupted after 1 of 9 cases"
    (good,) = rendered(cases=full_run().cases[:1])["invocations"]
    assert good == {"executionSuccessful": True, "toolExecutionNotifications": []}


def test_a_crash_without_its_report_has_no_stacks() -> None:
    (run,) = validated(sarif.render_run(full_run(), {}))["runs"]
    assert run["results"][0]["ruleId"] == ENCODE.id
    assert "stacks" not in run["results"][0]


@pytest.mark.parametrize("nasty", [*NASTY, "x" * 100_000])
def test_a_hostile_run_is_valid_and_bounded(nasty: str) -> None:
    shown = json.dumps(
        validated(sarif.render_run(full_run(nasty), {ID: full(ID, nasty)})), ensure_ascii=False
    )
    assert shown.isprintable()
    assert len(shown) < 300_000
