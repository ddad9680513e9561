"""What of a response is the program."""

from __future__ import annotations

import re
import textwrap

FENCED = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
"""A block of Markdown, closed or cut off."""


def programs_of(response: str, prompt: str, entry_point: str) -> tuple[str, ...]:
    """Programs that a response may stand for, likeliest first; which of them is Python, the sandbox finds out.

    A response is the whole function, in a fenced block or bare, or goes on where the prompt ends. The function stands
    behind the prompt, whose imports and helpers it may use. A continuation ends where a line is no longer indented, as
    in Chen et al. (2021); its first line may have lost its indentation, or every line.

    Args:
        response: of the model.
        prompt: Python up to the body of the function: its signature and docstring.
        entry_point: the function's name.
    """
    blocks = FENCED.findall(response)
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    whole = [block for block in [*reversed(blocks), response] if defines.search(block)]
    programs = [f"{prompt}\n{textwrap.dedent(text)}\n" for text in whole]
    if not programs:
        # Of several blocks the last: what comes before is working.
        body = (blocks[-1] if blocks else response).strip("\n")
        lost = ("    " + body, textwrap.indent(body, "    "))
        bodies = (body,) if body[:1].isspace() else lost
        programs = [f"{prompt}\n{_until_unindented(each)}\n" for each in bodies if each.strip()]
    return tuple(dict.fromkeys(programs))


def _until_unindented(body: str) -> str:
    lines = body.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end])
