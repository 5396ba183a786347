"""The report in a browser: no errors, no network, text as it is, at every width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from denserl_cli.core.reporting.record import read_runs
from denserl_cli.core.reporting.report import make_report
from denserl_cli.pages.report import write_page
from tests.core.reporting.conftest import write_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = read_runs([write_run(folder / "first"), write_run(folder / "second", iterations=4)])
    write_page(make_report(runs), folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1600])
def test_nothing_runs_over_the_edge(open_page: OpenPage, page_file: Path, width: int, dark: bool):
    page = open_page(page_file, width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in page.locator("figure svg").all():
        box = plot.bounding_box()
        assert box is not None and 250 < box["width"] <= width and box["height"] > 150
    ink, behind = page.evaluate(
        "['color', 'background-color'].map(n => getComputedStyle(document.body)[n])"
    )
    assert (brightness(ink) > brightness(behind)) == dark
    label = page.locator("figure svg text").first
    assert brightness(label.evaluate("one => getComputedStyle(one).fill")) > 300 or not dark


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour[4:-1].split(","))


def test_text_is_shown_as_it_is(open_page: OpenPage, page_file: Path):
    page = open_page(page_file)
    for details in page.locator("details").all():
        details.evaluate("one => one.open = true")
    text = page.locator(".sample .text").first.inner_text()
    assert "<script>alert(1)</script>" in text and "naïve 😀" in text and "שלום" in text
    assert "+0.50" in text and "−0.25" in text  # to be read without colours
    assert page.locator("summary", has_text="say <b>hi</b>").first.is_visible()
    assert page.locator("script").count() == 1  # the page's own


def test_a_click_on_a_head_sorts_the_runs(open_page: OpenPage, page_file: Path):
    page = open_page(page_file)
    names = page.locator("#runs tbody th")
    assert names.all_inner_texts() == ["first", "second"]
    head = page.locator("#runs thead th", has_text="train-ppo")
    head.get_by_role("button").click()  # "finished, 4 steps" before "finished, 12 steps"
    assert names.all_inner_texts() == ["second", "first"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert names.all_inner_texts() == ["first", "second"]


def test_the_table_of_contents_leads_somewhere(open_page: OpenPage, page_file: Path):
    page = open_page(page_file)
    links = page.locator("nav a").all()
    assert len(links) >= 8
    for link in links:
        assert page.locator(link.get_attribute("href") or "").count() == 1


def test_findings_say_what_and_what_to_try(open_page: OpenPage, page_file: Path):
    page = open_page(page_file)
    found = page.locator("#findings li.serious").first
    assert found.is_visible() and "Try: " in found.inner_text()
    assert "SERIOUS" in found.inner_text()
