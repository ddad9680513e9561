"""The page to try a model on: one file, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.responses import Response

_INLINE = re.compile(r"<(script|style)(?:\s[^>]*)?>(.*?)</\1>", re.DOTALL)


class Page:
    """``playground.html``, read once.

    Its policy allows the page's own script and style, by their hashes, and talk with the server it came from. Should
    text of a model ever find its way into the page as markup, no script in it would run.
    """

    def __init__(self) -> None:
        self._html = files("hrm_text.infer.server").joinpath("playground.html").read_text(encoding="utf-8")
        self.policy = policy_of(self._html)

    def response(self) -> Response:
        """The page."""
        headers = {
            "Content-Security-Policy": self.policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # a newer server has a newer page
        }
        return Response(self._html, headers=headers, media_type="text/html")


def policy_of(html: str) -> str:
    """A Content-Security-Policy under which the page works and nothing else does."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        # Browsers see line ends as \n, however the file has them.
        digest = hashlib.sha256(text.replace("\r\n", "\n").encode()).digest()
        hashes[kind].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    rules = {
        "default-src": ["'none'"],
        "script-src": hashes["script"] or ["'none'"],
        "style-src": hashes["style"] or ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return "; ".join(f"{name} {' '.join(values)}" for name, values in rules.items())
