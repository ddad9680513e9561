"""Distributed training under faults: whatever happens, the run ends with the weights of an undisturbed one::

    python benchmarks/faults.py WORK --ranks 2 --kills 40 --json faults.json

Makes data, and trains a tiny model under torchrun on CPU processes, as a user would start it. Then the same run again,
with what a cluster does to it: ranks, launchers or all of them killed at random moments, many of them while a
checkpoint is being written; SIGTERM; shards of a checkpoint damaged; a full disk; a batch that gives NaN on one rank
alone; a rank that stops. After each the run goes on to its end, and weights, optimizer state, counters and losses are
compared with the undisturbed run's, to the bit. Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, its neighbours are found from the folder above

from benchmarks.faults_job import Bench, Failure, Job, is_running, job, last_step, send
from hrm_text.model.checkpoint_files import load_state, read_tensors, step_folders

TIMED = {"seconds", "tokens_per_second", "mfu", "memory_bytes"}
"""What no two runs share of their metrics."""
NAN_STEP = 7
HANG_SECONDS = 6.0


@dataclass
class Result:
    """What came of one fault."""

    name: str
    passed: bool
    seconds: float
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- comparison --


def differences(found: Path, expected: Path) -> list[str]:
    """What is not the same, to the bit, of two runs at their ends."""
    newest = [step_folders(run / "checkpoints")[-1] for run in (found, expected)]
    different = []
    one, other = (read_tensors(folder) for folder in newest)
    if one.keys() != other.keys():
        different.append(f"tensors {sorted(one.keys() ^ other.keys())[:3]}")
    for name in one.keys() & other.keys():
        bits = [each.contiguous().view(-1).view(torch.uint8) for each in (one[name], other[name])]
        if one[name].dtype != other[name].dtype or not torch.equal(*bits):
            different.append(name)
    states = [load_state(folder) for folder in newest]
    if states[0].step != states[1].step:
        different.append("step")
    # The random states of a process begin anywhere, and training draws nothing from them: all else must be equal.
    keys = states[1].state.keys() - {"rng"}
    different += [f"state {key}" for key in keys if states[0].state.get(key) != states[1].state[key]]
    curves = [curve(run / "metrics.jsonl") for run in (found, expected)]
    if curves[0] != curves[1]:
        at = [step for step in sorted(curves[1]) if curves[0].get(step) != curves[1][step]]
        different.append(f"metrics of {len(at)} steps, the first {at[:1]}")
    return sorted(different)


def curve(metrics: Path) -> dict[int, dict[str, Any]]:
    """What was recorded of each step, the last time it was taken."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        record["step"]: {key: value for key, value in record.items() if key not in TIMED}
        for record in records
        if record["kind"] == "step"
    }


def expect_same(found: Path, expected: Path) -> None:
    if different := differences(found, expected):
        raise Failure(f"{len(different)} things differ from the undisturbed run: {', '.join(different[:4])}")


# -------------------------------------------------------------------------------------------------------- faults --


def undisturbed(bench: Bench) -> Result:
    """The run that the others are compared with."""
    with job(bench, "undisturbed") as whole:
        whole.finish()
    return Result("undisturbed", True, 0, f"{bench.steps} steps on {bench.ranks} ranks")


