from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hrm_text.contracts import UserError
from hrm_text.data.corpus_stats import CorpusStats, EpochStats, LengthCounts, SourceStats, packing_stats
from hrm_text.data.left_out import CleaningStats, MaskStats
from hrm_text.data.pack import EpochIndex
from hrm_text.recipes import data_report
from hrm_text.recipes.data_report import draw, render, standalone, task_rows, write_data_report

HOSTILE = "<script>alert('1')</script> | `x` & \"ü\" 数 \x1b[2J $x_1$ {{ 7*7 }} --> </svg></style><img src=https://e.example/>"


def make_stats(text: str = "name", files: int = 3) -> CorpusStats:
    """A sampled folder with every part; ``text`` stands wherever a string from outside can stand."""
    stats = CorpusStats(Path(f"/data/{text.replace('/', '')}"), is_store=False, max_seq_len=4097)
    stats.sources = [
        SourceStats(f"synth__{text}{i:04}.parquet", rows=100, tokens=1000 * (files - i), usable=90, drawn_rows=180)
        for i in range(files)
    ]
    stats.sources.append(SourceStats(f"{text}.jsonl", rows=1, tokens=1))
    stats.groups = {source.dataset: "rewritten" if source.dataset == "synth" else text for source in stats.sources}
    stats.epochs = [EpochStats(10, 60, 40, 1, 70, 20, 10), EpochStats(10, 60, 40, 1, 0, 95, 5)]
    for lengths in (stats.prefix_lengths, stats.response_lengths):
        lengths.add(np.arange(1, 3000))
    ones = np.ones(500, np.int64)
    stats.packing = packing_stats(EpochIndex(0 * ones, 60 * ones, 0 * ones, 41 * ones), 1000, 2)
    stats.masks = [MaskStats(text, text, {text: text}, 100, 4, {text: (50, 4)})]
    stats.cleaning = {text: CleaningStats(10, 6, Counter({text: 3, "other": 1}))}
    stats.tokenizing = Counter({text: 5})
    stats.unreadable_reports = 1
    return stats


@functools.cache
def drawn() -> dict[str, str]:
    return draw(make_stats())


@functools.cache
def hostile_pages() -> tuple[str, str]:
    stats = make_stats(HOSTILE)
    charts = draw(stats)
    return render(stats, charts, "data_report.html.j2"), render(stats, charts, "data_report.md.j2")


def test_the_page_needs_nothing_else_and_takes_hostile_names_as_text() -> None:
    page, _ = hostile_pages()
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    Reader().feed(page)
    tags = Counter(tag for tag, _ in seen)
    assert not tags["script"] and not tags["img"] and not tags["link"] and tags["svg"] == 2 * len(drawn())
    for _, attributes in seen:
        for name, value in attributes.items():
            assert name not in ("src", "onload") and (name not in ("href", "xlink:href") or str(value).startswith("#"))
    assert "49 " not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)  # no template in a name is run
    assert "\x1b" not in page and "\\x1b[2J" in page


def test_markdown_tables_keep_their_columns_whatever_the_names() -> None:
    _, text = hostile_pages()
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert "<script>" not in text and "\x1b" not in text
    assert "\n\n\n\n" not in text


def test_the_numbers_are_those_of_the_stats() -> None:
    stats = make_stats()
    text = render(stats, drawn(), "data_report.md.j2")
    assert "200 tokens, of which 70 are unique" in text
    assert "| 1 | 10 | 100 | 0.0 % | 95.0 % | 5.0 % | 1 |".replace(" %", "\N{NO-BREAK SPACE}%") in text
    assert (
        "| synth | rewritten | 3 | 300 | 270 | 0 | 540 | 2.00 | 6 k | 100.0 % |".replace(" %", "\xa0%").replace(
            " k", "\xa0k"
        )
        in text
    )
    assert "| prefix | 1500.0 | 150 | 1,500 | 2,850 | 2,970 | 2,999 |" in text
    assert "4 of 100 rows" in text and "| name | 10 | 6 | 3 name, 1 other |" in text


def test_every_chart_is_also_a_picture_by_itself() -> None:
    assert set(drawn()) == {"groups", "datasets", "repeats", "lengths", "packing", "cleaning"}
    for name, chart in drawn().items():
        drawing = standalone(chart)
        assert "var(" not in drawing, name
        ElementTree.fromstring(drawing)


def test_the_table_of_tasks_is_bounded() -> None:
    stats = make_stats(files=500)
    text = render(stats, dict.fromkeys(drawn(), ""), "data_report.md.j2")
    assert "The 60 largest of 501 files" in text and len(text) < 20_000
    assert task_rows(stats)[0].tokens == 500_000


def test_a_store_has_no_epochs_and_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    empty = CorpusStats(tmp_path / "other", is_store=False, max_seq_len=10)
    page = write_data_report(empty, tmp_path / "report").read_text()
    assert "does not record what it was drawn from" in page
    for heading in ("Packing", "Cleaning", "Lengths", "Unique", "Truncation", "Duplicates"):
        assert heading not in page
    store = CorpusStats(tmp_path / "store", is_store=True, max_seq_len=10, sources=[SourceStats("a", rows=1, tokens=5)])
    store.groups, store.prefix_lengths = {"a": "a"}, LengthCounts()
    page = write_data_report(store, tmp_path / "report").read_text()
    assert "A token store of 1 source files" in page and "drawn" not in re.sub(r"<svg.*?</svg>", "", page)


def test_only_a_report_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_report, "draw", lambda stats: drawn())  # drawing takes seconds
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        write_data_report(make_stats(), tmp_path)
    written = write_data_report(make_stats(), tmp_path / "report")
    before = {path.name: path.read_bytes() for path in written.parent.iterdir()}
    assert {"report.html", "report.md", "lengths.svg"} <= set(before)
    write_data_report(make_stats(), tmp_path / "report")
    assert before == {path.name: path.read_bytes() for path in written.parent.iterdir()}  # to the byte
