from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.files import read_json
from hrm_text.recipes import evaluation_report, evaluation_responses
from hrm_text.recipes.evaluation_report import write_evaluation_report
from hrm_text.recipes.pages import cell, fenced, inline_json, percent
from tests.recipes.evaluation_runs import compared, finished, hostile, task


class Tags(HTMLParser):
    """Every element closes what it opened; scripts and attributes are kept."""

    VOID = ("meta", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data


def page_of(out: Path) -> tuple[Tags, dict[str, Any]]:
    """The page, and the responses that lie in it."""
    assert write_evaluation_report(out, "a/weights") == out / "report.html"
    tags = Tags((out / "report.html").read_text(encoding="utf-8"))
    assert len(tags.scripts) == 2
    return tags, json.loads(tags.scripts[0])


def markdown(out: Path) -> str:
    return (out / "report.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------


def test_every_score_is_in_both_tables(tmp_path: Path) -> None:
    out = finished(tmp_path / "run", [task(), task(name="others", condition="cot"), task(name="votes", samples=2)])
    tags, _ = page_of(out)
    scores = read_json(out / "results.json")["scores"]
    assert len({score["strict"] for score in scores}) > 1
    lines = [line for line in markdown(out).splitlines() if line.startswith("|")]
    for score in scores:
        [line] = [line for line in lines if line.startswith(f"| {score['task']} | {score['condition']} |")]
        shares = ("strict", "low", "high", "published", "chance", "unreadable", "truncated")
        assert all(percent(score[name]) in line for name in shares)
        assert all(percent(score[name]) in tags.text for name in shares if name not in ("low", "high"))
        assert f"{100 * score['low']:.1f} – {100 * score['high']:.1f}" in tags.text
    for expected in (
        "a/weights",
        "c0ffee" * 8,
        "sympy",
        "1.14",
        "abacus",
        "1.23\xa0k",
        "test.jsonl abababababab",
        "even",
    ):
        assert expected in tags.text
    assert f"majority {percent(scores[2]['also']['majority'])}" in tags.text
    assert "majority" in markdown(out)


def test_a_run_of_one_task_says_its_score_first(tmp_path: Path) -> None:
    tags, found = page_of(finished(tmp_path / "run", [task()]))
    assert "Sums under direct: 40.0\xa0% of\n20 questions" in re.sub(r" +", " ", tags.text)
    assert "By condition" not in tags.text
    assert "Compared" not in tags.text
    assert len(found["items"]) == 20


def test_wrong_answers_are_found_with_what_is_wrong(tmp_path: Path) -> None:
    _, found = page_of(finished(tmp_path / "run", [task()]))
    kinds = {item["id"]: item["kinds"] for item in found["items"]}
    assert kinds["q0"] == kinds["q6"] == ["right"]
    assert kinds["q2"] == ["wrong"]
    assert kinds["q3"] == ["unreadable"]
    assert kinds["q4"] == ["unreadable", "truncated"]
    assert kinds["q13"] == ["no room"]
    assert {kind for each in kinds.values() for kind in each} < set(found["kinds"])
    [wrong] = [item for item in found["items"] if item["id"] == "q2"]
    assert found["texts"][wrong["prompt"]] == "add one to #2"
    assert found["texts"][wrong["expected"]] == "3"
    assert (wrong["got"], wrong["text"], wrong["tokens"], wrong["finish"]) == ("2", "so 2", 4, "stop")


def test_a_letter_is_never_cut(tmp_path: Path) -> None:
    _, found = page_of(finished(tmp_path / "run", [task(max_new_tokens=1)], lambda n, cond: ("2", "length"), rows=3))
    assert [item["kinds"] for item in found["items"]] == [["wrong"], ["right"], ["wrong"]]


def test_a_grid_is_a_table_of_tasks_by_conditions(tmp_path: Path) -> None:
    both = [task(name=name, condition=condition) for name in ("one", "two") for condition in ("direct", "cot")]
    out = finished(tmp_path / "grid", both)
    tags, _ = page_of(out)
    assert "By condition" in tags.text
    lines = markdown(out).splitlines()
    start = lines.index("| task | direct | cot |")
    assert [line.split("|")[1].strip() for line in lines[start + 2 : start + 5]] == ["one", "two", "**mean**"]
    assert "40.0\xa0% (" in lines[start + 2]
    assert "95.0\xa0% (" in lines[start + 2]  # all but the one that was not asked
    mixed = finished(tmp_path / "mixed", [both[0], both[3]])
    assert "By condition" not in page_of(mixed)[0].text  # a mean of different tasks would compare nothing
    assert "mean of 2" in markdown(mixed)


def test_a_comparison_is_shown_with_what_the_other_said(tmp_path: Path) -> None:
    out = compared(tmp_path / "run", [task()])
    tags, found = page_of(out)
    [row] = read_json(out / "comparison.json")["rows"]
    assert row["paired"]["second_better"] == 11
    assert "Compared with b/weights" in tags.text
    assert "+55.0\xa0%" in tags.text
    assert "+55.0\xa0%" in markdown(out)
    assert f"{row['paired']['p']:.3g}" in tags.text
    others = {item["id"]: item["other"] for item in found["items"]}
    assert others["q2"] == {"strict": 1.0, "got": "3", "text": "so 3"}
    assert others["q13"]["strict"] == 0
    for path in (out / "against").iterdir():  # the scores of the other are ours; its responses may be gone
        path.unlink()
    tags, found = page_of(out)
    assert "Compared with b/weights" in tags.text
    assert {item["other"] for item in found["items"]} == {None}


def test_a_remark_where_a_score_cannot_be_told_from_guessing(tmp_path: Path) -> None:
    nothing = finished(tmp_path / "a", [task(chance=0.4)])
    assert "cannot be told from guessing" in page_of(nothing)[0].text
    something = finished(tmp_path / "b", [task(chance=0.1)])
    assert "cannot be told from guessing" not in page_of(something)[0].text


# ----------------------------------------------------------------------------------------------------------------------


def test_what_others_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    out = hostile(tmp_path / "run")
    tags, found = page_of(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    plain, _ = page_of(finished(tmp_path / "plain", [task()], rows=3))
    known = {name for name, _ in plain.attributes} | {"title"}
    assert {name for name, _ in tags.attributes} <= known
    assert tags.scripts[1] == plain.scripts[1]  # the policy lets run what has this script's checksum, nothing else
    assert "script-src 'sha256-" in page and "'unsafe-inline'; script-src" in page
    for forbidden in ("<img", "<script>window", "\u2028", "\u202e", "\x00"):
        assert forbidden not in tags.scripts[0]
        assert forbidden not in page
    assert "<!--" not in page
    assert r"\x00" in found["items"][0]["text"]
    assert "</script><script>window.hacked" in found["items"][0]["text"]  # all of it is there, as text
    assert not any(url in page for url in ("http:", "https:", "url(", "@import"))


def test_a_fence_is_longer_than_what_it_holds(tmp_path: Path) -> None:
    assert fenced("a ```` b").splitlines()[0] == "`````text"
    assert fenced("plain").splitlines() == ["```text", "plain", "```"]
    out = hostile(tmp_path / "run")
    write_evaluation_report(out)
    text = markdown(out)
    inside, outside = False, []
    for line in text.splitlines():
        if line.startswith("`````"):
            inside = not inside
        elif not inside:
            outside.append(line)
    assert not inside
    assert "<script" in text
    for line in outside:
        assert "<img" not in re.sub(r"\\.|&lt;", "", line), line
    assert cell("a|b\n<c> \u202e") == r"a\|b \<c\> \\u202e"


@pytest.mark.parametrize("text", ["</ScRiPt >", "<!--<script>", "\u2028\u2029", "\ud83d", "\x7f", "🙂 é", "&amp;"])
def test_json_within_a_page_is_the_same_text_and_no_markup(text: str) -> None:
    inline = inline_json([text])
    assert json.loads(inline) == [text]
    assert not set(inline) & set("<>&\u2028\u2029\x7f")
    inline.encode("utf-8")


# ----------------------------------------------------------------------------------------------------------------------


def test_a_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished(tmp_path / "run", [task(), task("long " * 400, "long")], rows=200)
    monkeypatch.setattr(evaluation_responses, "WRONG", 30)
    monkeypatch.setattr(evaluation_responses, "RIGHT", 5)
    monkeypatch.setattr(evaluation_responses, "PAGE_BYTES", 30_000)
    monkeypatch.setattr(evaluation_responses, "CHARACTERS", 900)
    tags, found = page_of(out)
    items = found["items"]
    few, long = ([item for item in items if item["group"] == number] for number in (0, 1))
    assert sum("right" in item["kinds"] for item in few) == 5
    assert 0 < sum("right" in item["kinds"] for item in long) < 5
    assert sum("right" not in item["kinds"] for item in few) == 30
    assert 5 < sum("right" not in item["kinds"] for item in long) < 15
    assert len(tags.scripts[0].encode()) < 30_000
    assert re.search(r"\n\[… 1,10\d characters left out …\]\n", found["texts"][long[0]["prompt"]])
    assert found["texts"][long[0]["prompt"]].endswith(f"#{long[0]['id'][1:]}")  # the question is at the end
    assert f"{len(items)} of 400 responses" in re.sub(r"\s+", " ", tags.text)
    assert "answers.jsonl" in tags.text
    of_both = {item["id"] for item in few} & {item["id"] for item in long}
    assert of_both == {item["id"] for item in long}  # which ones are shown is decided by the question
    first = [int(item["id"][1:]) for item in few]
    assert first == sorted(first)


def test_the_markdown_has_room_in_an_issue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished(tmp_path / "run", [task("long " * 4000)], rows=30)
    write_evaluation_report(out)
    whole = markdown(out)
    assert whole.count("### ") == evaluation_report.EXAMPLES
    assert len(whole) < 60_000
    monkeypatch.setattr(evaluation_report, "MARKDOWN_CHARACTERS", 5000)
    write_evaluation_report(out)
    assert 0 < markdown(out).count("### ") < evaluation_report.EXAMPLES
    assert len(markdown(out)) <= 5000


def test_a_run_that_is_not_finished_or_is_damaged_is_named(tmp_path: Path) -> None:
    out = finished(tmp_path / "run", [task()])
    before = sorted(path.name for path in out.iterdir())
    answers = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(answers + '{"task": "sums"}\n')
    with pytest.raises(UserError, match="answers.jsonl:21: damaged .no condition, id"):
        write_evaluation_report(out)
    assert sorted(path.name for path in out.iterdir()) == before
    (out / "results.json").unlink()
    with pytest.raises(UserError, match="results.json: no such file"):
        write_evaluation_report(out)
