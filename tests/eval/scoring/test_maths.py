from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.scoring import maths
from hrm_text.eval.scoring.maths import Comparer, score_maths
from hrm_text.eval.task import Question

installed = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify, which scores, is not installed"
)
UNFINISHED = r"\boxed{9^{9^{9^9}}}"
ENDLESS = 100_000


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    maths.comparer().close()


def worth(gold: str, response: str) -> tuple[float, bool]:
    scored = score_maths(response, Question("0", "", gold))
    return scored.strict, scored.readable


@installed
@pytest.mark.parametrize(
    ("gold", "box"),
    [
        (r"\frac{1}{2}", r"\frac12"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", "0.5"),
        ("1/2", r"\frac{1}{2}"),
        (r"3\frac12", "3.5"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x^2+2x+1", "1 + 2x + x^2"),
        ("p - q", "-q + p"),
        ("5", "x = 5"),
        ("1000", "1,000"),
        ("0", "-0"),
        (r"50\%", "50"),
        (r"50\%", "0.5"),
        ("18", r"\$18"),
        ("10", r"10\text{ cm}"),
        ("90", r"90^\circ"),
        (r"\text{east}", "east"),
        (r"\text{(B)}", "B"),
        ("(1,2)", "(1, 2)"),
        (r"\{1,2\}", r"\{2, 1\}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("[0,1)", "[0, 1)"),
    ],
)
def test_equal_answers_that_are_written_differently(gold: str, box: str) -> None:
    assert worth(gold, rf"So it is \boxed{{{box}}}.") == (1, True)


@installed
@pytest.mark.parametrize(
    ("gold", "response", "readable"),
    [
        (r"\frac{1}{2}", r"\boxed{2}", True),
        (r"2\sqrt{3}", r"\boxed{2}", True),
        (r"3\frac12", r"\boxed{3}", True),
        ("5", r"\boxed{-5}", True),
        ("5", r"\boxed{5} or \boxed{6}", True),
        ("(1,2)", r"\boxed{(2,1)}", True),
        ("[0,1)", r"\boxed{[0,1]}", True),
        (r"\text{east}", r"\boxed{\text{west}}", True),
        ("5", r"\boxed{\frac{5}{0}}", True),
        ("5", r"\boxed{\notacommand{}}", True),
        ("5", r"\boxed{}", False),
        ("5", "The answer is $5$.", False),
        ("5", r"\boxed{5", False),
        ("5", "", False),
        ("5", "word " * (ENDLESS // 5), False),
        ("5", "1," * (ENDLESS // 2), False),
        ("5", r"\boxed{" * (ENDLESS // 7), False),
        ("5", r"\frac{1" * (ENDLESS // 7), False),
    ],
)
def test_answers_that_are_wrong_or_no_answers(gold: str, response: str, readable: bool) -> None:
    assert worth(gold, response) == (0, readable)


@installed
@pytest.mark.parametrize(
    ("gold", "response", "strict", "published"),
    [
        ("5", r"\boxed{5}", 1, 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1, 1),
        ("5", "The answer is $5$.", 0, 1),
        (r"3\frac12", r"\boxed{3}", 0, 1),
        ("x+1", r"\boxed{x+1}", 1, 0),
        (r"\text{east}", r"\boxed{\text{east}}", 1, 0),
    ],
)
def test_the_published_score_may_lie_on_either_side(gold: str, response: str, strict: float, published: float) -> None:
    scored = score_maths(response, Question("0", "", gold))
    assert (scored.strict, scored.published) == (strict, published)


@installed
def test_an_answer_that_takes_too_long_is_wrong_and_the_next_is_compared() -> None:
    comparer = Comparer(seconds=0.5)
    try:
        assert comparer.equal("1", "1.0")
        start = time.monotonic()
        assert not comparer.equal("5", UNFINISHED)
        assert time.monotonic() - start < 3
        assert comparer.equal("1", "1.0")
    finally:
        comparer.close()


@installed
def test_a_process_that_died_is_replaced() -> None:
    comparer = maths.comparer()
    assert comparer.equal("1", "1.0")
    assert comparer._process is not None
    comparer._process.kill()
    comparer._process.wait()
    assert comparer.equal("1", "1.0")


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"MATH is scored by math-verify, .* pip install 'hrm-text\[eval\]'"):
        Comparer().equal("1", "1")


def test_a_library_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(maths, "START_SECONDS", 0.0)
    with pytest.raises(UserError, match="math-verify does not start: .* installs what it needs"):
        Comparer().equal("1", "1")
