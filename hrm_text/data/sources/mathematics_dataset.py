"""The generator of the DeepMind Mathematics data set (Saxton et al. 2019): its 24 fastest modules."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hrm_text.contracts import Example
from hrm_text.data.sources.registry import Keyed, python_module, source

MODULES = (
    "measurement__time",
    "numbers__place_value",
    "numbers__base_conversion",
    "numbers__is_factor",
    "numbers__list_prime_factors",
    "numbers__div_remainder",
    "numbers__gcd",
    "numbers__lcm",
    "numbers__is_prime",
    "arithmetic__div",
    "arithmetic__mul",
    "arithmetic__add_or_sub",
    "arithmetic__add_or_sub_in_base",
    "arithmetic__add_sub_multiple",
    "arithmetic__mul_div_multiple",
    "arithmetic__mixed",
    "arithmetic__nearest_integer_root",
    "comparison__pair",
    "comparison__kth_biggest",
    "comparison__sort",
    "comparison__closest",
    "algebra__linear_1d",
    "algebra__linear_2d",
    "polynomials__collect",
)
"""At least 300 questions a second on one core; almost all of the other 32 make fewer.

``numbers__round_number`` is left out: it calls ``randrange`` with fractions, which Python 3.12 refuses.
"""

LONGEST_QUESTION, LONGEST_ANSWER = 160, 30
"""Characters, the limits of the published data."""

BATCH = 256
"""Questions drawn between two exchanges of the global random states."""


class _OldArray(np.ndarray):
    """An array with the method that NumPy 2 removed."""

    def itemset(self, index: Any, value: Any) -> None:
        self[index] = value


class _OldNumpy:
    """NumPy as the generator's polynomials use it: with ``object`` and ``itemset``, which NumPy 2 no longer has."""

    object = object

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def zeros(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros(*args, **kwargs).view(_OldArray)

    def empty(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.empty(*args, **kwargs).view(_OldArray)


def load_modules() -> dict[str, Callable[[], Any]]:
    """Each module's function, over the whole training range of difficulty.

    The package predates SymPy 1.12 and NumPy 2. Its files stay as they are: the name it imports from SymPy is put back
    where it was, and the one of its modules that needs the old NumPy sees it.
    """
    package = importlib.import_module("sympy.solvers.diophantine")
    moved = importlib.import_module("sympy.solvers.diophantine.diophantine")
    package.base_solution_linear = moved.base_solution_linear  # type: ignore[attr-defined]
    importlib.import_module("mathematics_dataset.sample.polynomials").np = _OldNumpy()  # type: ignore[attr-defined]
    modules = importlib.import_module("mathematics_dataset.modules.modules")
    families = modules.train(lambda entropy_range: entropy_range)
    return {f"{family}__{name}": make for family, named in families.items() for name, make in named.items()}


class _Randomness:
    """The global random states, lent to the generator for a while: it draws from ``random`` and ``numpy.random``."""

    def __init__(self, seed: int) -> None:
        self.states = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *error: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        lent = self.states
        self.states = random.getstate(), np.random.get_state()
        random.setstate(lent[0])
        np.random.set_state(lent[1])


def key_of(question: str) -> str:
    """The numbers of a question sorted as text: the same for all wordings and for swapped operands."""
    return " ".join(sorted(re.findall(r"\d+", question))) or question


@source(
    "mathematics_dataset",
    licence="Apache-2.0",
    home="https://github.com/google-deepmind/mathematics_dataset",
    condition="direct",
    files=dict.fromkeys(MODULES, 12_000),
    needs=python_module("mathematics_dataset"),
)
def generate(file: str, seed: int) -> Iterator[Keyed]:
    """School mathematics: arithmetic, numbers, comparison, measurement, linear equations."""
    make = load_modules()[file]
    randomness = _Randomness(random.Random(f"{file} {seed}").randrange(2**32))
    while True:
        with randomness:
            problems = [make() for _ in range(BATCH)]
        for problem in problems:
            question, answer = str(problem.question), str(problem.answer)
            if len(question) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER:
                yield Keyed(
                    f"mathematics_dataset/{file}", key_of(question), Example("direct", question, answer), answer
                )
