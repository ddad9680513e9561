from __future__ import annotations

import time

import torch

from hrm_text.recipes.stopwatch import Stopwatch


def test_the_stopwatch_times_what_is_inside() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for seconds in (0.02, 0.0):
        with stopwatch:
            time.sleep(seconds)
        time.sleep(0.01)
    slow, fast = stopwatch.milliseconds()
    assert slow >= 20 > fast
