from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from hrm_text.eval.scoring.drop import accepted_answers, drop_scores, score_drop
from hrm_text.eval.task import Question

WORDS = (
    "the a an The 5 -5 5.0 05 1,000 1000 1e3 inf nan 1_000 10% $3 3rd half-back Ten touch downs by Lions . ... -- 's "
    "O'Neil (x) é E\u0301 ß İ ٣ ½ 1/2 1. .5 +7 5-yard a. the_ １２ -0 x\ny 5\n6 an, \u00a0 \u2028 \x1c"
).split(" ")


@pytest.mark.parametrize(
    ("response", "accepted", "exact", "f1"),
    [
        ("52", [["52"]], 1, 1),
        ("52.0", [["52"]], 1, 1),
        ("1,000", [["1000"]], 1, 1),
        ("-0", [["0"]], 1, 1),
        ("-5", [["5"]], 1, 1),
        ("10%", [["10"]], 1, 1),
        ("$10", [["10"]], 1, 1),
        ("52 people", [["52"]], 0, 0.67),
        ("53 people", [["52 people"]], 0, 0),
        ("people", [["52 people"]], 0, 0),
        ("fifty-two", [["fifty two"]], 1, 1),
        ("The ferry.", [["a ferry"]], 1, 1),
        ("1/2", [["12"]], 1, 1),
        ("3 May 1921", [["May 1921"], ["3 may, 1921"]], 1, 1),
        ("1895", [["1895", "1902"]], 0, 0.5),
        ("1895 and 1902", [["1895", "1902"]], 0, 0.25),
        ("Ida", [["Anna Berg"], ["Ida"]], 1, 1),
        ("Ida Ida", [["Ida"]], 0, 1),
        ("Ida", [["", "x"], ["Ida"]], 1, 1),
        ("the", [["a"]], 1, 1),
        ("", [["Ida"]], 0, 0),
        ("", [[""]], 0, 0),
        ("Ida", [], 0, 0),
        ("52 " * 33_000, [["52"]], 0, 1),
    ],
)
def test_a_response(response: str, accepted: list[list[str]], exact: float, f1: float) -> None:
    assert drop_scores(response, accepted) == (exact, f1)


def test_a_score_is_the_f1_with_the_exact_match_beside_it() -> None:
    scored = score_drop(" 52 people\n", Question("0", "", [["52"]]))
    assert (scored.strict, scored.published, scored.got, scored.readable) == (0.67, 0.67, "52 people", True)
    assert scored.also == {"exact_match": 0}
    assert not score_drop(" \n", Question("0", "", [["52"]])).readable


def answer(number: str = "", spans: tuple[str, ...] = (), **date: str) -> dict[str, Any]:
    return {"number": number, "spans": list(spans), "date": {"day": "", "month": "", "year": ""} | date}


def test_accepted_answers_are_the_same_from_either_layout() -> None:
    validated = [answer("3"), answer(spans=("x", "y")), answer(month="May", year="1921"), answer("3")]
    wanted = [["a b"], ["3"], ["x", "y"], ["May 1921"]]
    listed = {"answer": answer(spans=("a b",)), "validated_answers": validated}
    columns = {name: [each[name] for each in validated] for name in ("number", "spans", "date")}
    assert accepted_answers(listed) == accepted_answers(listed | {"validated_answers": columns}) == wanted


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The harness's own scorer, without the rest of the harness, which takes seconds to import."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or importlib.util.find_spec("scipy") is None:
        pytest.skip("lm_eval and scipy, to compare with, are not installed")
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "tasks" / "drop" / "utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_drop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_equal_those_of_lm_evaluation_harness(theirs: Any) -> None:
    rng = random.Random(0)

    def span() -> str:
        return rng.choice([" ", "-", "  ", "\n"]).join(rng.choices(WORDS, k=rng.randrange(6)))

    partly = 0
    for _ in range(2000):
        accepted = [[span() for _ in range(rng.choice([1, 1, 2, 3, 5]))] for _ in range(rng.randrange(1, 4))]
        response = rng.choice([span(), rng.choice(rng.choice(accepted)), " ".join(rng.choice(accepted))]).strip()
        wanted = theirs.process_results({"answers": accepted}, [response])
        assert drop_scores(response, accepted) == (wanted["em"], wanted["f1"]), (response, accepted)
        partly += 0 < wanted["f1"] < 1
    assert partly > 200  # or the comparison would show little