def kills(bench: Bench, count: int, rng: random.Random) -> Result:
    """Killed so many times on the way to its end."""
    name = "killed"
    counted: Counter[str] = Counter()
    while_saving = 0
    orphans: set[int] = set()
    running = Job(bench, name, max_restarts=count)
    try:
        for _ in range(count):
            moment = rng.choices(["starting", "training", "saving"], [1, 4, 5])[0]
            victims = rng.choices(["a rank", "all", "the launcher"], [5, 3, 2])[0]
            wait_for_moment(running, moment, rng)
            if running.process.poll() is not None:
                raise Failure(f"at its end after {counted.total()} of {count} kills; take more --steps")
            ranks, killed_at = running.ranks(), time.time()
            if victims == "a rank" and ranks:
                send(rng.choice(sorted(ranks.values())), signal.SIGKILL)
            else:
                victims = "all" if victims == "a rank" else victims
                send(running.process.pid, signal.SIGKILL)
                for rank in ranks.values() if victims == "all" else ():
                    send(rank, signal.SIGKILL)
            while_saving += being_saved(running.folder, killed_at - 0.5) is not None
            counted[f"{victims} while {moment}"] += 1
            # Ranks that had not begun when their launcher was killed cannot know that it ever was there. They look for
            # it until they give up, and can neither train nor save without it.
            may_stay = (victims, moment) == ("the launcher", "starting")
            try:
                wait_until_gone(ranks, running.process.pid, 5 if may_stay else 45)
            except Failure:
                if not may_stay:
                    raise
                orphans.update(ranks.values())
            if victims != "a rank":
                running.process.wait()
                running = Job(bench, name, max_restarts=count)
            gone = f"gone after {time.time() - killed_at:.1f} s"
            print(f"  kill {counted.total()}: {victims} while {moment}, {gone}", flush=True)
        running.finish()
    finally:
        if running.process.poll() is None:
            running.kill()
        for orphan in orphans:
            send(orphan, signal.SIGKILL)
    leftovers = [path.name for path in (running.folder / "checkpoints").iterdir() if path.name.startswith(".")]
    if leftovers:
        raise Failure(f"left behind: {leftovers}")
    expect_same(running.folder, bench.folder("undisturbed"))
    detail = f"{count} kills, {while_saving} of them left half a checkpoint; equal to the bit"
    return Result("kill -9", True, 0, detail, {"kills": dict(counted), "left_half_a_checkpoint": while_saving})


def wait_for_moment(running: Job, moment: str, rng: random.Random) -> None:
    """Until a random moment of starting, training or saving."""
    if moment == "starting":
        time.sleep(rng.uniform(0, 5))
        return
    running.wait_for_steps(time.time())
    if moment == "training":
        time.sleep(rng.uniform(0, 1))
        return
    since = time.time()
    running.wait_for("a checkpoint", lambda: being_saved(running.folder, since))
    time.sleep(rng.uniform(0, 0.03))


def being_saved(run: Path, since: float) -> Path | None:
    """A checkpoint that is not whole, and was written to after that time."""
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        try:
            if path.stat().st_mtime > since:
                return path
        except OSError:
            continue
    return None


def wait_until_gone(ranks: dict[int, int], launcher: int, seconds: float) -> None:
    """Ranks whose neighbour or launcher was killed end by themselves, or by the launcher that is left."""
    until = time.monotonic() + seconds
    while left := [rank for rank, process in ranks.items() if is_running(process)]:
        if time.monotonic() > until:
            raise Failure(f"ranks {left} are still there {seconds:.0f} s after a kill (launcher {launcher})")
        time.sleep(0.02)


def terminated(bench: Bench) -> Result:
    """SIGTERM to the ranks, as the Slurm script does it: they save and end with 0."""
    name = "terminated"
    seconds = []
    for part in (0.3, 0.6):
        with job(bench, name) as stopped:
            stopped.wait_for_steps(stopped.began, int(part * bench.steps))
            asked = time.monotonic()
            for process in stopped.ranks().values():
                send(process, signal.SIGTERM)
            if (code := stopped.end(60)) != 0:
                raise Failure(f"exit code {code}; see {stopped.log}")
            seconds.append(time.monotonic() - asked)
            newest = load_state(step_folders(stopped.folder / "checkpoints")[-1]).step
            if not part * bench.steps <= newest < bench.steps:
                raise Failure(f"the newest checkpoint is of step {newest}, and it was stopped later")
    with job(bench, name) as rest:
        rest.finish()
    expect_same(bench.folder(name), bench.folder("undisturbed"))
    detail = f"saved and ended with 0 in {max(seconds):.1f} s; equal to the bit after going on"
    return Result("SIGTERM to the ranks", True, 0, detail, {"seconds": seconds})


def launcher_terminated(bench: Bench) -> Result:
    """SIGTERM to torchrun, as a shell or a container does it: it tells the ranks, which save."""
    name = "launcher_terminated"
    with job(bench, name) as stopped:
        stopped.wait_for_steps(stopped.began, int(0.4 * bench.steps))
        ranks, asked = stopped.ranks(), time.monotonic()
        send(stopped.process.pid, signal.SIGTERM)
        code = stopped.end(60)
        seconds = time.monotonic() - asked
        wait_until_gone(ranks, stopped.process.pid, 5)
        newest = load_state(step_folders(stopped.folder / "checkpoints")[-1]).step
        if newest < int(0.4 * bench.steps):
            raise Failure(f"the newest checkpoint is of step {newest}, and it was stopped later")
    with job(bench, name) as rest:
        rest.finish()
    expect_same(bench.folder(name), bench.folder("undisturbed"))
    detail = f"saved in {seconds:.1f} s, torchrun itself ends with {code}; equal to the bit after going on"
    return Result("SIGTERM to torchrun", True, 0, detail, {"seconds": seconds, "exit_code": code})


