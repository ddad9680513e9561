from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.eval.scoring.boxed import last_boxed, score_integer
from hrm_text.eval.task import Question

ENDLESS = 100_000


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{ 18 }", "18"),
        (r"\boxed {18}", "18"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{6} \fbox{7}", "6"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{}", ""),
        ("", None),
        ("18", None),
        (r"\boxed 18", None),
        (r"\boxed{18", None),
        (r"\boxed{17} and \boxed{18", None),
        (r"\boxed{17} and \boxed", None),
        ("boxed{18}", None),
        (r"\boxed{" * (ENDLESS // 7), None),
        (r"\boxed{" + "{" * ENDLESS, None),
        ("x" * ENDLESS + r"\boxed{3}", "3"),
        (r"\boxed{" + "9" * ENDLESS + "}", "9" * ENDLESS),
    ],
)
def test_the_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


BALANCED = st.recursive(
    st.text("abc0 ,.$-", max_size=4),
    lambda inner: inner.map("{{{}}}".format) | st.lists(inner, max_size=3).map("".join),
)


@given(BALANCED)
def test_what_was_boxed_is_found_whatever_stands_around_it(content: str) -> None:
    assert last_boxed(rf"\boxed{{1}} then \boxed{{{content}}} at last }}") == content.strip()


@pytest.mark.parametrize(
    ("response", "strict", "published", "got"),
    [
        (r"\boxed{18}", 1, 1, "18"),
        (r"9 + 9 = 18. \boxed{18.0}", 1, 1, "18"),
        (r"\boxed{\$18}", 0, 0, None),
        (r"\boxed{$18}", 1, 1, "18"),
        (r"\boxed{ 1 8 }", 0, 0, None),
        (r"\boxed{+18}", 1, 1, "18"),
        (r"\boxed{-18}", 0, 0, "-18"),
        (r"\boxed{18.9}", 0, 1, "18.9"),
        (r"\boxed{17.9999999999999999999}", 0, 1, "17.9999999999999999999"),
        (r"\boxed{1.8e1}", 1, 1, "18"),
        (r"\boxed{18\%}", 0, 0, None),
        (r"\boxed{18%}", 0, 0, None),
        (r"\boxed{18 \text{ eggs}}", 0, 0, None),
        (r"\boxed{\frac{36}{2}}", 0, 0, None),
        (r"\boxed{36/2}", 0, 0, None),
        (r"\boxed{eighteen}", 0, 0, None),
        (r"\boxed{18} or \boxed{20}", 0, 0, "20"),
        (r"\boxed{18, 20}", 0, 0, None),
        (r"\boxed{nan}", 0, 0, None),
        (r"\boxed{-inf}", 0, 0, None),
        (r"\boxed{1e999999999}", 0, 0, None),
        (r"\boxed{}", 0, 0, None),
        (" 18\n", 1, 1, "18"),
        ("It is 18.", 0, 0, None),
        (r"\boxed{18", 0, 0, None),
        ("", 0, 0, None),
        ("18 " * (ENDLESS // 3), 0, 0, None),
        (r"\boxed{" + "9" * ENDLESS + "}", 0, 0, None),
    ],
)
def test_an_integer(response: str, strict: float, published: float, got: str | None) -> None:
    scored = score_integer(response, Question("0", "", 18))
    assert (scored.strict, scored.published, scored.got, scored.readable) == (
        strict,
        published,
        got or "",
        got is not None,
    )


@pytest.mark.parametrize(
    ("response", "answer"),
    [(r"\boxed{-0}", 0), (r"\boxed{-0.0}", 0), (r"\boxed{-1,250}", -1250), (r"\boxed{$1,250}", 1250)],
)
def test_signs_and_thousands(response: str, answer: int) -> None:
    assert score_integer(response, Question("0", "", answer)).strict == 1


@given(st.text("0123456789.,$-+e_ \\boxed{}", max_size=30), st.integers(-20, 20))
def test_strictly_is_never_more_than_published(response: str, answer: int) -> None:
    scored = score_integer(response, Question("0", "", answer))
    assert scored.strict <= scored.published
    assert scored.readable or not scored.published
