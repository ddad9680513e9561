from __future__ import annotations

import functools
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from hrm_text.recipes import charts
from hrm_text.recipes.pages import count, duration, memory
from hrm_text.recipes.report import Run, headline, render, write_report

HOSTILE = "<script>alert('1')</script> & \"ü\" 数 🙂 $x_1$ {{ 7*7 }} --> </svg></style><img src=https://evil.example/x>"
MARKER = "marker-text"
DRAWING = re.compile(r"<svg.*?</svg>", re.DOTALL)


def make_run(text: str = MARKER) -> Run:
    """A run with every part; ``text`` stands wherever a string from outside can stand."""
    steps = 600
    fall = [0.05 + 4.5 * math.exp(-step / 90) * (1 + 0.2 * math.sin(step)) for step in range(steps)]
    run = {
        "title": "HRM-Text quickstart " + text,
        "seconds": 338.2,
        "parameters": 541_000,
        "tokens_seen": 3_100_000,
        "peak_memory_bytes": 1_400_000_000,
        "config": {"model": {"hidden_size": 128, "norm": "magic"}, "note": text, "k_max": 5},
        "versions": {"torch": "2.13.0", "hrm-text": text},
        "machine": {"processor": text, "cores": "2"},
        "stages": [{"name": name, "seconds": 31.0, "detail": text} for name in ("data", text, "train")],
        "steps": [
            {"step": i, "loss": loss, "token_accuracy": i / steps, "exact_accuracy": (i / steps) ** 2,
             "lr": 1e-3 * min(1, (i + 1) / 50), "k": 2 + min(3, i // 40), "tokens_per_second": 10_500.0}
            for i, loss in enumerate(fall)
        ],
        "validation": [
            {"step": i, "loss": fall[i] * 0.9, "token_accuracy": i / steps, "exact_accuracy": (i / steps) ** 2}
            for i in range(0, steps, 100)
        ],
        "tasks": [
            {"task": text, "condition": "direct", "n": 200, "before": 0.0, "after": 1.0, "low": 0.981, "high": 1.0,
             "chance": 0.0, "example": text},
            {"task": "compare", "condition": "cot", "n": 200, "before": 0.1, "after": 0.53, "low": 0.46, "high": 0.6,
             "chance": 0.5},
        ],
        "state_norms": [
            {"call": call, "stack": call[0], "norm_before_training": 11.3, "norm_after": 11.3, "change": 9.0 - i}
            for i, call in enumerate(("L1", "L2", "L3", "H1", "L4", "L5", "L6", "H2"))
        ],
        "samples": [
            {"task": text, "condition": "synth,cot", "prompt": text, "response": text, "expected": text, "ok": ok}
            for ok in (True, False)
        ],
        "direct_vs_cot": [
            {"prompt": text, "expected": text, "accuracies": {"direct": 0.06, "cot": 0.92},
             "direct": {"response": text, "ok": False}, "cot": {"response": text, "ok": True}}
        ],
        "files": [{"path": text, "what": text}],
    }  # fmt: skip
    return cast(Run, run)


@functools.cache
def full_page() -> str:
    """Drawing takes a second or two: draw once for the tests that only look."""
    return render(make_run())


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text alone."""
    monkeypatch.setattr(charts, "as_svg", lambda *arguments, **sizes: "<svg></svg>")


class Tags(HTMLParser):
    """What a browser would see: tags with their attributes, the visible text, the section titles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.text = ""
        self._in_title = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_title = tag == "h2"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_title:
            self.titles.append(data)
            self._in_title = False


SECTIONS = {
    "direct_vs_cot": "The same question, two ways",
    "tasks": "Accuracy per task",
    "steps": "Learning",
    "samples": "Sample answers",
    "state_norms": "Inside the recurrence",
}


def test_hostile_text_is_shown_and_never_becomes_markup() -> None:
    page = render(make_run(HOSTILE))
    plain = full_page()
    assert {tag for tag, _ in Tags(page).tags} == {tag for tag, _ in Tags(plain).tags}
    assert "<script>" in Tags("".join(DRAWING.findall(page))).text
    # The charts shorten a label and choose their ticks; the rest of the page is the same, tag by tag, string by string.
    page_text, plain_text = (Tags(DRAWING.sub("", text)) for text in (page, plain))
    assert [tag for tag, _ in page_text.tags] == [tag for tag, _ in plain_text.tags]
    note = yaml.safe_dump({"note": HOSTILE}, allow_unicode=True, width=math.inf)
    assert page_text.text == plain_text.text.replace(f"note: {MARKER}\n", note).replace(MARKER, HOSTILE)


def test_the_page_loads_nothing() -> None:
    page = full_page()
    assert "http:" not in page and "https:" not in page and "@import" not in page
    for tag, attributes in Tags(page).tags:
        assert tag not in {"link", "script", "img", "iframe", "object", "embed", "base", "form"}
        for key in ("href", "xlink:href", "src"):
            assert (attributes.get(key) or "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_names_inside_the_charts_are_unique_and_resolve() -> None:
    page = full_page()
    names = re.findall(r'\sid="([^"]+)"', page)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page))
    assert len(names) == len(set(names))
    assert used and used <= set(names)


def test_charts_take_their_colours_from_the_page() -> None:
    drawings = "".join(DRAWING.findall(full_page()))
    colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", drawings))
    assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none"}


def test_all_sections_stand_in_reading_order() -> None:
    page = Tags(full_page())
    assert page.titles == [*SECTIONS.values(), "How it was made"]
    assert "does not show HRM beating a Transformer" in page.text


@pytest.mark.parametrize("part", sorted(set(Run.__annotations__)))
@pytest.mark.usefixtures("no_drawing")
def test_any_part_may_be_missing(part: str) -> None:
    run = cast(dict[str, Any], make_run())
    del run[part]
    titles = Tags(render(cast(Run, run))).titles
    assert titles == [title for key, title in SECTIONS.items() if key != part] + ["How it was made"]


@pytest.mark.usefixtures("no_drawing")
def test_an_empty_run_is_still_a_page() -> None:
    assert Tags(render({})).titles == ["How it was made"]


def test_without_validation_the_training_batches_are_shown_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    drawing = charts.learning_chart(run["steps"], [])
    assert "training batches" in drawing and "validation" not in drawing
    assert "validation" in charts.learning_chart(run["steps"], run["validation"])
    monkeypatch.setattr(charts, "as_svg", lambda *arguments, **sizes: "")
    del run["validation"]
    assert "no validation loss" in render(run)
    assert "no validation loss" not in full_page()


def test_skipped_steps_and_unmeasured_values_are_gaps() -> None:
    steps = [
        {"step": i, "loss": loss, "lr": 1e-3, "k": 2} for i, loss in enumerate((4.0, None, math.nan, math.inf, 2.0))
    ]
    norm = {"call": "L1", "stack": "L", "norm_before_training": None, "norm_after": None, "change": None}
    for drawing in (charts.learning_chart(steps, []), charts.schedule_chart(steps[:1]), charts.norms_chart([norm])):
        assert not re.search(r"\b(nan|inf)\b", drawing)


def test_a_long_run_still_gives_a_small_file_and_nothing_beside_it(tmp_path: Path) -> None:
    run = cast(dict[str, Any], make_run())
    run["steps"] = [{**run["steps"][i % 600], "step": i, "k": 2 + min(3, i // 1000)} for i in range(20_000)]
    run["samples"] = run["samples"] * 40
    as_stored = cast(Run, json.loads(json.dumps(run)))
    out = write_report(as_stored, tmp_path / "new" / "report.html")
    assert out.stat().st_size < 500_000
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_drawing() -> None:
    stages = make_run()["stages"]
    assert charts.stages_chart(stages) == charts.stages_chart(stages)


@pytest.mark.usefixtures("no_drawing")
def test_half_a_surrogate_pair_does_not_lose_the_report(tmp_path: Path) -> None:
    run = make_run()
    run["samples"][0]["response"] = "broken \ud83d end"
    assert "broken ? end" in html.unescape(write_report(run, tmp_path / "r.html").read_text(encoding="utf-8"))


def test_headline_is_the_plain_mean_and_a_strict_count() -> None:
    tasks = make_run()["tasks"]
    tasks.append({**tasks[0], "before": 0.2, "after": 0.95})
    found = headline(tasks)
    assert found is not None
    assert found["mean_after"] == pytest.approx((1.0 + 0.53 + 0.95) / 3)
    assert found["mean_before"] == pytest.approx(0.1)
    assert (found["num_above_95"], found["num_tasks"]) == (1, 3)
    assert headline([]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(5.04), "5.0 s"),
        (duration(59.99), "1 min 0 s"),
        (duration(312.4), "5 min 12 s"),
        (duration(3723), "1 h 2 min 3 s"),
        (count(999), "999"),
        (count(541_000), "541 k"),
        (count(999_999), "1 M"),
        (count(1_240_000), "1.24 M"),
        (memory(1_503_238_553), "1.40 GiB"),
    ],
)
def test_quantities_read_well(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected
