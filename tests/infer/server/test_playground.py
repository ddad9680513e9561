"""The playground page in a real browser, before a server that says the same things every time."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.infer.server import playground_page as page
from tests.infer.server.playground_browser import CONTRASTS, CONTROL, Browser, find_browser
from tests.infer.server.playground_page import card, copied, link, run, texts
from tests.infer.server.playground_standin import ANSWER, KEY, PAGE, TEXT, Standin, chunks

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium, chromium-browser or google-chrome on the path")


@pytest.fixture(scope="module")
def server() -> Iterator[Standin]:
    with Standin() as server:
        yield server


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser, server: Standin) -> Iterator[Browser]:
    """The page's own faults fail every test: errors on the console, what its policy refuses, a request to elsewhere."""
    server.requests.clear()
    server.keys.clear()
    server.hung_up.clear()
    server.needs_key = False
    yield shared_browser
    shared_browser.value("sessionStorage.clear(), localStorage.clear()")
    assert [problem for problem in shared_browser.problems if page.REFUSED not in problem] == []
    assert shared_browser.urls
    assert [url for url in shared_browser.urls if not url.startswith((server.origin, "data:"))] == []


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "[held]", "[plain]", "[unbroken]", "[held] [unbroken]"])
def test_the_answer_is_the_text_that_was_sent(prompt: str, browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt=prompt))
    run(browser)
    assert browser.value(page.TEXT_OF) == "".join(text for text, _ in chunks(prompt))
    assert browser.value("document.querySelectorAll('.text :not(span)').length") == 0  # "<b>" is text, not markup
    measures = " ".join(texts(browser, ".measures dd"))
    count = sum(len(tokens) for _, tokens in chunks(prompt))
    assert measures.startswith(f"{count} ")
    assert "24 tokens, 16 cached" in measures
    assert "by itself (stop)" in measures


def test_every_token_stands_under_its_own_text(browser: Browser, server: Standin) -> None:
    browser.open(link(server))
    run(browser)
    pieces = "|".join(texts(browser, ".text span"))
    assert pieces.startswith("Fifty|-|seven| and")
    assert "| |🙂|\n\n|So| in| K|ö|ln|" in pieces
    assert pieces.endswith("| 数|を|逆|に| 👩|\u200d|🔬|.|")
    browser.open(link(server, prompt="[held]"))
    run(browser)
    # Its text came in two parts, of which both have the probability of the token that wrote them.
    parts = texts(browser, ".text span")
    place = next(i for i in range(len(parts)) if parts[i] + parts[i + 1] == " thirty")
    for number in (place, place + 1):
        browser.value(f"document.querySelectorAll('.text span')[{number}].click()")
        assert "93.0 %" in card(browser)


def test_a_character_of_several_tokens_has_their_joint_probability(browser: Browser, server: Standin) -> None:
    browser.open(link(server))
    run(browser)
    for character, probabilities in {"🙂": (0.3, 0.9, 0.6), "ö": (0.8, 0.97), " 👩": (0.2, 0.6, 0.7)}.items():
        browser.value(
            f"[...document.querySelectorAll('.text span')].find(e => e.textContent === '{character}').click()"
        )
        said = card(browser)
        assert f"{100 * math.prod(probabilities):.1f} %" in said
        assert f"{len(probabilities)} tokens together" in said


def test_the_keyboard_walks_along_the_tokens_and_sees_what_else_could_have_been(
    browser: Browser, server: Standin
) -> None:
    browser.open(link(server))
    run(browser)
    browser.value("document.querySelector('.curl').focus()")
    browser.press("Tab")
    assert "Fifty 62.0 %" in card(browser)
    assert browser.value("document.querySelectorAll('.text [tabindex]').length") == 1  # not a Tab stop for each token
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    said = card(browser)
    assert "␣and 81.0 %" in said
    assert f"␣maybe {19 * 0.5:.1f} %" in said
    assert "↵ 5.7 %" in said
    assert "<i> 0.76 %" in said
    assert "all others 0.19 %" in said
    assert browser.value("document.activeElement.getAttribute('aria-describedby')") == "card"
    browser.press("End")
    assert "(end) 93.0 %" in card(browser)
    browser.press("Escape")
    assert not browser.value(page.CARD)


