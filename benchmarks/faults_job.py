"""A training run under torchrun on CPU processes, as the faults find it: its launcher, its ranks, what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hrm_text.data.procedural import generate
from hrm_text.data.records import BadRecords, find_record_files, read_texts, write_jsonl
from hrm_text.data.sample import sample_epochs
from hrm_text.data.tokenize import tokenize_files
from hrm_text.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
TASKS = {"upper": 1.0, "repeat": 1.0}
MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
SAMPLES_PER_STEP = 16
"""A few more than a step takes, of samples of these tasks."""
PATIENCE = 180.0
"""Seconds that anything may take."""


class Failure(Exception):
    """A fault that the run did not survive as it should."""


@dataclass(frozen=True)
class Bench:
    """The run that is disturbed."""

    work: Path
    ranks: int
    steps: int
    every: int
    sharding: str

    def settings(self, name: str) -> dict[str, Any]:
        """Of a run of that name, as its YAML file has them."""
        return {
            "run": str(self.work / name),
            "device": "cpu",
            "model": dict(MODEL),
            "data": {"sampled": str(self.work / "data" / "sampled"), "tokens_per_batch": 96, "micro_batches": 4},
            "optimizer": {"lr": {"peak": 3e-3, "warmup_steps": 10}, "ema_decay": 0.99},
            "checkpoint": {"every_steps": self.every, "keep_last": 3},
            "distributed": {"timeout_seconds": 60, "sharding": self.sharding},
            "logging": {"tensorboard": False},
            "max_steps": self.steps,
        }

    def folder(self, name: str) -> Path:
        return self.work / name

    def make_data(self) -> None:
        """Enough samples for all steps."""
        data = self.work / "data"
        if (data / "sampled" / "metadata.json").exists():
            return
        records = data / "records" / "tasks.jsonl"
        write_jsonl(records, generate(TASKS, self.steps * SAMPLES_PER_STEP + 200, 0, "train"))
        texts = read_texts(find_record_files([records]), BadRecords(strict=True))
        tokenizer = train_tokenizer(texts, 320, data / "bpe")
        tokenize_files([records], tokenizer, data / "store")
        sample_epochs(data / "store", data / "sampled", [], 1, max_seq_len=65)


class Job:
    """A launcher with its ranks."""

    def __init__(self, bench: Bench, name: str, max_restarts: int = 0, fault: str = "", **distributed: float) -> None:
        self.bench, self.folder = bench, bench.folder(name)
        self.log = bench.work / f"{name}.log"
        config = bench.work / f"{name}.yaml"
        settings = bench.settings(name)
        settings["distributed"] |= distributed
        config.write_text(yaml.safe_dump(settings))
        train = (
            ["-m", "hrm_text", "train"] if not fault else [str(ROOT / "benchmarks" / "faults.py"), "--inject", fault]
        )
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={bench.ranks}", f"--max-restarts={max_restarts}", "--monitor-interval=0.1",
                    *train, str(config),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.began = time.time()

    def said(self) -> str:
        """What the launcher and the ranks printed."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")

    def ranks(self) -> dict[int, int]:
        """Process by rank, of those that there are now."""
        return ranks_of(self.process.pid)

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Until the condition holds; a launcher that ends before it does is a failure."""
        until = time.monotonic() + seconds
        while not (value := condition()):
            if self.process.poll() is not None and not condition():
                raise Failure(f"ended with exit code {self.process.returncode} before {what}; see {self.log}")
            if time.monotonic() > until:
                raise Failure(f"{what}: not within {seconds:.0f} s; see {self.log}")
            time.sleep(0.002)
        return value

    def wait_for_steps(self, since: float, least: int = 0) -> None:
        """Until a step was recorded after that time, ``least`` steps or more into the run."""
        metrics = self.folder / "metrics.jsonl"
        self.wait_for(
            f"step {least}",
            lambda: metrics.exists() and metrics.stat().st_mtime > since and last_step(metrics) >= least,
        )

    def end(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"not at its end after {seconds:.0f} s; see {self.log}") from None

    def finish(self) -> None:
        """To the end of the run, which must be a good one."""
        if (code := self.end(600)) != 0:
            raise Failure(f"exit code {code}; see {self.log}")

    def kill(self) -> None:
        """Everything at once."""
        for process in (self.process.pid, *self.ranks().values()):
            send(process, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def job(bench: Bench, name: str, max_restarts: int = 0, fault: str = "", **distributed: float) -> Iterator[Job]:
    """A job of which nothing stays behind."""
    started = Job(bench, name, max_restarts, fault, **distributed)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def ranks_of(launcher: int) -> dict[int, int]:
    """Process by rank, of the children of a launcher (Linux)."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) != launcher or state == "Z":
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(each[5:]): int(entry.name) for each in environment if each.startswith(b"RANK=")}
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
        os.kill(process, number)


def last_step(metrics: Path) -> int:
    """The last step that was recorded."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline may be half a line
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
