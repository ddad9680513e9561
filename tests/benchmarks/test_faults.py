"""Training under torchrun, killed on the way; the whole harness takes longer (benchmarks/faults.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import curve, damage, differences, expect_same, main
from benchmarks.faults_job import Failure, is_running, last_step, ranks_of, send

if not Path("/proc/self/stat").exists():
    pytest.skip("processes are found in /proc (Linux)", allow_module_level=True)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_killed_while_saving_and_equal_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, results = tmp_path / "work", tmp_path / "results.json"
    arguments = [str(work), "--ranks", "2", "--kills", "1", "--seed", "10", "--steps", "40", "--every", "5"]
    arguments += ["--faults", "kills"]
    assert main([*arguments, "--json", str(results)]) == 0, capsys.readouterr().out
    _, killed = json.loads(results.read_text())
    assert killed["passed"] and killed["figures"]["kills"] == {"a rank while saving": 1}
    # The comparison could fail: one bit of one tensor, one loss, one counter.
    whole, other = work / "undisturbed", work / "killed"
    assert differences(other, whole) == []
    shards = sorted((other / "checkpoints" / "step_00000040").glob("*.safetensors"))
    damage(max(shards, key=lambda path: path.stat().st_size), "corrupted")
    (changed,) = differences(other, whole)
    assert changed.split("/")[0] in ("weights", "exp_avg", "exp_avg_sq", "ema")
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 1'))
    assert differences(other, whole)[1] == "metrics of 40 steps, the first [1]"
    state = other / "checkpoints" / "step_00000040" / "state.json"
    state.write_text(state.read_text().replace('"skipped": 0', '"skipped": 1'))
    with pytest.raises(Failure, match="3 things differ from the undisturbed run: .*metrics of 40 steps.*state skipped"):
        expect_same(other, whole)


def test_an_unknown_fault_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "work"), "--faults", "flood"])
    assert "expected some of kills, terminated, " in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process with two ranks and another child."""
    program = r"""
import os, subprocess, sys
sleep = [sys.executable, "-c", "import os, time; os.write(1, b'up\\n'); time.sleep(60)"]
for extra in ({"RANK": "0"}, {"RANK": "1"}, {}):
    subprocess.Popen(sleep, env={**os.environ, **extra})
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env={key: value for key, value in os.environ.items() if key != "RANK"},
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["up\n"] * 3
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_ranks_of_a_launcher_are_found_and_no_other_process(launcher: subprocess.Popen[str]) -> None:
    ranks = ranks_of(launcher.pid)
    assert set(ranks) == {0, 1}
    assert all(is_running(process) for process in ranks.values())
    send(ranks[0], signal.SIGKILL)
    while is_running(ranks[0]):
        pass
    assert ranks_of(launcher.pid) == {1: ranks[1]}, "one that ended and was not waited for is no rank any more"
    send(ranks[0], signal.SIGTERM)  # nothing to send it to, and no error


def test_the_last_step_is_read_past_half_a_line_and_other_records(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"kind": "step", "step": 8, "loss": 2.0}, {"kind": "step", "step": 9, "loss": 1.0}, {"kind": "end"}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "step": 1')
    assert last_step(metrics) == 9
    metrics.write_text("")
    assert last_step(metrics) == 0


def test_of_a_step_taken_twice_the_second_counts_and_time_does_not(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    losses = [(1, 3.0), (2, 2.5), (2, 2.0)]
    metrics.write_text(
        "".join(json.dumps({"kind": "step", "step": s, "loss": x, "seconds": x}) + "\n" for s, x in losses)
    )
    assert {step: record["loss"] for step, record in curve(metrics).items()} == {1: 3.0, 2: 2.0}
    assert "seconds" not in curve(metrics)[1]


@pytest.mark.parametrize("kind", ["corrupted", "truncated", "missing"])
def test_damage(tmp_path: Path, kind: str) -> None:
    shard, content = tmp_path / "shard", bytes(range(100))
    shard.write_bytes(content)
    damage(shard, kind)
    if kind == "missing":
        assert not shard.exists()
    else:
        left = shard.read_bytes()
        assert (
            left == content[:50]
            if kind == "truncated"
            else sum(a != b for a, b in zip(left, content, strict=True)) == 1
        )
    shutil.rmtree(tmp_path)
