"""The playground page as its tests see and operate it."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from tests.infer.server.playground_browser import Browser
from tests.infer.server.playground_standin import Standin

PHONE, SMALL_PHONE = (390, 844), (360, 740)
TEXT_OF = "document.querySelector('.answer:not([hidden]) .text').textContent"
RUNNING = "document.querySelector('[aria-busy]')"
ENDED = f"!{RUNNING} && document.querySelector('.measures:not([hidden])')"
FAILED = "document.querySelector('.fault:not([hidden])')"
CARD = "document.querySelector('#card:not([hidden])')"
REFUSED = "Failed to load resource"
"""What a browser writes to its console when an answer has an error's status."""


def link(server: Standin, **state: Any) -> str:
    return f"{server.origin}/#" + "&".join(f"{name}={quote(str(value))}" for name, value in state.items())


def run(browser: Browser, until: str = ENDED) -> None:
    browser.value("document.querySelector('#form').requestSubmit()")
    browser.wait(f"{RUNNING} || {until}")
    browser.wait(until)


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return found


def card(browser: Browser) -> str:
    browser.wait(CARD)
    text: str = browser.value("document.querySelector('#card').innerText").replace("\xa0", " ")
    return " ".join(text.split())


def copied(browser: Browser, button: str) -> str:
    browser.value("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    browser.click(button)
    text: str = browser.value("window.copied")
    return text
