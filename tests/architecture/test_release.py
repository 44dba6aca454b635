"""What an index, a release and its workflows say holds together."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = PROJECT["urls"]["Source"]


def links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        yield from (str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
        yield from links(token.children or [])


def test_the_readme_links_to_what_an_index_can_reach() -> None:
    found = list(links(MarkdownIt().parse((ROOT / "README.md").read_text())))
    assert found
    for link in found:
        assert link.startswith("https://"), f"{link}: an index does not know the folders of this repository"
        if link.startswith(SOURCE):
            path = re.sub(r"^/(?:blob|tree)/main/|#.*", "", link.removeprefix(SOURCE))
            assert (ROOT / path).exists(), link


def test_the_changelog_has_the_version() -> None:
    """`crumplezone.__version__` is what pyproject.toml says, see test_public_names.py."""
    version, changes = PROJECT["version"], (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](.*)$", changes, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == version
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in headings[1:])
    targets = dict(re.findall(r"^\[(.+?)\]: (.+)$", changes, re.MULTILINE))
    assert list(targets) == [name for name, _ in headings]
    assert targets["Unreleased"] == f"{SOURCE}/compare/v{version}...HEAD"


@pytest.mark.parametrize(
    "name",
    [".github/workflows/tests.yml", ".github/workflows/release.yml", "RELEASING.md", "CONTRIBUTING.md"],
)
def test_what_is_made_is_in_the_makefile(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / name).read_text()
    used = [
        target
        for line in re.findall(r"(?:`|run: |^ +)make ([\w= .-]+)", text, re.MULTILINE)
        for target in line.split()
        if "=" not in target
    ]
    assert used
    assert set(used) <= targets
