"""The page in a browser: by keyboard, without its script, light, dark, narrow, and with hostile strings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from crumplezone.reports.html import page
from tests.support.records.pages import HOSTILE, MODELS, everything, report, run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)

PICTURE = "<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>"

# Puts in what the policy forbids, and tells what became of the picture, the script, the handler, the style.
# It waits for no securitypolicyviolation: Chromium 150 tells of a handler when it is to run, 156 at once.
INJECTED = """() => new Promise((done) => {
    const put = (name, given) => document.body.append(Object.assign(document.createElement(name), given));
    put("script", { textContent: "ranScript = 1" });
    document.body.setAttribute("onclick", "ranHandler = 1");
    document.body.click();
    put("style", { textContent: "body { outline: 7px solid red !important }" });
    const tell = (picture) => done([picture, typeof ranScript, typeof ranHandler,
        getComputedStyle(document.body).outlineWidth === "7px"]);
    put("img", { onload: () => tell("load"), onerror: () => tell("error"), src: "https://x.test/i" });
    setTimeout(tell, 20_000, "neither loaded nor refused in 20 s");
})"""


@dataclass
class Visit:
    """A page in a browser, and what a page that needs nothing must not cause.

    Attributes:
        page: Where it is open.
        asked: Addresses that were requested.
        problems: What the console says, and errors of scripts.
    """

    page: Page
    asked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def open(self, file: Path, fragment: str = "") -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(f"{file.as_uri()}{fragment}")

    def focus(self) -> str:
        """What the focused element says."""
        return str(self.page.evaluate("document.activeElement.textContent"))


@pytest.fixture
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def visit(browser: Browser, shown: str, directory: Path, fragment: str = "", **options: Any) -> Visit:
    file = directory / "index.html"
    file.write_text(shown)
    made = Visit(browser.new_context(**options).new_page())
    made.open(file, fragment)
    return made


def test_nothing_of_a_hostile_report_runs_or_loads(chromium: Browser, tmp_path: Path) -> None:
    hostile = visit(chromium, everything(HOSTILE), tmp_path)
    hostile.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert hostile.page.evaluate("[typeof owned, document.scripts.length, document.images.length]") == [
        *("undefined", 1, 0)
    ]
    assert hostile.asked == [f"{(tmp_path / 'index.html').as_uri()}"]
    assert hostile.problems == []  # so the hashes of style and script are right, too
    # And if a string were markup after all, the policy would hold.
    hostile.page.route(
        "https://x.test/**", lambda route: route.fulfill(body=PICTURE, content_type="image/svg+xml")
    )
    assert hostile.page.evaluate(INJECTED) == ["error", "undefined", "undefined", False]


def test_it_works_by_keyboard(chromium: Browser, tmp_path: Path) -> None:
    reports = [report(n) for n in range(4)]
    seen = visit(chromium, page.render(run(), reports), tmp_path)
    press = seen.page.keyboard.press
    press("/")
    seen.page.keyboard.type("queue_idxs 0002Z")
    assert seen.page.locator(".report:visible").count() == 0
    press("Escape")
    seen.page.keyboard.type("k_idxs 0002Z")
    assert seen.page.locator(".report:visible").count() == 1
    assert seen.page.locator("#map td.off").count() > 0
    press("ArrowDown")
    assert "build_input_k_idxs 2" in seen.focus()
    press("Enter")
    assert seen.page.locator(".report[open]:visible .stacks").count() == 1
    press("/")
    press("Escape")
    assert seen.page.locator(".report:visible").count() == 4
    press("ArrowDown")
    press("ArrowDown")
    press("ArrowUp")
    assert "build_input_k_idxs 3" in seen.focus()  # the newest

    seen.page.locator("#map td a").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowRight"):
        press(key)
    assert seen.focus() == "C"
    assert f"{MODELS[0].removesuffix('.gguf')} encode 1x10 #1: crash (new), SIGSEGV" in seen.page.inner_text(
        "#readout"
    )
    press("Tab")  # the map is one stop
    assert seen.page.evaluate("document.activeElement.closest('#map')") is None
    seen.page.locator("#map td.pass.expected a").first.click()
    assert seen.page.locator(".cases tr:target").is_visible()  # its fold has been opened
    assert seen.problems == []


def test_it_can_be_read_without_its_script(chromium: Browser, tmp_path: Path) -> None:
    seen = visit(chromium, everything(), tmp_path, java_script_enabled=False)
    assert seen.page.locator("#map td").count() == 80
    assert not seen.page.locator("#filter").is_visible()
    assert not seen.page.locator(".stacks").first.is_visible()
    seen.page.locator(".report > summary").first.click()
    assert "ggml_compute_forward_get_rows" in seen.page.locator(".stacks").first.inner_text()


# Of each text that is seen, its contrast with what is behind it, as WCAG 2 defines it.
PALE = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => numbers(color).slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const color = getComputedStyle(each).backgroundColor;
            if ((numbers(color)[3] ?? 1) === 1) return color;
        }
    };
    const found = [];
    for (const each of document.querySelectorAll("body *")) {
        const said = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!said || !each.checkVisibility()) continue;
        const style = getComputedStyle(each);
        const both = [light(each.closest("svg") ? style.fill : style.color), light(behind(each))];
        const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        if (ratio < 4.5) found.push(`${each.className} ${each.textContent}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_and_fits_a_narrow_screen(
    chromium: Browser, tmp_path: Path, scheme: str
) -> None:
    for width in (360, 1280):
        size = {"width": width, "height": 800}
        seen = visit(chromium, everything(), tmp_path, color_scheme=scheme, viewport=size)
        seen.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert seen.page.evaluate(PALE) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_link_into_a_report_opens_it(chromium: Browser, tmp_path: Path) -> None:
    reports = [report(n) for n in range(30)]
    seen = visit(chromium, page.render(None, reports), tmp_path, f"#r-{reports[20].id}")
    assert seen.page.locator(".report[open]").count() == 1
    assert seen.page.locator(".report[open] .what").is_visible()
