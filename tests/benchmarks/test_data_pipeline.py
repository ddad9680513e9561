"""The pipeline from a generated corpus to sampled epochs, by its commands, killed on the way."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_pipeline
from benchmarks.data_pipeline import check_store, main, resident, run_watched

if not Path("/proc/self/status").exists():
    pytest.skip("memory is read from /proc (Linux)", allow_module_level=True)


def test_memory_of_children_counts(tmp_path: Path) -> None:
    hold = "x = bytearray(60_000_000); import time; time.sleep(1)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    watched = run_watched("hold", [sys.executable, "-c", nested], tmp_path / "log")
    assert watched.peak_anonymous_bytes > 60_000_000
    assert watched.peak_bytes > watched.peak_anonymous_bytes
    assert resident(2**22 + 1) == (0, 0)


def test_a_killed_command_is_started_again(tmp_path: Path) -> None:
    program = f"import time; open({str(tmp_path / 'runs')!r}, 'a').write('x'); time.sleep(1.5)"
    began = time.perf_counter()
    watched = run_watched("sleep", [sys.executable, "-c", program], tmp_path / "log", kill_after=[0.8, 0.8])
    assert watched.kills == 2
    assert (tmp_path / "runs").read_text() == "xxx"
    assert time.perf_counter() - began < 20


def test_a_failing_command_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        run_watched("fail", [sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gigabytes", "0.005", "--vocab-size", "2000", "--kills", "2", "--kill-within", "3", "--again"]
    names = ["flan_cot_zs", "acereason", "sudoku_extreme", "natural_reasoning"]
    main([str(tmp_path / "work"), *arguments, "--datasets", *names, "--out", str(tmp_path / "memory.png")])
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "rows of the store equal their records" in capsys.readouterr().out
    # The checks could fail: one token changed is seen.
    store = tmp_path / "work" / "store"
    for folder in data_pipeline.folders_of(store):
        tokens = np.load(folder / "tokens.npy", mmap_mode="r+")
        tokens[:] = tokens[::-1].copy()
    with pytest.raises(AssertionError):
        check_store(tmp_path / "work" / "cleaned", store, 20, 0)
    assert data_pipeline.digest(tmp_path / "work" / "store") != data_pipeline.digest(tmp_path / "work" / "store_again")
