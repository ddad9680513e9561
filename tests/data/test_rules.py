from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data.rules import Rule, read_rules, rows_per_epoch, rule_for, shares


def test_rules_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- {prefix: flan__, max_per_file: 5000, long_context: drop}\n- {prefix: small, repeat: 10}\n")
    assert read_rules(path) == [
        Rule(prefix="flan__", max_per_file=5000, long_context="drop"),
        Rule(prefix="small", repeat=10),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {prefix: a}\n- {prefix: b, max_per_fil: 3}",
            "rule 2: unknown key 'max_per_fil'; did you mean 'max_per_file'",
        ),
        ("- {max_per_file: 3}", "rule 1: missing key 'prefix'"),
        ("- {prefix: a, repeat: 0}", "rule 1: repeat"),
        ("- {prefix: a, max_per_file: -1}", "rule 1: max_per_file"),
        ("- {prefix: a, long_context: cut}", "rule 1: long_context.*'truncate' or 'drop'"),
        ("prefix: a", "expected a list of rules"),
        ("", "expected a list of rules"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rules(path)


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_shares_add_up_and_keep_proportions_to_within_one(wanted: list[int], most: int) -> None:
    shared = shares(wanted, most)
    assert sum(shared) == min(sum(wanted), most)
    for share, number in zip(shared, wanted, strict=True):
        exact = number * min(1, most / max(sum(wanted), 1))
        assert abs(share - exact) < 1
        assert share <= number


def test_a_rule_has_a_limit_for_each_file_and_one_for_all() -> None:
    rule, other = Rule(prefix="a", max_per_file=20, max_total=50, repeat=3), Rule(prefix="")
    # 20, 20, 20 and 5 are wanted: 65, of which 50 in proportion; two are left by rounding: for the last and the first.
    assert rows_per_epoch([rule, other, rule, rule, rule], [100, 7, 20, 30, 5]) == [48, 7, 45, 45, 12]
    assert rows_per_epoch([rule, rule], [20, 30]) == [60, 60]
    # Two rules of the same content count apart.
    twin = Rule(prefix="a", max_total=4)
    assert rows_per_epoch([twin, Rule(prefix="a", max_total=4)], [9, 9]) == [4, 4]


def test_the_first_rule_that_matches_is_taken_whole_files_without_one() -> None:
    rules = [Rule(prefix="a__", repeat=2), Rule(prefix="a", repeat=3)]
    assert [rule_for(name, rules).repeat for name in ("a__x", "ab", "b")] == [2, 3, 1]
