"""What all reports share: the environment of their templates, and how figures and foreign texts are written in them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from hrm_text.data.inspect import visible


def render_page(template: str, **values: Any) -> str:
    """A report as text: an HTML page, where every string is escaped that is no ``Markup``, or Markdown.

    Args:
        template: a file of ``templates``: NAME.html.j2 or NAME.md.j2. In Markdown nothing is escaped by itself; what
            comes from outside goes through the filter ``cell``, or into a fence (see ``fenced``).
        values: what the template shows; a name that it uses and is not given is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hrm_text.recipes"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        signed=signed,
        duration=duration,
        count=count,
        memory=memory,
        quantity=quantity,
        cell=cell,
        fenced=fenced,
        visible=visible,
    )
    return environment.get_template(template).render(values)


def percent(share: float | None) -> str:
    """0.883 -> 88.3 %"""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def signed(share: float) -> str:
    """-0.031 -> −3.1 %"""
    return f"{100 * share:+.1f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """312.4 -> 5 min 12 s"""
    if seconds < 59.95:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}\N{NO-BREAK SPACE}h"] if hours else []
    return "\N{NO-BREAK SPACE}".join([*parts, f"{minutes}\N{NO-BREAK SPACE}min", f"{rest}\N{NO-BREAK SPACE}s"])


def count(number: float) -> str:
    """540123 -> 540 k; 1240000 -> 1.24 M"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # 999,999 is 1 M, not 1000 k
            return f"{number / size:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{number:.0f}"


def memory(num_bytes: float) -> str:
    """1503238554 -> 1.40 GiB"""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f}\N{NO-BREAK SPACE}GiB"
    return f"{num_bytes / (1 << 20):.0f}\N{NO-BREAK SPACE}MiB"


def quantity(number: float | None) -> str:
    """1234567 -> 1,234,567; None -> –"""
    return "–" if number is None else f"{number:,.0f}" if isinstance(number, int) else f"{number:.2f}"


def cell(text: Any) -> str:
    """Text that stays within a cell of a Markdown table and is no markup."""
    return re.sub(r"([\\|`*_<>\[\]&#~$])", r"\\\1", visible(str(text)).replace("\n", " "))


def fenced(text: str) -> str:
    """Text as a block of Markdown that nothing within can end: its fence is longer than any run of backticks there."""
    fence = "`" * (1 + max([2, *map(len, re.findall(r"`+", text))]))
    return f"{fence}text\n{visible(text)}\n{fence}"


def inline_json(value: Any) -> str:
    """JSON that stands within a script element and cannot end it, or begin a comment in it.

    Surrogates without their other half, which no file can hold, are escaped too, and what a page might read as the end
    of a line.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