def test_pointing_and_tapping_show_the_card_and_leaving_hides_it(browser: Browser, server: Standin) -> None:
    browser.open(link(server))
    run(browser)
    browser.point(".text span:nth-child(8)")
    assert "␣make 41.0 %" in card(browser)
    browser.point("h1")
    browser.wait(f"!{page.CARD}")
    browser.open(link(server), size=page.PHONE)
    run(browser)
    browser.tap(".text span:nth-child(8)")
    assert "␣make 41.0 %" in card(browser)
    inside = "(() => { const r = document.querySelector('#card').getBoundingClientRect();"
    assert browser.value(
        inside + "return r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight })()"
    )
    browser.tap("h1")
    browser.wait(f"!{page.CARD}")


def test_escape_stops_the_answer_and_the_server_sees_the_connection_close(browser: Browser, server: Standin) -> None:
    browser.open(link(server))
    browser.value("document.querySelector('#prompt').focus()")
    browser.type("[slow]")
    browser.press("Enter", CONTROL)
    browser.wait("document.querySelectorAll('.text span').length > 5")
    browser.press("Escape")
    browser.wait(f"!{page.RUNNING}")
    assert server.hung_up.wait(5)
    assert "stopped by you" in texts(browser, ".measures dd")
    kept = browser.value(page.TEXT_OF)
    assert kept.startswith("word0 word1 ")
    time.sleep(0.1)
    assert browser.value(page.TEXT_OF) == kept
    assert browser.value("document.querySelector('#run').getAttribute('aria-disabled')") == "false"


def test_comparing_asks_for_both_settings_at_once(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="57 + 38"))
    browser.click("#compare")
    for chip in ("direct", "synth", "cot"):  # the first is chosen at the start; the order of the others counts
        browser.click(f"#variant_A [value={chip}]")
    assert texts(browser, ".composed") == ["synth,cot", "direct"]
    browser.value("document.querySelector('#variant_B .h').select()")
    browser.type("3")
    assert texts(browser, ".calls") == ["8 module calls per token", "12 module calls per token"]
    run(browser)
    common = {
        "model": "stand-in", "prompt": "57 + 38", "temperature": 0, "max_tokens": 256, "seed": 0, "l_cycles": 3,
        "stream": True, "stream_options": {"include_usage": True}, "logprobs": 5,
    }  # fmt: skip
    assert sorted(server.requests, key=lambda body: body["h_cycles"]) == [
        common | {"condition": "synth,cot", "h_cycles": 2},
        common | {"condition": "direct", "h_cycles": 3},
    ]
    assert texts(browser, ".text") == [TEXT, TEXT]
    assert [made.split("·")[0].strip() for made in texts(browser, ".made")] == ["Asynth,cot", "Bdirect"]


def test_more_cycles_than_the_server_has_room_for_are_pointed_out(browser: Browser, server: Standin) -> None:
    browser.open(link(server, h_cycles=4))
    assert "room for 12" in texts(browser, ".calls")[0]


def test_the_settings_reach_the_server_and_the_link_and_come_back_from_it(browser: Browser, server: Standin) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.7, "max_tokens": 99, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "seed": 5, "h_cycles": 1, "l_cycles": 2,
    }  # fmt: skip
    prompt = "ö & 100 % + 'x'\n#"
    address = link(server, prompt=prompt, condition="noisy,direct", stop="END\n##", **settings)
    browser.open(address)
    time.sleep(0.1)
    assert server.requests == []  # a link runs nothing
    summary = "temperature 0.7, top-p 0.9, top-k 40, min-p 0.05, seed 5, penalty 1.1, 2 stop texts, 99 tokens"
    assert texts(browser, "#summary")[0].replace("\xa0", " ") == summary
    run(browser)
    for name, value in settings.items():
        assert server.requests[0][name] == value
    assert server.requests[0]["prompt"] == prompt
    assert server.requests[0]["condition"] == "noisy,direct"
    assert server.requests[0]["stop"] == ["END", "##"]
    browser.open(browser.value("location.href"))
    run(browser)
    assert server.requests[1] == server.requests[0]


def test_a_number_out_of_range_is_pointed_at_and_nothing_is_sent(browser: Browser, server: Standin) -> None:
    browser.open(link(server, top_p=1.5))
    browser.value("document.querySelector('#form').requestSubmit()")
    assert browser.value("document.activeElement.id") == "top_p"
    assert browser.value("document.querySelector('#sampling').open")
    assert server.requests == []


