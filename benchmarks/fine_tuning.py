"""Fine-tuning the quickstart's model on a task that it never saw: what is learned, and what is forgotten.

    hrm-text quickstart --out runs/quickstart-cpu
    python benchmarks/fine_tuning.py runs/quickstart-cpu --out /tmp/fine_tuning

For every way of training and every seed: records of the task from its generator, with or without as many of the
quickstart's own records (replay); a run by the recipe of `hrm-text train`; its averaged weights, asked held-out
questions of the task and of the thirteen old ones. Prints a table; results.json has every score. Started again, it goes
on.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console

from hrm_text.contracts import UserError
from hrm_text.data.procedural import CPU_WEIGHTS, find_task, generate
from hrm_text.data.records import find_record_files, write_jsonl
from hrm_text.eval.tasks import find_tasks
from hrm_text.files import read_json, whole_file, write_json
from hrm_text.infer.text_model import TextModel, load
from hrm_text.recipes.evaluation import evaluate_model
from hrm_text.recipes.train import train
from hrm_text.train.starting import train_config

Scores = dict[str, float]


@dataclass(frozen=True)
class Way:
    """One way of fine-tuning."""

    name: str
    lr: float
    lora: dict[str, Any]
    """Settings of the adapters; empty trains the weights."""
    replay: float
    """Old records for each new one."""


FULL, LORA = 5e-4, 1e-2
"""Learning rates for this model of half a million parameters and a batch of 1,024 tokens, found by trying."""
ADAPTERS: dict[str, Any] = {"rank": 8, "alpha": 8.0}
WAYS = (
    Way("full", FULL, {}, 0),
    Way("full, replay 1:1", FULL, {}, 1),
    Way("LoRA", LORA, ADAPTERS, 0),
    Way("LoRA, replay 1:1", LORA, ADAPTERS, 1),
)
SCALES = tuple(
    Way(f"calls: {calls}, alpha {alpha:g}", LORA, {"rank": 8, "alpha": alpha, "calls": calls}, 0)
    for alpha in (8.0, 128.0)
    for calls in ("divide", "root", "ignore")
)
"""What --scales compares: how the scale of an adapter goes with the calls of its stack."""


def records(quickstart: Path, task: str, count: int, replay: float, seed: int, out: Path) -> list[Path]:
    """Files of new records and, drawn from the quickstart's, old ones."""
    new, old = out / "new.jsonl", out / "old.jsonl"
    write_jsonl(new, generate({task: 1}, count, seed))
    if not replay:
        return [new]
    lines = [line for file in find_record_files([quickstart / "records" / "train"])
             for line in file.path.read_bytes().splitlines()]  # fmt: skip
    with whole_file(old) as beside:
        beside.write_bytes(b"\n".join(random.Random(seed).sample(lines, round(count * replay))) + b"\n")
    return [new, old]


def scores(model: TextModel, tasks: Sequence[str], limit: int) -> Scores:
    """Accuracy on held-out questions by task."""
    with tempfile.TemporaryDirectory() as run:
        found = evaluate_model(model, find_tasks(tasks, limit=limit), Path(run), identity={}, batch=model.batch_size)
    return {score["task"]: score["strict"] for score in found["scores"]}


def fine_tuned(way: Way, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way from one seed and ask its averaged weights; the run's folder is removed."""
    work = options.out / f"{way.name.replace(' ', '_').replace(',', '').replace(':', '-')}_{seed}"
    shutil.rmtree(work, ignore_errors=True)
    values = {
        "run": str(work / "run"),
        "seed": seed,
        "init": str(options.quickstart / "weights"),
        "device": "cpu",
        "data": {
            "records": [str(path) for path in records(
                options.quickstart, options.task, options.records, way.replay, seed, work
            )],
            "tokens_per_batch": 1024,
            "epochs": options.epochs,
        },
        "optimizer": {"lr": {"peak": way.lr, "warmup_steps": 0, "decay": "cosine", "floor": 0.1}, "ema_decay": 0.99},
        "credit": {"warmup_ratio": 0},
        "lora": way.lora,
        "checkpoint": {"every_steps": None},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    started = time.monotonic()
    summary = train(train_config(values, "fine_tuning"), rich.console.Console(file=io.StringIO()))
    seconds = time.monotonic() - started
    model = load(work / "run")
    found = scores(model, [options.task, *CPU_WEIGHTS], options.questions)
    shutil.rmtree(work)
    return {"steps": summary.step, "seconds": seconds, "scores": found}


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean, least and most of some shares, in points."""
    sign = "+" if signed else ""
    points = [100 * value for value in values]
    return f"{sum(points) / len(points):{sign}.1f} ({min(points):{sign}.1f} to {max(points):{sign}.1f})"


def row(way: str, runs: Sequence[dict[str, Any]], before: Scores, task: str) -> str:
    """A line of the table: what the runs of one way did, over their seeds."""
    new = [run["scores"][task] for run in runs]
    changes = [{name: run["scores"][name] - before[name] for name in CPU_WEIGHTS} for run in runs]
    mean = [sum(change.values()) / len(change) for change in changes]
    worst = min((min(change.items(), key=lambda item: item[1]) for change in changes), key=lambda item: item[1])
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return (
        f"| {way} | {runs[0]['steps']} | {spread(new)} | {spread(mean, signed=True)} | "
        f"{worst[0]} {100 * worst[1]:+.1f} | {seconds:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a finished quickstart with the preset cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and what is made on the way")
    parser.add_argument("--task", default="strip_vowels", help="the new task (default: %(default)s)")
    parser.add_argument("--records", type=int, default=2000, help="records of it (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the records (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions a task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--scales", action="store_true", help="compare scales of adapters instead")
    options = parser.parse_args(arguments)
    try:
        find_task(options.task)
        if options.task in CPU_WEIGHTS:
            raise UserError(f"--task: {options.task!r} is a task of the quickstart; take one that is not")
        asked = {name: getattr(options, name) for name in ("task", "records", "epochs", "questions")}
        asked["quickstart"] = str(options.quickstart)
        note = options.out / "results.json"
        results: dict[str, Any] = read_json(note) if note.is_file() else {"asked": asked, "before": None, "runs": {}}
        if results["asked"] != asked:
            raise UserError(f"{note}: was made with {results['asked']}; choose another --out")
        if results["before"] is None:
            before = scores(load(options.quickstart / "weights"), [options.task, *CPU_WEIGHTS], options.questions)
            results["before"] = before
            write_json(note, results)
        before = results["before"]
        old = sum(before[name] for name in CPU_WEIGHTS) / len(CPU_WEIGHTS)
        print(
            f"before: {options.task} {100 * before[options.task]:.1f} %, {len(CPU_WEIGHTS)} old tasks {100 * old:.1f} %"
        )
        print("\n| way | steps | new task, % | old tasks, mean change in points | worst of them | s |")
        print("|---|---:|---:|---:|---:|---:|")
        for way in SCALES if options.scales else WAYS:
            runs = results["runs"].setdefault(way.name, [])
            while len(runs) < options.seeds:
                runs.append(fine_tuned(way, len(runs), options))
                write_json(note, results)
            print(row(way.name, runs[: options.seeds], before, options.task), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
