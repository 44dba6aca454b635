"""Words of the source are told from those of the input, and paths are cut to their names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumplezone.reports.analysis.messages import parted, shorten_paths
from tests.support.records.messages import PATHS, PIECES


@pytest.mark.parametrize("text", PATHS)
def test_paths_become_base_names_and_divisions_stay(text: str) -> None:
    assert shorten_paths(text) == (text if PATHS[text] is None else PATHS[text])


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="/a.b~ '\":=(\n", max_size=40))
def test_shortening_twice_is_shortening_once(text: str) -> None:
    assert shorten_paths(shorten_paths(text)) == shorten_paths(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "\n", "fatal error", ": "]), max_size=12).map("".join))
def test_parting_twice_is_parting_once(text: str) -> None:
    own, rest = parted(text)
    assert parted(own) == (own, "")
    assert parted(f"{own}\nmore")[0] == own
    assert text.endswith(rest)


@pytest.mark.parametrize("piece", ["/a", "'/", '"/a ', "a/", "../", ":1", "~/"])
def test_shortening_is_linear(piece: str) -> None:
    shorten_paths(piece * 200_000)  # the suite's timeout would end a search that goes back and forth
