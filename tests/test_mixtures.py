from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hrm_text.data.rules import Rule, read_rules, rule_for
from hrm_text.data.sources.reasoning_gym import TASKS
from hrm_text.data.sources.upstream import DATASETS

MIXTURES = sorted((Path(__file__).parents[1] / "configs" / "mixtures").glob("*.yaml"))
OF_THE_TABLE = {
    "flan_cot_fs", "flan_cot_zs", "flan_dialog_fs", "flan_dialog_zs", "flan_flan2021_fs", "flan_flan2021_zs",
    "flan_niv2_fs", "flan_niv2_zs", "flan_t0_fs", "flan_t0_zs", "tasksource", "no_robots", "synth",
    "openmathinstruct2", "openmathinstruct2_answers", "numinamath", "platypus_arb", "platypus_openbookqa",
    "platypus_prm800k", "platypus_reclor", "platypus_scibench", "platypus_scienceqa", "platypus_theoremqa", "principia",
    "principia_numerical", "omnimath", "gsm8k_train", "math_train", "math_train_answers", "dm_mathematics",
    "amps_mathematica", "amps_khan", "sudoku_extreme", "acereason", "openthoughts2", "textbook_reasoning",
    "natural_reasoning", "webinstruct_verified",
}  # fmt: skip
"""The datasets of the released mixture."""
FROM_BENCHMARKS = {
    "flan_cot_fs", "flan_cot_zs", "flan_flan2021_fs", "flan_flan2021_zs", "flan_niv2_fs", "flan_niv2_zs", "flan_t0_fs",
    "flan_t0_zs", "tasksource", "openmathinstruct2", "openmathinstruct2_answers", "numinamath", "platypus_arb",
    "platypus_openbookqa", "platypus_prm800k", "platypus_reclor", "platypus_scibench", "platypus_scienceqa",
    "platypus_theoremqa", "omnimath", "gsm8k_train", "math_train", "math_train_answers", "acereason", "openthoughts2",
}  # fmt: skip
"""Those that hold a train split of a benchmark, are made from one, or are a benchmark."""


@pytest.fixture(scope="module")
def registered() -> set[str]:
    """The names of the released mixture's datasets; importing a module registers its own."""
    for name in ("flan", "general", "knowledge", "mathematics", "symbolic", "reasoning", "web"):
        importlib.import_module(f"hrm_text.data.sources.{name}")
    return {found.name for found in DATASETS.values() if found.group != "your own"}


def rules_of(name: str) -> list[Rule]:
    return read_rules(MIXTURES[0].parent / f"{name}.yaml")


def applied(rules: list[Rule], dataset: str) -> Rule | None:
    """The rule that names a file of the dataset; None where only a rule for everything does, or none."""
    rule = rule_for(f"{dataset}__train-00000.parquet", rules)
    return rule if rule.prefix else None


def test_the_table_is_what_there_are_cleaners_for(registered: set[str]) -> None:
    assert registered == OF_THE_TABLE


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_a_mixture_can_be_read_and_every_rule_of_it_has_something_to_match(path: Path) -> None:
    rules = read_rules(path)
    names = OF_THE_TABLE | {"reasoning_gym"}
    folders = [f"{name}__train-00000.parquet" for name in names]
    used = [rule_for(folder, rules) for folder in folders]
    for rule in rules:
        # No rule stands behind one that takes all that it could.
        assert any(rule is other for other in used) or not rule.prefix, rule
    assert path.read_text().startswith("# ") and "hrm-text data sample" in path.read_text()


@pytest.mark.parametrize("name", ["released", "small", "held_out"])
def test_every_dataset_is_named(name: str) -> None:
    rules = rules_of(name)
    assert [dataset for dataset in sorted(OF_THE_TABLE) if applied(rules, dataset) is None] == []


def test_the_released_mixture_is_that_of_the_table() -> None:
    rules = rules_of("released")
    expected = {
        "flan_cot_fs": (None, None, 1),
        "flan_t0_zs": (5000, None, 1),
        "tasksource": (10_000, None, 1),
        "no_robots": (None, None, 10),
        "synth": (20_000, 10_000_000, 1),
        "openmathinstruct2": (None, 2_000_000, 1),
        "platypus_scibench": (None, None, 10),
        "platypus_prm800k": (0, None, 1),
        "gsm8k_train": (None, None, 10),
        "dm_mathematics": (100_000, None, 1),
        "amps_khan": (10_000, None, 1),
        "amps_mathematica": (10_000, None, 1),
        "sudoku_extreme": (None, 1_000_000, 1),
        "acereason": (None, 2_000_000, 1),
        "openthoughts2": (None, 500_000, 1),
        "textbook_reasoning": (None, None, 1),
        "natural_reasoning": (None, None, 1),
        "webinstruct_verified": (None, None, 10),
    }
    found = {name: applied(rules, name) for name in expected}
    assert {name: rule and (rule.max_per_file, rule.max_total, rule.repeat) for name, rule in found.items()} == expected
    # What is in two parts shares one limit.
    assert applied(rules, "openmathinstruct2") is applied(rules, "openmathinstruct2_answers")


def test_the_small_mixture_is_a_tenth_of_the_released_one() -> None:
    small, released = rules_of("small"), rules_of("released")
    for dataset in OF_THE_TABLE:
        ours, theirs = applied(small, dataset), applied(released, dataset)
        assert ours is not None and theirs is not None
        assert ours.prefix == theirs.prefix
        for limit in ("max_per_file", "max_total"):
            whole = getattr(theirs, limit)
            assert whole is None or getattr(ours, limit) * 10 == whole
        assert ours.repeat == 1
        assert theirs.repeat == 10 or ours.max_per_file or ours.max_total or theirs.max_per_file == 0


def test_nothing_from_a_benchmark_is_in_the_held_out_mixture() -> None:
    rules, released = rules_of("held_out"), rules_of("released")
    for dataset in OF_THE_TABLE:
        rule, before = applied(rules, dataset), applied(released, dataset)
        assert rule is not None and before is not None
        if dataset in FROM_BENCHMARKS:
            assert rule.max_per_file == 0, dataset
        else:
            assert (rule.max_per_file, rule.max_total, rule.repeat) == (
                before.max_per_file, before.max_total, before.repeat,
            )  # fmt: skip
    assert rule_for("gsm8k__somebody_elses_name.parquet", rules).max_per_file == 0


def test_reasoning_gym_alone_is_in_its_mixture() -> None:
    rules = rules_of("reasoning_gym")
    for task in TASKS:
        assert rule_for(f"reasoning_gym__{task}.jsonl", rules).max_per_file is None
    for dataset in OF_THE_TABLE:
        assert rule_for(f"{dataset}__x.parquet", rules).max_per_file == 0
