"""The page of an evaluation in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hrm_text.recipes.evaluation_report import write_evaluation_report
from tests.infer.server.playground_browser import CONTRASTS, Browser, find_browser
from tests.recipes.evaluation_runs import compared, finished, hostile, task

PROGRAM = find_browser()


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """A page that reports a fault or asks for anything fails every test."""
    yield shared_browser
    assert shared_browser.problems == []
    assert [url for url in shared_browser.urls if not url.startswith("file:///")] == []


READY = "document.querySelector('#status')?.textContent"


def shown(browser: Browser) -> list[str]:
    texts: list[str] = browser.value("[...document.querySelectorAll('#detail pre')].map((pre) => pre.textContent)")
    return texts


def choose(browser: Browser, field: str, value: str) -> str:
    """Change a filter; what the page then says about where it is."""
    browser.value(
        f"((e) => {{ e.value = {json.dumps(value)}; "
        f"e.dispatchEvent(new Event('{'input' if field == 'search' else 'change'}')); }})"
        f"(document.getElementById('{field}'))"
    )
    said: str = browser.value("document.getElementById('status').textContent")
    return said


def test_the_responses_are_browsed_by_filter_search_and_keyboard(browser: Browser, tmp_path: Path) -> None:
    out = compared(tmp_path / "run", [task(name=name) for name in ("one", "two")])
    write_evaluation_report(out)
    browser.open((out / "report.html").as_uri(), ready=READY)
    assert browser.value(READY) == "1 of 24"
    assert shown(browser) == ["add one to #2", "3", "2", "so 2", "so 3"]
    browser.value("document.getElementById('browse').scrollIntoView()")
    browser.press("ArrowRight")
    assert browser.value(READY) == "2 of 24"
    assert shown(browser) == ["add one to #3", "4", "nothing could be read", "no idea", "so 4"]
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.value(READY) == "1 of 24"
    browser.value("document.getElementById('options').focus()")
    browser.press("End")
    assert browser.value(READY) == "24 of 24"
    assert choose(browser, "task", "one") == "1 of 12"
    assert choose(browser, "kind", "no room") == "1 of 1"
    assert "not asked: the prompt fills the context" in shown(browser)
    assert choose(browser, "kind", "") == "14 of 20"
    assert choose(browser, "other", "right") == "1 of 19"  # the one of before is not among them
    assert choose(browser, "other", "") == "1 of 20"
    assert choose(browser, "search", "TO #1") == "1 of 11"
    assert browser.value("document.querySelector('#detail mark').textContent") == "to #1"
    assert choose(browser, "subject", "even") == "1 of 5"


def test_many_responses_come_in_pages(browser: Browser, tmp_path: Path) -> None:
    out = finished(tmp_path / "run", [task()], rows=150)
    write_evaluation_report(out)
    browser.open((out / "report.html").as_uri(), size=(390, 844), ready=READY)
    assert browser.value("document.documentElement.scrollWidth") <= 390
    assert browser.value("document.querySelectorAll('#options li').length") == 40
    browser.value("document.getElementById('page-after').click()")
    assert browser.value(READY) == "41 of 90"
    browser.value("document.getElementById('page-after').click()")
    assert browser.value("document.querySelectorAll('#options li').length") == 10
    assert browser.value("document.getElementById('page-after').disabled") is True


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_by_day_and_by_night(dark: bool, browser: Browser, tmp_path: Path) -> None:
    out = compared(tmp_path / "run", [task()])
    write_evaluation_report(out)
    browser.open((out / "report.html").as_uri(), dark=dark, ready=READY)
    browser.value("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    contrasts = browser.value(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts) > [4.5], min(contrasts)


def test_hostile_texts_run_nothing_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    out = hostile(tmp_path / "run")
    write_evaluation_report(out)
    browser.open((out / "report.html").as_uri(), ready=READY)
    assert browser.value("window.hacked") is None
    assert browser.value("document.querySelectorAll('img, #detail pre *').length") == 0
    assert "</script><script>window.hacked = 1</script><!--" in shown(browser)[0]
    assert choose(browser, "search", "<script>window") == "1 of 3"
    assert browser.value("document.querySelectorAll('#detail pre script').length") == 0
    assert browser.value("document.querySelector('#detail mark').textContent") == "<script>window"
