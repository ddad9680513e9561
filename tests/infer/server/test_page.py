"""The page as this server hands it out, in a real browser: its policy lets it work, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_text.infer.server.page import policy_of
from tests.infer.server.fake import make_service, running
from tests.infer.server.playground_browser import Browser, find_browser
from tests.infer.server.playground_page import TEXT_OF, run

PROGRAM = find_browser()


def test_the_policy_names_what_is_inline_and_nothing_else() -> None:
    policy = policy_of("<style>a {}</style><script>one()</script><script type='module'>two()</script>")
    assert policy != policy_of("<style>a {}</style><script>one()</script><script type='module'>three()</script>")
    assert policy.count("'sha256-") == 3 and "unsafe" not in policy
    # Browsers make \n of \r\n before they hash.
    assert policy_of("<script>a\r\nb</script>") == policy_of("<script>a\nb</script>")
    assert "script-src 'none'" in policy_of("<p>no script</p>")


@pytest.mark.skipif(PROGRAM is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_the_page_answers_under_its_policy(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert PROGRAM is not None
    with running(make_service(tokenizer_dir)) as server, Browser(PROGRAM, tmp_path) as browser:
        browser.open(f"{server.url}/#prompt=apple&max_tokens=15")
        browser.wait("document.querySelector('#model b')")
        run(browser)
        assert browser.value(TEXT_OF) == "apple" * 3
        assert browser.value("document.styleSheets[0].cssRules.length") > 10
        assert browser.problems == []
        assert all(url.startswith((server.url, "data:")) for url in browser.urls)
        # What the policy is for: markup that found its way in runs nothing.
        browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.broken = 1\">')")
        assert browser.value("window.broken") is None
        assert browser.problems, "the browser tells what it refused"
