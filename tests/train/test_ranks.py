"""Many ranks: the same run as one process, whatever is shared, accumulated or saved in between. CPU processes, Gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hrm_text.contracts import UserError
from hrm_text.model.checkpoint_files import read_tensors, step_folders
from hrm_text.model.config import preset
from hrm_text.settings import from_mapping
from hrm_text.train.config import DistributedConfig, TrainConfig, plain
from hrm_text.train.loop import Trainer
from hrm_text.train.sharding import chosen_sharding
from hrm_text.train.world import World
from tests.train.forked_ranks import Ranks

ROOT = Path(__file__).parents[2]

MakeConfig = Callable[..., TrainConfig]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def train_on(ranks: int, config: TrainConfig, tmp_path: Path, forked: Ranks, code: int = 0) -> str:
    """Run the command on so many ranks; what it told."""
    path = tmp_path / f"{config.run.name}.yaml"
    path.write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    return forked.run(ranks, "tests.train.forked_ranks:train", tmp_path, code, config=str(path)).err


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def assert_equal_within_rounding(run: Path, expected: Path) -> None:
    """Losses of every step, counters, and all that was learned."""
    assert losses(run).keys() == losses(expected).keys()
    for step, loss in losses(expected).items():
        assert losses(run)[step] == pytest.approx(loss, rel=2e-6)
    newest = [step_folders(each / "checkpoints")[-1] for each in (run, expected)]
    states = [json.loads((folder / "state.json").read_text()) for folder in newest]
    for key in ("step", "tokens_seen", "loader", "skipped"):
        assert states[0][key] == states[1][key]
    ours, theirs = (read_tensors(folder) for folder in newest)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        largest = float(tensor.abs().max())
        assert float((ours[name].double() - tensor.double()).abs().max()) == pytest.approx(0, abs=2e-5 * largest), name


@pytest.fixture
def long(config: MakeConfig, tmp_path: Path, five_epochs_dir: Path) -> MakeConfig:
    """20 steps of 4 bins, saved on the way."""

    def make(name: str, changes: dict[str, Any] | None = None) -> TrainConfig:
        settings = {
            "data.tokens_per_batch": 80, "data.micro_batches": 4, "max_steps": 20, "run": tmp_path / name,
            "data.sampled": five_epochs_dir, "checkpoint.every_steps": 8, "checkpoint.keep_last": 9,
            "validation.every_steps": 10,
        }  # fmt: skip
        return config(settings | (changes or {}))

    return make


@pytest.mark.parametrize("at_once", [2, 4])
def test_accumulation_changes_no_sample_and_nothing_of_what_is_learned(long: MakeConfig, at_once: int) -> None:
    one, other = long("one"), long("other", {"data.at_once": at_once})
    Trainer(one, [metrics(one)]).run()
    Trainer(other, [metrics(other)]).run()
    assert_equal_within_rounding(other.run, one.run)


def metrics(config: TrainConfig) -> Any:
    from hrm_text.train.hooks import JsonlMetrics

    return JsonlMetrics(config.run / "metrics.jsonl")


def test_two_and_four_ranks_learn_what_one_process_learns_and_continue_each_other(
    long: MakeConfig, tmp_path: Path, forked: Ranks
) -> None:
    """2 ranks (fsdp, accumulating) and 4 (hsdp); then 4 from where 2 stopped, and 1 from where 4 stopped."""
    one = long("one")
    Trainer(one, [metrics(one)]).run()

    two = long("two", {"distributed.sharding": "fsdp"})
    told = train_on(2, two, tmp_path, forked)
    assert "sharding: fsdp, one copy over 2 ranks (as set)" in told
    assert told.count(" parameters on ") == 1, "one rank speaks"
    assert_equal_within_rounding(two.run, one.run)

    four = long("four", {"distributed.sharding": "hsdp", "distributed.shard_ranks": 2})
    four.run.mkdir()
    shutil.copytree(two.run / "checkpoints" / "step_00000008", four.run / "checkpoints" / "step_00000008")
    shutil.copy(two.run / "metrics.jsonl", four.run)
    told = train_on(4, four, tmp_path, forked)
    assert "steps 9 to 20" in told
    assert "hsdp, 2 copies each over 2 ranks" in told
    assert_equal_within_rounding(four.run, one.run)

    last = long("last", {"data.at_once": 2})
    last.run.mkdir()
    shutil.copytree(four.run / "checkpoints" / "step_00000016", last.run / "checkpoints" / "step_00000016")
    shutil.copy(four.run / "metrics.jsonl", last.run)
    trainer = Trainer(last, [metrics(last)])
    assert trainer.step == 16
    trainer.run()
    assert_equal_within_rounding(last.run, one.run)


def test_eight_ranks_learn_what_one_process_learns_and_four_continue_them(
    long: MakeConfig, tmp_path: Path, forked: Ranks
) -> None:
    """As one machine of 8 GPUs and then one of 4: 8 ranks as 2 copies over 4, and 4 ranks as one copy from there."""
    shape = {
        "data.tokens_per_batch": 64, "data.micro_batches": 8, "max_steps": 6, "checkpoint.every_steps": 4,
        "validation.sampled": None,
    }  # fmt: skip
    one = long("one", shape)
    Trainer(one, [metrics(one)]).run()

    eight = long("eight", shape | {"distributed.sharding": "hsdp", "distributed.shard_ranks": 4})
    assert "hsdp, 2 copies each over 4 ranks" in train_on(8, eight, tmp_path, forked)
    assert_equal_within_rounding(eight.run, one.run)

    four = long("four", shape | {"distributed.sharding": "fsdp"})
    four.run.mkdir()
    shutil.copytree(eight.run / "checkpoints" / "step_00000004", four.run / "checkpoints" / "step_00000004")
    shutil.copy(eight.run / "metrics.jsonl", four.run)
    told = train_on(4, four, tmp_path, forked)
    assert "steps 5 to 6" in told and "fsdp, one copy over 4 ranks" in told
    assert_equal_within_rounding(four.run, one.run)


def test_a_step_of_ranks_is_that_of_one_process(forked: Ranks, tmp_path: Path) -> None:
    """K from 2 to 5, one and two micro-batches, a rank without samples, averages, wishes, NaN, bf16 on the wire."""
    ended = forked.run(2, "tests.train.ranks_step:main", tmp_path, sharded=["fsdp", "ddp"])
    report = json.loads(ended.out.splitlines()[-1])
    for name in ("fsdp 2", "fsdp 4", "ddp 2", "ddp 4"):
        found = report[name]
        assert max(found["numbers"]) < 1e-3, "of sums of some hundreds"
        assert found["validation"] < 1e-5
        assert found["state"] < 5e-6
        assert found["finite"] == [1.0] * 6
        assert found["wishes"] == [[0.0, 0.0]] * 4 + [[1.0, 0.0], [0.0, 0.0]]
    assert report["bf16"]["numbers"] < 2e-3
    assert report["poisoned"] == {"finite": [1.0, 1.0, 1.0, 0.0, 1.0, 1.0], "step": 5}


def test_a_signal_to_one_rank_stops_all_and_saves(long: MakeConfig, tmp_path: Path) -> None:
    settings = long("run")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(settings)), encoding="utf-8")
    command = torchrun(2, "-m", "hrm_text", "train", str(path))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
    recorded = settings.run / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (recorded.exists() and recorded.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told
    [newest] = step_folders(settings.run / "checkpoints")[-1:]
    stopped_at = int(newest.name.removeprefix("step_"))
    if stopped_at < 20:
        assert f"interrupted after {stopped_at} of 20 steps" in told
        assert f"to continue: torchrun --nproc-per-node 2 -m -- hrm_text train {path}" in told


def test_an_error_of_all_ranks_is_told_once(long: MakeConfig, tmp_path: Path, forked: Ranks) -> None:
    told = train_on(2, long("run", {"data.micro_batches": 1}), tmp_path, forked, code=1)
    assert told.count("error: ") == 1
    assert "raise data.micro_batches to a multiple of 2" in told


def test_it_saves_by_the_clock(config: MakeConfig, recorder: Any) -> None:
    settings = config({"checkpoint.every_steps": None, "checkpoint.every_minutes": 1e-9, "max_steps": 3})
    Trainer(settings, [recorder]).run()
    assert [path.name for path in recorder.checkpoints] == ["step_00000001", "step_00000002", "step_00000003"]
    later = config({"checkpoint.every_steps": None, "checkpoint.every_minutes": 60.0, "max_steps": 5})
    Trainer(later, [recorder]).run()
    assert [path.name for path in recorder.checkpoints[3:]] == ["step_00000005"], "the last, for being the last"


GIB = 2**30


@pytest.mark.parametrize(
    ("size", "world", "memory", "kind", "shards"),
    [
        ("B", World(0, 8, 0, 8), 141 * GIB, "ddp", 1),
        ("XL", World(0, 8, 0, 8), 141 * GIB, "fsdp", 8),
        ("XL", World(0, 16, 0, 8), 80 * GIB, "hsdp", 8),
        ("XXL", World(0, 16, 0, 8), 24 * GIB, "fsdp", 16),
        ("XXL", World(0, 4, 0, 4), None, "ddp", 1),
    ],
)
def test_what_is_shared_follows_from_sizes(size: str, world: World, memory: int | None, kind: str, shards: int) -> None:
    sharding = chosen_sharding(DistributedConfig(), preset(size), world, memory)
    assert (sharding.kind, sharding.shards, sharding.replicas) == (kind, shards, world.size // shards)
    assert sharding.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "hsdp", "shard_ranks": 3}, "8 ranks cannot be shared out by 3; take a divisor"),
        ({"sharding": "fsdp", "shard_ranks": 4}, "shard_ranks is for sharding hsdp, and this is fsdp"),
        ({"sharding": "zero"}, "sharding"),
    ],
)
def test_sharing_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_sharding(from_mapping(DistributedConfig, settings, "distributed"), preset("B"), World(0, 8, 0, 8), None)
