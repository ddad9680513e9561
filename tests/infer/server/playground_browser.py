"""A headless Chromium, driven over the pipe of the DevTools protocol: what the tests of our pages need."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --remote-debugging-pipe --no-first-run --hide-scrollbars "
    "--disable-dev-shm-usage --disable-background-networking --disable-component-update --mute-audio --no-proxy-server"
).split()
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
CONTROL = 2


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


CONTRASTS = """(() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return {r, g, b, a}; };
  const light = ({r, g, b}) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (e) => {
    for (;; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.a === 1) return colour;
      if (colour.a) throw new Error("a colour that lets others through is not measured");
    }
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const field = e.matches("textarea, input:not([type=checkbox])");
    const before = e.matches(".text:empty") ? "::before" : undefined;
    const texts = [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!(field || before || texts) || !e.checkVisibility() || e.closest("script, style, template")) continue;
    const [low, high] = [light(parse(getComputedStyle(e, before).color)), light(behind(e))].sort((x, y) => x - y);
    found.push([(high + 0.05) / (low + 0.05), e.tagName + "." + e.className + "#" + e.id]);
  }
  return found;
})()"""
"""JavaScript: [contrast, which element] of every element with a text that can be seen, as WCAG 2 defines it."""


class Browser:
    """One Chromium with one page, within ``with``. Calls wait for their answers; nothing else may read the pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session: str | None = None
        self.problems: list[str] = []
        """Uncaught errors, errors on the console, and what the browser refused, since the page was opened."""
        self.urls: list[str] = []
        """Everything that was requested since then."""
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        # The browser reads commands from descriptor 3 and answers on 4; by way of high numbers, so that none is in use.
        actions: list[tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, read_commands, 100), (os.POSIX_SPAWN_DUP2, write_answers, 101)]
        actions += [(os.POSIX_SPAWN_DUP2, 100, 3), (os.POSIX_SPAWN_DUP2, 101, 4)]
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (read_commands, write_answers, null):
            os.close(fd)

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # the Tab key can lead out of the page
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != number:
                self._note(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], 20)[0]:
                raise TimeoutError("the browser has not answered for 20 s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise ConnectionError("the browser has gone")
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        value: dict[str, Any] = json.loads(message)
        return value

    def _note(self, event: Mapping[str, Any]) -> None:
        detail = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(detail["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if detail["type"] in ("error", "warning"):
                self.problems.append(str(detail["args"]))
            case "Log.entryAdded" if detail["entry"]["level"] in ("error", "warning"):
                self.problems.append(detail["entry"]["text"])
            case "Network.requestWillBeSent":
                self.urls.append(detail["request"]["url"])

    def open(
        self,
        url: str,
        *,
        size: tuple[int, int] = (1280, 800),
        dark: bool = False,
        reduced_motion: bool = False,
        ready: str = "document.querySelector('#model')?.textContent.trim()",
    ) -> None:
        """A page without anything left of the one before, its scripts run and what ``ready`` says there."""
        self.call("Page.navigate", url="about:blank")
        width, height = size
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.problems.clear()
        self.urls.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && {ready}")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 10) -> None:
        end = time.monotonic() + timeout_s
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"after {timeout_s} s still not: {condition}; problems: {self.problems}")
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        detail = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **detail)
        if key == "Enter":
            self.call("Input.dispatchKeyEvent", type="char", text="\r", **detail)
        self.call("Input.dispatchKeyEvent", type="keyUp", **detail)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element's first line is, in the window."""
        self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        line = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        x, y = self.value(f"(r => [r.left + r.width / 2, r.top + r.height / 2])({line})")
        return x, y

    def point(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