def test_a_busy_server_is_shown_with_the_time_to_wait(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="[busy]"), size=page.PHONE)
    run(browser, page.FAILED)
    assert "Too many requests." in texts(browser, ".why")[0]
    assert texts(browser, ".fault button") == ["Run again in 1 s"]
    button, bar = "document.querySelector('.fault button')", "document.querySelector('.actions')"
    assert browser.value(
        f"{button}.getBoundingClientRect().bottom < {bar}.getBoundingClientRect().top"
    )  # not behind it
    browser.wait("document.querySelector('.fault button').textContent === 'Run again'")
    browser.value("document.querySelector('#prompt').value = 'now'")
    browser.tap(".fault button")
    browser.wait(f"!{page.FAILED} && {page.ENDED}")
    assert browser.value(page.TEXT_OF) == TEXT


def test_what_the_server_refuses_is_shown_in_its_words(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="[bad]"))
    run(browser, page.FAILED)
    assert texts(browser, ".why p") == ["The prompt has 5000 tokens, the context 4096: shorten <b>it</b>."]


def test_an_answer_that_breaks_off_keeps_its_text(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="[drop]"))
    run(browser, page.FAILED)
    assert browser.value(page.TEXT_OF) == "".join(text for _, text, _ in ANSWER[:5])
    assert "broke off" in texts(browser, ".why b")[0]
    assert "broken off" in texts(browser, ".measures dd")


def test_the_key_is_asked_for_and_stays_in_the_tab(browser: Browser, server: Standin) -> None:
    server.needs_key = True
    browser.open(link(server, prompt="secret?"))
    browser.wait("document.activeElement.id === 'key_text'")
    browser.type("wrong")
    browser.press("Enter")
    browser.wait("document.querySelector('#key_why').textContent.includes('not accept')")
    browser.type(KEY)
    browser.press("Enter")
    browser.wait("document.querySelector('#key').hidden && document.querySelector('#model b')")
    run(browser)
    assert server.keys[-1] == f"Bearer {KEY}"
    assert KEY not in browser.value("location.href") + copied(browser, ".curl")
    assert browser.value("[JSON.stringify(localStorage), document.cookie]") == ["{}", ""]
    assert [url for url in browser.urls if "secret" in url and "#" not in url] == []