def damaged(bench: Bench) -> Result:
    """A shard of the newest checkpoint corrupted, truncated, missing: named, and the last good one continued."""
    whole = "to_be_damaged"
    with job(bench, whole) as stopped:
        stopped.wait_for_steps(stopped.began, int(0.6 * bench.steps))
        for process in stopped.ranks().values():
            send(process, signal.SIGTERM)
        if stopped.end(60) != 0:
            raise Failure(f"exit code {stopped.process.returncode}; see {stopped.log}")
    for kind in ("corrupted", "truncated", "missing"):
        run = bench.folder(kind)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(bench.folder(whole), run)
        *_, good, newest = step_folders(run / "checkpoints")
        shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        damage(shard, kind)
        with job(bench, kind) as rest:
            rest.finish()
            said = " ".join(rest.said().split())
        joined = said.replace(" ", "")
        for expected in (str(shard), f"Continuing from the previous good one: {good}"):
            if expected.replace(" ", "") not in joined:
                raise Failure(f"{kind}: not said: {expected}; see {rest.log}")
        expect_same(run, bench.folder("undisturbed"))
    return Result("damaged shard", True, 0, "corrupted, truncated, missing: named, the last good one used; equal")


def damage(shard: Path, kind: str) -> None:
    content = bytearray(shard.read_bytes())
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)


def full_disk(bench: Bench) -> Result:
    """For a while no rank may write a file of the size of a shard: the run warns and goes on."""
    name = "full_disk"
    with job(bench, name) as running:
        running.wait_for("a checkpoint", lambda: step_folders(running.folder / "checkpoints"))
        running.wait_for_steps(running.began, bench.every)
        # What is small goes on being written, the metrics among it.
        limit = (running.folder / "metrics.jsonl").stat().st_size + 2**16
        for process in running.ranks().values():
            resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        running.wait_for("a warning", lambda: "not saved" in running.said())
        warned = last_step(running.folder / "metrics.jsonl")
        running.wait_for_steps(time.time(), warned + 2)
        for process in running.ranks().values():
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        running.finish()
    expect_same(running.folder, bench.folder("undisturbed"))
    return Result("disk that takes no more", True, 0, f"warned at step {warned}, went on, saved later; equal")


def not_a_number(bench: Bench) -> Result:
    """One rank alone gets gradients that are NaN: no rank takes the step, whichever rank it was."""
    names = [f"nan_{rank}" for rank in (0, bench.ranks - 1)]
    for rank, name in zip((0, bench.ranks - 1), names, strict=True):
        shutil.rmtree(bench.folder(name), ignore_errors=True)
        with job(bench, name, fault=f"nan:{rank}") as running:
            running.finish()
        steps = curve(running.folder / "metrics.jsonl")
        if [steps[step]["skipped"] for step in (NAN_STEP - 1, NAN_STEP, bench.steps)] != [0, 1, 1]:
            raise Failure(f"step {NAN_STEP} was to be skipped, and no other; see {running.log}")
        for tensor_name, tensor in read_tensors(step_folders(running.folder / "checkpoints")[-1]).items():
            if not tensor.double().isfinite().all():
                raise Failure(f"{tensor_name} is not finite")
    expect_same(bench.folder(names[0]), bench.folder(names[1]))
    if not differences(bench.folder(names[0]), bench.folder("undisturbed")):
        raise Failure("a skipped step changed nothing")
    return Result("NaN on one rank", True, 0, f"step {NAN_STEP} skipped by all alike; the same on whichever rank")


def has_said(running: Job, text: str) -> bool:
    return text in running.said()


def hang(bench: Bench) -> Result:
    """A rank that stops ends the job with a message that names it; with restarts left, the run goes on by itself."""
    seconds: dict[int, list[float]] = {}
    for restarts in (0, 1):
        with job(bench, "hung", max_restarts=restarts, timeout_seconds=HANG_SECONDS) as running:
            running.wait_for_steps(running.began, int((0.3 + 0.2 * restarts) * bench.steps))
            ranks = running.ranks()
            stopped = max(ranks)
            send(ranks[stopped], signal.SIGSTOP)
            since = time.monotonic()
            message = f"pid {ranks[stopped]}) hangs: no sign of life"
            running.wait_for("the message", functools.partial(has_said, running, message), HANG_SECONDS + 20)
            seconds[restarts] = [time.monotonic() - since]
            wait_until_gone(ranks, running.process.pid, 45)
            seconds[restarts].append(time.monotonic() - since)
            code = running.end(600)
            if (code == 0) is not (restarts == 1):
                raise Failure(f"exit code {code} with {restarts} restarts; see {running.log}")
    expect_same(bench.folder("hung"), bench.folder("undisturbed"))
    named, gone = (max(times[i] for times in seconds.values()) for i in (0, 1))
    detail = (
        f"timeout {HANG_SECONDS:.0f} s: named after {named:.1f} s, all ranks gone after {gone:.1f} s; restarted, equal"
    )
    return Result("hung rank (SIGSTOP)", True, 0, detail, {"named_seconds": named, "gone_seconds": gone})


# ------------------------------------------------------------------------------------------ in the place of a rank --


def train_with_nan(rank: int, config: str) -> int:
    """``hrm-text train``, with gradients that are NaN in one step of one rank: what bad memory may do."""
    from hrm_text.cli import main as hrm_text
    from hrm_text.train.step import TrainingStep

    run, backward, steps = TrainingStep.run, torch.Tensor.backward, 0

    def counted_run(self: TrainingStep, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        return run(self, *arguments, **named)

    def backward_with_nan(self: torch.Tensor, *arguments: Any, **named: Any) -> None:
        broken = steps == NAN_STEP and int(os.environ["RANK"]) == rank
        backward(self * float("nan") if broken else self, *arguments, **named)

    TrainingStep.run = counted_run  # type: ignore[method-assign]
    torch.Tensor.backward = backward_with_nan  # type: ignore[method-assign]
    return hrm_text(["train", config])


# ---------------------------------------------------------------------------------------------------------- main --


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults; 1 if the run did not survive one of them as it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for data and runs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--sharding", choices=["ddp", "fsdp", "hsdp"], default="fsdp")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--faults", nargs="+", help="some of the faults alone")
    given = parser.parse_args(arguments)
    bench = Bench(given.work.resolve(), given.ranks, given.steps, given.every, given.sharding)
    faults: dict[str, Callable[[], Result]] = {
        "kills": lambda: kills(bench, given.kills, random.Random(given.seed)),
        "terminated": lambda: terminated(bench),
        "launcher_terminated": lambda: launcher_terminated(bench),
        "damaged": lambda: damaged(bench),
        "full_disk": lambda: full_disk(bench),
        "not_a_number": lambda: not_a_number(bench),
        "hang": lambda: hang(bench),
    }
    chosen = given.faults or list(faults)
    if unknown := set(chosen) - set(faults):
        parser.error(f"--faults: expected some of {', '.join(faults)}; found {', '.join(sorted(unknown))}")
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.make_data()
    results: list[Result] = []
    for name, fault in [("undisturbed", lambda: undisturbed(bench)), *((name, faults[name]) for name in chosen)]:
        began = time.monotonic()
        for leftover in (name, FOLDERS.get(name, name)):
            shutil.rmtree(bench.folder(leftover), ignore_errors=True)
        print(f"{name} ...", flush=True)
        try:
            result = fault()
        except Failure as failure:
            result = Result(name, False, 0, str(failure))
        result.seconds = time.monotonic() - began
        results.append(result)
        print(f"  {'passed' if result.passed else 'FAILED'}: {result.detail}", flush=True)
        if name == "undisturbed" and not result.passed:
            break
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    print("\n| Fault | | Seconds | |\n| --- | --- | ---: | --- |")
    for result in results:
        print(f"| {result.name} | {'passed' if result.passed else 'FAILED'} | {result.seconds:.0f} | {result.detail} |")
    return 0 if all(result.passed for result in results) else 1


FOLDERS = {"kills": "killed", "damaged": "to_be_damaged", "hang": "hung"}
"""Runs of a fault that have another name."""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inject"]:
        sys.exit(train_with_nan(int(sys.argv[2].removeprefix("nan:")), sys.argv[3]))
    sys.exit(main())
