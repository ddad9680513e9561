from __future__ import annotations

import json

import pytest

from hrm_text.data.decks import StratumSummary
from hrm_text.data.mixture import as_json, as_text, mixture
from hrm_text.data.sample import SampleSummary

SUMMARY = SampleSummary(
    strata=[
        StratumSummary(
            "a1", "a", rows=100, excluded=10, short_response=5, too_long=5, truncated=2, usable=80,
            usable_tokens=8_000, drawn_rows=40, drawn_tokens=4_100,
        ),
        StratumSummary("a2", "a", rows=10, usable=10, usable_tokens=500, drawn_rows=40, drawn_tokens=2_000),
        StratumSummary("b", "", rows=7, usable=7, usable_tokens=0),
    ],
    samples_per_epoch=[40, 40],
    tokens_per_epoch=[3_050, 3_050],
)  # fmt: skip


def test_files_of_a_rule_are_added_up() -> None:
    a, b, total = mixture(SUMMARY)
    assert (a.prefix, a.files, a.rows, a.excluded, a.short, a.long, a.truncated) == ("a", 2, 110, 10, 5, 5, 2)
    assert (a.drawn, a.tokens, a.share) == (40, 3_050, 1)
    # Of the first file no row came twice; the second was gone through four times.
    assert a.unique_tokens == 4_100 + 500
    assert a.repeats == pytest.approx(6_100 / 4_600)
    assert (b.prefix, b.drawn, b.share, b.repeats) == ("", 0, 0, 0)
    assert (total.files, total.rows, total.drawn_tokens) == (3, 117, 6_100)


def test_the_table_is_aligned_and_says_what_the_json_says() -> None:
    rows = mixture(SUMMARY)
    heading, *lines = as_text(rows).splitlines()
    assert heading.split()[0] == "prefix"
    assert len({len(line) for line in (heading, *lines)}) == 1
    assert lines[0].split() == ["a", "2", "110", "10", "5", "5", "2", "40", "3,050", "100.00%", "1.33"]
    assert lines[1].startswith("(every file)")
    plain = json.loads(json.dumps(as_json(rows)))
    assert [row["prefix"] for row in plain] == ["a", "", "all"]
    assert plain[0]["repeats"] == pytest.approx(rows[0].repeats)