def test_the_copied_command_gives_a_shell_the_same_request(browser: Browser, server: Standin) -> None:
    prompt = "it's \"$HOME\" `id` \\n !! \n\t🙂 '\\''"
    browser.open(link(server, prompt=prompt, stop="'"))
    run(browser)
    assert copied(browser, ".copy") == TEXT
    command = copied(browser, ".curl")
    said = subprocess.run(
        ["sh", "-c", 'curl() { printf "%s\\0" "$@"; }; ' + command], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert said[:-1] == [f"{server.origin}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    streaming = {"stream", "stream_options", "logprobs"}
    expected = {name: value for name, value in server.requests[0].items() if name not in streaming}
    assert json.loads(said[-1]) == expected
    assert expected["prompt"] == prompt


def test_listeners_hear_the_answer_once_at_its_end(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="[slow]"))
    browser.value(
        "window.heard = []; window.status_line = document.querySelector('#announce');"
        "new MutationObserver(() => heard.push(status_line.textContent)).observe(status_line, {childList: true}), 0"
    )
    run(browser, "document.querySelectorAll('.text span').length > 8")
    browser.press("Escape")
    browser.wait(f"!{page.RUNNING}")
    (heard,) = browser.value("heard.filter(Boolean)")
    assert heard.startswith("Answer, stopped by you: word0 word1")
    assert browser.value("document.querySelector('.text').closest('[aria-live]')") is None


def test_everything_that_takes_the_focus_has_a_name_and_shows_the_focus(browser: Browser, server: Standin) -> None:
    browser.open(link(server, compare=1))
    browser.value("document.querySelector('#sampling').open = true")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    operable = {"button", "textbox", "spinbutton", "switch", "checkbox", "DisclosureTriangle"}
    found = [node for node in nodes if node.get("role", {}).get("value") in operable]
    assert len(found) > 25
    assert [node for node in found if not node.get("name", {}).get("value", "").strip()] == []
    landmarks = {node["role"]["value"] for node in nodes if not node.get("ignored")}
    assert {"main", "banner", "form", "region", "heading", "article"} <= landmarks
    visited = []
    for _ in range(34):
        browser.press("Tab")
        visited.append(browser.value("(e => [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle])"
                                     "(document.activeElement)"))  # fmt: skip
    names = [name for name, _ in visited]
    assert {"theme", "prompt", "chip", "h figures", "compare", "SUMMARY", "temperature", "run", "stop", "shade"} <= {
        *names
    }
    assert [name for name, outline in visited if outline == "none" and name != "BODY"] == []


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_contrast_in_light_and_dark(dark: bool, browser: Browser, server: Standin) -> None:
    def measured() -> dict[str, float]:
        ratios = browser.value(CONTRASTS)
        assert [(ratio, name) for ratio, name in ratios if ratio < 4.5] == []
        return {name: ratio for ratio, name in ratios}

    browser.open(link(server, compare=1, h_cycles=9, temperature=0.5), dark=dark)
    browser.value("document.querySelector('#sampling').open = true")
    assert len(measured()) > 20
    run(browser)
    browser.value("document.querySelector('.text span').click()")
    browser.wait(page.CARD)
    seen = measured()
    assert {f"SPAN.s{level}#" for level in range(1, 7)} <= {*seen}  # every shade was there to be measured
    for prompt in ("[busy]", "[drop]"):
        browser.open(link(server, prompt=prompt), dark=dark)
        run(browser, page.FAILED)
        measured()
    # The measurement sees what it must see: text in the colour of the page.
    browser.value("document.querySelector('h1').style.color = getComputedStyle(document.body).backgroundColor")
    assert min(ratio for ratio, _ in browser.value(CONTRASTS)) < 1.01


def test_the_theme_follows_the_system_until_it_is_switched_and_is_remembered(browser: Browser, server: Standin) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(link(server), dark=False)
    light = browser.value(colour)
    browser.open(link(server), dark=True)
    dark = browser.value(colour)
    assert light != dark
    browser.click("#theme")
    assert [browser.value(colour), *texts(browser, "#theme")] == [light, "Theme: light"]
    browser.click("#theme")
    browser.open(link(server), dark=False)
    assert [browser.value(colour), *texts(browser, "#theme")] == [dark, "Theme: dark"]


@pytest.mark.parametrize("prompt", ["[unbroken]", "[bad]", "x" * 400])
def test_nothing_scrolls_sideways_on_a_small_phone(prompt: str, browser: Browser, server: Standin) -> None:
    browser.open(
        link(server, prompt=prompt, compare=1, condition="synth,cot,noisy,direct", h_cycles=9), size=page.SMALL_PHONE
    )
    browser.value("document.querySelector('#sampling').open = true")
    run(browser, page.FAILED if prompt == "[bad]" else page.ENDED)
    browser.value("document.querySelector('.text span')?.click()")
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    beyond = "e.checkVisibility() && !e.closest('.spoken') && e.getBoundingClientRect().right > 360.5"
    assert browser.value(f"[...document.querySelectorAll('body *')].filter(e => {beyond}).map(e => e.outerHTML)") == []
    columns = "getComputedStyle(document.querySelector('#answers')).gridTemplateColumns.split(' ').length"
    assert browser.value(columns) == 1


def test_a_long_answer_is_drawn_in_few_steps(browser: Browser, server: Standin) -> None:
    browser.open(link(server, prompt="[long]", max_tokens=4000))
    browser.value(
        "window.steps = 0; new MutationObserver(() => { steps += 1; })"
        ".observe(document.querySelector('.text'), {childList: true}), 0"
    )
    run(browser, "document.querySelectorAll('.text span').length === 4000 && " + page.ENDED)
    assert browser.value(page.TEXT_OF) == "".join(text for text, _ in chunks("[long]"))
    assert browser.value("steps") < 2000  # not a step for each token
    assert browser.value("document.querySelectorAll('[role=tooltip]').length") == 1


def test_without_motion_for_those_who_want_none(browser: Browser, server: Standin) -> None:
    moving = "getComputedStyle(document.querySelector('.text'), '::after').animationName"
    for reduced, name in ((False, "breathe"), (True, "none")):
        browser.open(link(server, prompt="[slow]"), reduced_motion=reduced)
        run(browser, "document.querySelectorAll('.text span').length > 1")
        assert browser.value(moving) == name
        browser.press("Escape")


def test_the_page_is_one_file_that_names_no_other(server: Standin) -> None:
    html = PAGE.read_text()
    assert html.count("<script") == html.count("<style") == 1
    for forbidden in (
        "http://",
        "https://",
        "innerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        " onclick",
        " style=",
    ):
        assert forbidden not in html.replace("xmlns='http://www.w3.org/2000/svg'", ""), forbidden
