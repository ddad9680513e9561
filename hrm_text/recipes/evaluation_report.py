"""The report of an evaluation: ``report.html``, one page with a browser of wrong answers, and ``report.md`` for issues.

The page needs nothing else: no network, no server. What models and data sets wrote is text in it and never markup: the
templates escape it, the responses lie in it as JSON and are put in place as text, and its policy lets no script run but
ours, by its checksum.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hrm_text.data.inspect import visible
from hrm_text.eval.statistics import mean
from hrm_text.files import read_json, whole_file
from hrm_text.recipes.evaluation_responses import (
    CHARACTERS,
    KINDS,
    PAGE_BYTES,
    RIGHT,
    WRONG,
    Group,
    Response,
    cut,
    read_responses,
)
from hrm_text.recipes.pages import inline_json, render_page

HTML, MARKDOWN = "report.html", "report.md"
MARKDOWN_CHARACTERS = 60_000
"""An issue on GitHub takes 65,536; wrong answers are given as many of them as there is room for."""
EXAMPLES, EXAMPLE_CHARACTERS = 8, 800
"""Most wrong answers in the Markdown report, and most characters of a text of theirs."""
NOTABLE = 0.05
"""Shares of responses unreadable or truncated that are worth a remark."""
MOST_NAMES = 6
"""Tasks that a remark names."""

Score = Mapping[str, Any]


def write_evaluation_report(folder: Path, weights: str = "") -> Path:
    """Write ``report.md`` and ``report.html`` of a finished run into its folder.

    Args:
        folder: with results.json, questions.jsonl and answers.jsonl; comparison.json where there was one.
        weights: what people call them; the results know their checksum alone.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: a file is missing or damaged.
    """
    results = read_json(folder / "results.json")
    note = folder / "comparison.json"
    comparison = read_json(note) if note.exists() else None
    groups = read_responses(folder, results, _run_compared_with(folder, comparison))
    values = _values(_shown(results), _shown(comparison), groups, visible(weights or folder.resolve().name))
    values["has_against"] = (folder / "against" / HTML).exists()
    for name, text in ((MARKDOWN, _markdown(values, groups)), (HTML, _page(values, groups))):
        with whole_file(folder / name) as beside:
            beside.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair is a question mark
    return folder / HTML


def _shown(value: Any) -> Any:
    """JSON whose every string is ``visible``: a name from a data set must not turn a row of a table around."""
    if isinstance(value, dict):
        return {visible(name): _shown(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def _run_compared_with(folder: Path, comparison: Mapping[str, Any] | None) -> Path | None:
    """Where the second model's answers are, if they are still there."""
    places = [] if comparison is None else [Path(comparison["second"]["run"]), folder / "against"]
    return next((place for place in places if (place / "answers.jsonl").is_file()), None)


# ------------------------------------------------------------------------------------------------- what is shown ---


def _values(
    results: Mapping[str, Any], comparison: Mapping[str, Any] | None, groups: Sequence[Group], weights: str
) -> dict[str, Any]:
    """What both templates show."""
    scores: Sequence[Score] = results["scores"]
    return {
        "title": f"Evaluation of {weights}",
        "weights": weights,
        "results": results,
        "scores": scores,
        "subtitles": [_subtitle(score) for score in scores],
        "headline": _headline(scores),
        "grid": _grid(scores),
        "remarks": _remarks(scores),
        "num_questions": sum(score["n"] for score in scores),
        "num_tasks": len({score["task"] for score in scores}),
        "unreadable": _over_responses(scores, "unreadable"),
        "truncated": _over_responses(scores, "truncated"),
        "mean_tokens": _over_responses(scores, "mean_tokens"),
        "subjects": [(score, _weakest_first(score)) for score in scores if score["subjects"]],
        "comparison": comparison,
        "reach": _reach(comparison["rows"]) if comparison else 1.0,
        "tasks": [(name, task, _origin(task["data"])) for name, task in results["tasks"].items()],
        "groups": groups,
        "num_shown": sum(len(group.responses) for group in groups),
        "kind_names": KINDS,
        "bounds": {"wrong": WRONG, "right": RIGHT, "characters": CHARACTERS, "bytes": PAGE_BYTES},
    }


def _subtitle(score: Score) -> str:
    """The title of a task, where its name does not say it."""
    title: str = score["title"]
    return "" if title.lower().startswith(score["task"].partition(":")[0].lower()) else title


