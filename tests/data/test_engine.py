"""Shards run to the end here, in processes and on Slurm, and what fails is heard."""

from __future__ import annotations

import functools
import importlib.util
import os
import stat
import time
from pathlib import Path

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.engine import Engine, report

NUMBERS = list(range(5))


def write_square(folder: Path, number: int) -> None:
    (folder / f"{number}.txt").write_text(f"{number * number} {os.getpid()}")


def write_square_slowly(folder: Path, number: int) -> None:
    report(3)
    time.sleep(1)
    write_square(folder, number)


def fail_at_three(folder: Path, number: int) -> None:
    if number == 3:
        raise UserError(f"shard {number} is bad; mend it")
    write_square(folder, number)


def crash_at_three(folder: Path, number: int) -> None:
    assert number != 3, "a bug"


def squares(folder: Path) -> list[int]:
    return [int((folder / f"{number}.txt").read_text().split()[0]) for number in NUMBERS]


def processes(folder: Path) -> set[int]:
    return {int(path.read_text().split()[1]) for path in folder.glob("*.txt")}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_shard_is_worked_on(tmp_path: Path, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    work = functools.partial(write_square, tmp_path)
    engine = Engine(workers=workers, folder=tmp_path / "log")
    engine.run("square", work, NUMBERS, weights=[10, 20, 30, 40, 50], on_progress=lambda *now: seen.append(now))
    assert squares(tmp_path) == [0, 1, 4, 9, 16]
    assert (os.getpid() in processes(tmp_path)) == (workers == 1)
    assert seen[-1] == (150, 150)
    assert sorted(seen) == seen
    # Numbers of shards mean nothing to the next run, which has others.
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    engine.run("square", work, NUMBERS)
    assert squares(tmp_path) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_fails_fails_the_run(tmp_path: Path, workers: int) -> None:
    engine = Engine(workers=workers, folder=tmp_path / "log")
    with pytest.raises(UserError, match="shard 3 is bad; mend it"):
        engine.run("square", functools.partial(fail_at_three, tmp_path), NUMBERS)
    with pytest.raises(AssertionError, match="a bug"):
        engine.run("square", functools.partial(crash_at_three, tmp_path), NUMBERS)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_begun_shows_as_progress(tmp_path: Path, workers: int) -> None:
    seen: list[int] = []
    Engine(workers=workers, folder=tmp_path / "log").run(
        "square",
        functools.partial(write_square_slowly, tmp_path),
        NUMBERS[:2],
        weights=[10, 10],
        on_progress=lambda done, total: seen.append(done),
    )
    assert {3, 6, 13} & {*seen}
    assert seen[-1] == 20


def test_nothing_to_do(tmp_path: Path) -> None:
    Engine(workers=2, folder=tmp_path / "log").run("square", functools.partial(write_square, tmp_path), [])
    assert not list(tmp_path.glob("*.txt"))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="one of local, slurm, ray; found 'cloud'"):
        Engine(kind="cloud")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1, found 0"):
        Engine(workers=0)
    with pytest.raises(UserError, match="name the partition"):
        Engine(kind="slurm")
    with pytest.raises(UserError, match="needs a folder"):
        Engine(workers=2).run("square", print, [1])


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        Engine(kind="slurm", partition="cpu", folder=tmp_path).run("square", print, [1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install ray"):
        Engine(kind="ray", folder=tmp_path).run("square", print, [1])


SBATCH = """#!/bin/bash
# A queue of one: every task of the array at once, here.
script=$(mktemp)
cat "${@: -1}" > "$script"
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for arg in "$@"; do case "$arg" in --export=ALL,*) export "${arg#--export=ALL,}";; esac; done
if [ -n "$array" ]; then
    for ((task = 0; task <= array; task++)); do
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_JOB_ID=7 SLURM_NODELIST=here SLURM_NODEID=0 bash "$script" >&2
    done
fi
echo 7
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
SLURM_PROCID=0 exec "$@"
"""


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commands that stand for Slurm's: the script that is submitted does the work of every shard."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "squeue": "#!/bin/bash\n", "scontrol": "#!/bin/bash\necho here\n"}
    for name, text in commands.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod((bin_folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]))
    engine = Engine(kind="slurm", workers=2, partition="cpu", folder=tmp_path / "log")
    engine.run("square", functools.partial(write_square, tmp_path), NUMBERS[:3])
    assert {path.name for path in tmp_path.glob("*.txt")} == {"0.txt", "1.txt", "2.txt"}
    assert os.getpid() not in processes(tmp_path)
    script = (tmp_path / "log" / "square" / "launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --array=0-2%2" in script
    with pytest.raises(UserError, match="shard 3 is bad"):
        engine.run("square", functools.partial(fail_at_three, tmp_path), [3])
