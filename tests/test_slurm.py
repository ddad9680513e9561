"""The Slurm script: parsed, and run with stand-ins for the commands of a cluster."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "configs" / "slurm" / "train.sbatch"

if shutil.which("bash") is None or shutil.which("pkill") is None:
    pytest.skip("the script is for bash and procps (Linux)", allow_module_level=True)

STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> "$LOG"
        if [ "$1 $2" = "show hostnames" ]; then echo node07; echo node09; fi
    """,
    # Two machines, each a process of its own; USR1 goes to both, as srun's manual has it.
    "srun": """
        echo "srun $*" >> "$LOG"
        while [[ "$1" == --* ]]; do shift; done
        SLURM_NODEID=0 "$@" & first=$!
        SLURM_NODEID=1 "$@" & second=$!
        trap 'kill -USR1 $first $second' USR1
        trap 'echo "srun was terminated" >> "$LOG"' TERM
        failed=0
        for each in $first $second; do
            until wait $each; ! kill -0 $each 2>/dev/null; do :; done
            wait $each || failed=$?
        done
        exit $failed
    """,
    # A launcher with two ranks that save when they are told to stop; told itself, it fails.
    "torchrun": """
        echo "torchrun $SLURM_NODEID $*" >> "$LOG"
        trap 'echo "torchrun was told to stop" >> "$LOG"; exit 1' TERM USR1
        ranks=()
        for rank in 0 1; do
            bash -c '
                trap "sleep 0.3; echo saved >> \\"$LOG\\"; exit 0" TERM
                echo started >> "$LOG"
                for ((i = 0; i < 10 * RUN_SECONDS; i++)); do sleep 0.1; done
                exit $RANK_STATUS
            ' & ranks+=($!)
        done
        for rank in "${ranks[@]}"; do wait "$rank" || exit 1; done
    """,
}


class Job:
    """The script as Slurm runs it, and what the stand-ins noted."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        commands = folder / "bin"
        commands.mkdir()
        for name, text in STAND_INS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}")
            (commands / name).chmod(0o755)
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[07,09]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
        }
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, seconds: int = 0, status: int = 0) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment | {"RUN_SECONDS": str(seconds), "RANK_STATUS": str(status)},
            cwd=self.folder, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        return self.process

    def noted(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(word)]

    def wait_for(self, word: str, times: int) -> None:
        until = time.monotonic() + 20
        while len(self.noted(word)) < times:
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    if made.process is not None:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
        made.process.communicate()


def test_parses_and_every_directive_comes_before_the_first_command() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    lines = SCRIPT.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < first_command, "sbatch does not read what follows a command"
    options = {lines[i].removeprefix("#SBATCH ").split("=")[0] for i in directives}
    assert {"--nodes", "--time", "--requeue", "--signal", "--ntasks-per-node", "--open-mode"} <= options


def test_starts_one_launcher_on_each_machine(job: Job) -> None:
    assert job.start("runs/my config.yaml", "--run", "runs/two words").wait(20) == 0
    expected = (
        "--nnodes=2 --nproc-per-node=8 --max-restarts=20 --rdzv-backend=c10d --rdzv-endpoint=node07:23456 "
        "--rdzv-id=123456-0 -m -- hrm_text train runs/my config.yaml --run runs/two words"
    )
    assert sorted(job.noted("torchrun")) == [f"torchrun 0 {expected}", f"torchrun 1 {expected}"]
    assert job.noted("scontrol") == ["scontrol show hostnames node[07,09]"]
    assert len(job.noted("started")) == 4
    (srun,) = job.noted("srun")
    assert srun.startswith("srun --cpus-per-task=64 --kill-on-bad-exit=1 bash -c")


def test_near_the_time_limit_the_ranks_save_and_the_job_is_queued_again(job: Job) -> None:
    process = job.start("config.yaml", seconds=60)
    job.wait_for("started", 4)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert len(job.noted("saved")) == 4
    assert job.noted("scontrol")[1:] == ["scontrol requeue 123456"]
    assert job.noted("torchrun was told") == job.noted("srun was terminated") == []


def test_when_preempted_or_cancelled_the_ranks_save_and_slurm_decides(job: Job) -> None:
    process = job.start("config.yaml", seconds=60)
    job.wait_for("started", 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert len(job.noted("saved")) == 4
    assert len(job.noted("scontrol")) == 1


def test_a_run_that_fails_fails_the_job(job: Job) -> None:
    assert job.start("config.yaml", status=3).wait(20) == 1
    assert len(job.noted("scontrol")) == 1


def test_a_job_that_was_queued_again_meets_under_another_name(job: Job) -> None:
    job.environment["SLURM_RESTART_COUNT"] = "2"
    assert job.start("config.yaml").wait(20) == 0
    assert all("--rdzv-id=123456-2 " in line for line in job.noted("torchrun"))


def test_without_a_config_it_says_how(job: Job) -> None:
    process = job.start()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert re.match("usage: sbatch .* CONFIG.yaml", errors)
    assert job.log.read_text() == ""