def _headline(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For each condition: the unweighted mean of its tasks, or what its only one came to.

    Conditions that were not asked the same tasks are one set of scores: their means would not compare.
    """
    by_condition: dict[str, list[Score]] = {}
    for score in scores:
        by_condition.setdefault(score["condition"], []).append(score)
    parts = list(by_condition.items()) if _grid(scores) else [("", list(scores))]
    return [
        {
            "condition": condition,
            "n": len(inside),
            "strict": mean([score["strict"] for score in inside]),
            "published": mean([score["published"] for score in inside]),
        }
        for condition, inside in parts
    ]


def _grid(scores: Sequence[Score]) -> dict[str, Any] | None:
    """Tasks by conditions, where every task was asked under every one of several."""
    conditions = list(dict.fromkeys(score["condition"] for score in scores))
    cells = {(score["task"], score["condition"]): score for score in scores}
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    if len(conditions) < 2 or len(cells) < len(tasks) * len(conditions):
        return None
    rows = [(task, [cells[task, condition] for condition in conditions]) for task in tasks]
    return {"conditions": conditions, "rows": rows}


def _remarks(scores: Sequence[Score]) -> list[str]:
    """What a reader of the table should not overlook."""
    remarks = []
    for what, found in (
        ("cannot be told from guessing, as the interval reaches down to chance", [_is_guess(s) for s in scores]),
        ("have many responses in which no answer was found", [s["unreadable"] >= NOTABLE for s in scores]),
        ("have many responses that were cut before they ended", [s["truncated"] >= NOTABLE for s in scores]),
        ("have questions that fill the context and were not asked", [s["no_room"] > 0 for s in scores]),
        ("have questions with fewer examples than the protocol's", [s["shortened"] > 0 for s in scores]),
        ("are held-in: their training split was trained upon", [s["held"] == "in" for s in scores]),
    ):
        names = [f"{s['task']} ({s['condition']})" for s, noted in zip(scores, found, strict=True) if noted]
        if names:
            left = len(names) - MOST_NAMES
            more = f" and {left} more" if left > 0 else ""
            remarks.append(f"{len(names)} of {len(scores)} {what}: {', '.join(names[:MOST_NAMES])}{more}.")
    return remarks


def _is_guess(score: Score) -> bool:
    return bool(score["chance"] > 0 and score["low"] <= score["chance"])


def _over_responses(scores: Sequence[Score], name: str) -> float:
    """The mean of a share over all responses."""
    return sum(score[name] * score["n"] * score["samples"] for score in scores) / max(
        1, sum(score["n"] * score["samples"] for score in scores)
    )


def _weakest_first(score: Score) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(score["subjects"].items(), key=lambda item: (item[1]["strict"], item[0]))


def _reach(rows: Sequence[Mapping[str, Any]]) -> float:
    """How far the axis of differences reaches to both sides: whole 5 %, so that the zero stands in its middle."""
    widest = max([abs(row["paired"][end]) for row in rows for end in ("low", "high", "difference")], default=0.0)
    return max(0.05, math.ceil(20 * widest) / 20)


def _origin(data: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a task's rows came from, a line for each data set."""
    lines = []
    for each in data:
        named = [f"{name} {digest[:12]}" for name, digest in each.get("files", {}).items()]
        named += [f"{key} {value}" for key, value in each.items() if key != "files" and value is not None]
        lines.append(", ".join(named))
    return lines


# ---------------------------------------------------------------------------------------------------- the two files ---


def _page(values: Mapping[str, Any], groups: Sequence[Group]) -> str:
    from markupsafe import Markup

    script = (files("hrm_text.recipes") / "templates" / "evaluation_report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    responses = _responses_of_page(values["scores"], groups)
    return render_page(
        "evaluation_report.html.j2",
        **values,
        script=Markup(script),
        script_digest=digest,
        responses=Markup(inline_json(responses)),
    )


def _responses_of_page(scores: Sequence[Score], groups: Sequence[Group]) -> dict[str, Any]:
    """The responses as the page's script reads them; prompts and gold answers, which many share, by number."""
    texts: dict[str, int] = {}
    items = [
        {
            "group": each.group,
            "id": each.id,
            "sample": each.sample,
            "subject": each.subject,
            "prompt": texts.setdefault(each.prompt, len(texts)),
            "expected": texts.setdefault(each.expected, len(texts)),
            "got": each.got,
            "text": each.text,
            "tokens": each.num_tokens,
            "finish": each.finish,
            "strict": each.strict,
            "published": each.published,
            "kinds": each.kinds,
            "other": each.other,
        }
        for group in groups
        for each in group.responses
    ]
    named = [{name: score[name] for name in ("task", "condition", "samples")} for score in scores]
    return {"kinds": KINDS, "groups": named, "texts": list(texts), "items": items}


def _markdown(values: Mapping[str, Any], groups: Sequence[Group]) -> str:
    def rendered(examples: Sequence[Response]) -> str:
        return render_page("evaluation_report.md.j2", **values, examples=examples)

    examples = _examples(groups)
    while examples and len(rendered(examples)) > MARKDOWN_CHARACTERS:
        examples.pop()
    return rendered(examples)


def _examples(groups: Sequence[Group]) -> list[Response]:
    """Some wrong answers: one of each task and condition in turn, as long as there are any."""
    wrong = [[each for each in group.responses if "right" not in each.kinds] for group in groups]
    in_turn = [each for row in zip_longest(*wrong) for each in row if each is not None]
    return [
        replace(
            each,
            prompt=cut(each.prompt, EXAMPLE_CHARACTERS),
            expected=cut(each.expected, EXAMPLE_CHARACTERS),
            got=cut(each.got, EXAMPLE_CHARACTERS),
            text=cut(each.text, EXAMPLE_CHARACTERS),
        )
        for each in in_turn[:EXAMPLES]
    ]
