from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from hrm_text.data.sources.mathematics_dataset import MODULES, generate, key_of, load_modules


def test_the_key_ignores_wording_and_order() -> None:
    assert key_of("What is 12 + 7?") == key_of("Add 7 and 12.")
    assert key_of("What is 12 + 7?") != key_of("What is 12 + 8?")
    assert key_of("Name a prime.") == "Name a prime."


def test_the_modules_load_beside_the_numpy_and_sympy_of_today() -> None:
    pytest.importorskip("mathematics_dataset")
    assert set(MODULES) <= set(load_modules())
    assert len(set(MODULES)) == 24


def test_questions_depend_on_the_seed_alone_and_leave_the_global_randomness_as_it_was() -> None:
    pytest.importorskip("mathematics_dataset")
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).random()
    first, same, other = (list(itertools.islice(generate("numbers__gcd", seed), 20)) for seed in (3, 3, 4))
    assert first == same
    assert first != other
    assert (random.random(), np.random.random()) == expected


def test_modules_that_need_the_old_numpy_run() -> None:
    pytest.importorskip("mathematics_dataset")
    assert len(list(itertools.islice(generate("algebra__linear_1d", 0), 3))) == 3
