"""The data pipeline end to end at size, watched from outside, killed on the way, and checked by an independent reader::

    python benchmarks/data_pipeline.py WORK --gigabytes 5 --kills 2 --out docs/images/data_memory.png

Makes a corpus (upstream_corpus.py), then runs the commands a user types, each in a process of its own, and samples the
resident memory of that process and all its children. Stages named in KILLED are killed (SIGKILL, the whole process
group) at random moments and started again. At the end plain NumPy reads what was written and compares it with the
records; planted benchmark questions have to be found, and others not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
KILLED = ("clean", "tokenize")
LIMIT_GIB = 4.0
POLL_SECONDS = 0.2
PLANTED = 200
"""Benchmark questions that lie in the corpus, and as many that do not."""


@dataclass
class Watched:
    """One stage, seen from outside."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    """Resident, the process and its children together, file pages that are mapped among them."""
    peak_anonymous_bytes: int = 0
    """Of it, what is not a page of a file."""
    kills: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the stage began, resident bytes."""


def resident(root: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its descendants (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    total = anonymous = 0
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        total += int(values.get("VmRSS", "0 kB").split()[0]) * 1024
        anonymous += int(values.get("RssAnon", "0 kB").split()[0]) * 1024
    return total, anonymous


def run_watched(name: str, command: Sequence[str], log: Path, kill_after: Sequence[float] = ()) -> Watched:
    """Run a command to its end; each number of ``kill_after`` kills it once after so many seconds."""
    watched = Watched(name)
    began = time.perf_counter()
    for limit in (*kill_after, None):
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=ROOT)
        started = time.perf_counter()
        while process.poll() is None:
            total, anonymous = resident(process.pid)
            watched.peak_bytes = max(watched.peak_bytes, total)
            watched.peak_anonymous_bytes = max(watched.peak_anonymous_bytes, anonymous)
            watched.curve.append((time.perf_counter() - began, total))
            if limit is not None and time.perf_counter() - started > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                watched.kills += 1
                break
            time.sleep(POLL_SECONDS)
        else:
            if process.returncode:
                tail = log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"{name} failed with {process.returncode}:\n{tail}")
            break
    watched.seconds = time.perf_counter() - began
    return watched


def digest(folder: Path) -> str:
    """Of all files that are not hidden: their names and bytes; what says when it was made is left out."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and path.suffix != ".json":
            total.update(str(name).encode())
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    total.update(piece)
    return total.hexdigest()


def records_of(path: Path) -> Iterator[dict[str, str]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def plant(cleaned: Path, benchmarks: Path, seed: int) -> None:
    """A benchmark of which one half are instructions of the corpus and the other half were never in it."""
    rng = random.Random(seed)
    questions = []
    for path in rng.sample(files := sorted(cleaned.rglob("*.parquet")), min(len(files), 40)):
        long = [r["instruction"] for r in records_of(path) if 200 < len(r["instruction"]) < 2000][: PLANTED // 20]
        questions += [{"question": text, "planted": True} for text in long]
    questions = questions[:PLANTED]
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in ("ara", "ilo", "umu") for c in ("nt", "sk", "lm")]
    questions += [{"question": " ".join(rng.choices(words, k=40)), "planted": False} for _ in range(len(questions))]
    benchmarks.mkdir(parents=True, exist_ok=True)
    (benchmarks / "planted.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def check_contamination(benchmarks: Path, masks: Path) -> int:
    """The questions that were planted are found whole, and none of the others; returns how many were planted."""
    planted = [json.loads(line)["planted"] for line in (benchmarks / "planted.jsonl").read_text().splitlines()]
    coverage = [json.loads(line)["coverage"]["13"] for line in (masks / "coverage.jsonl").read_text().splitlines()]
    for number, (is_planted, share) in enumerate(zip(planted, coverage, strict=True)):
        assert share > 0.9 if is_planted else share == 0, (number, is_planted, share)
    return sum(planted)


def folders_of(folder: Path) -> list[Path]:
    """What is not hidden: kills leave unfinished folders."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def check_store(cleaned: Path, store: Path, rows: int, seed: int) -> int:
    """Compare random rows of a store with their records, read with NumPy and tokenizers alone; returns how many."""
    info = json.loads((store / "tokenizer_info.json").read_text())
    tokenizer = Tokenizer.from_file(str(Path(info["tokenizer_path"]) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = {name: tokenizer.token_to_id(info[name]) for name in ("boq", "eoq", "eoa")}
    rng = random.Random(seed)
    records = {"__".join(path.relative_to(cleaned).parts): path for path in cleaned.rglob("*.parquet")}
    checked = 0
    for folder in rng.sample(folders := folders_of(store), min(20, len(folders))):
        tokens, starts, lengths, resp_starts, resp_lengths = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("tokens", "inst_start", "inst_len", "resp_start", "resp_len")
        )
        assert tokens.dtype == np.uint32 and starts.dtype == np.uint64, folder
        wanted = set(rng.sample(range(len(starts)), min(len(starts), rows)))
        dropped = sum(json.loads((folder / "metadata.json").read_text())["dropped"].values())
        for row, record in enumerate(records_of(records[folder.name])):
            if dropped:
                break  # rows no longer stand beside their records
            if row not in wanted:
                continue
            tags = [tokenizer.token_to_id(info["condition_mapping"][tag]) for tag in record["condition"].split(",")]
            text = tokenizer.encode(record["instruction"], add_special_tokens=False).ids
            prefix = [ids["boq"], *tags, *text, ids["eoq"]]
            response = [*tokenizer.encode(record["response"], add_special_tokens=False).ids, ids["eoa"]]
            begin, second = int(starts[row]), int(resp_starts[row])
            assert tokens[begin : begin + int(lengths[row])].tolist() == prefix, (folder, row)
            if "<think>" not in record["response"]:
                assert tokens[second : second + int(resp_lengths[row])].tolist() == response, (folder, row)
            checked += 1
    assert checked, "nothing was compared"
    return checked


def check_sampled(sampled: Path, store: Path, virtual: Path) -> int:
    """Every sample of an epoch lies in the store, and both layouts hold the same samples; returns how many."""
    tokens = np.load(sampled / "tokens.npy", mmap_mode="r")
    assert tokens.dtype == np.uint16 and len(tokens) == sum(
        len(np.load(folder / "tokens.npy", mmap_mode="r")) for folder in folders_of(store)
    )
    count = 0
    for epoch in sorted(sampled.glob("epoch_*")):
        for name in ("inst_start", "inst_len", "resp_start", "resp_len"):
            column = np.load(epoch / f"{name}.npy", mmap_mode="r")
            assert column.dtype == np.int64
            assert np.array_equal(column, np.load(virtual / epoch.name / f"{name}.npy", mmap_mode="r")), name
            count = len(column)
    assert not (virtual / "tokens.npy").exists()
    return count


def draw(stages: Sequence[Watched], path: Path) -> None:
    """The memory of all stages over time, as a picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), facecolor="#fcfbf9")
    axes.set_facecolor("#fcfbf9")
    offset = 0.0
    for number, stage in enumerate(stages):
        times = [(offset + at) / 60 for at, _ in stage.curve]
        colour = ("#0f766e", "#b9651b", "#3d5fae")[number % 3]
        axes.plot(times, [size / 2**30 for _, size in stage.curve], color=colour, linewidth=1)
        if stage.seconds > 30:
            axes.text(
                (offset + stage.seconds / 2) / 60,
                stage.peak_bytes / 2**30 + 0.08,
                stage.name,
                ha="center",
                color=colour,
            )
        offset += stage.seconds
    axes.axhline(LIMIT_GIB, color="#b42318", linewidth=1, linestyle=(0, (4, 2)))
    axes.set(xlabel="minutes", ylabel="resident GiB, all processes", ylim=(0, LIMIT_GIB * 1.1), xlim=(0, offset / 60))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> list[Watched]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for everything; finished stages are kept")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the corpus on the disk")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--datasets", nargs="+", help="those to go on with; all of the corpus if not given")
    parser.add_argument("--kills", type=int, default=2, help="over the stages that are killed")
    parser.add_argument("--kill-within", type=float, default=60.0, help="seconds after a start, at most")
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--sample-mb", type=float, default=100.0, help="of text, that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="picture of the memory")
    parser.add_argument("--again", action="store_true", help="clean and tokenize undisturbed too, compare the bytes")
    options = parser.parse_args(arguments)
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    log, rng = work / "log.txt", random.Random(options.seed)
    hrm, workers = [sys.executable, "-m", "hrm_text", "data"], ["--workers", str(options.workers)]
    at = {
        name: str(work / name) for name in ("corpus", "cleaned", "tokenizer", "store", "sampled", "virtual", "report")
    }
    at |= {name: str(work / "masks" / name) for name in ("duplicates", "contamination")}
    stages: list[Watched] = []

    def stage(name: str, *command: str) -> None:
        share = options.kills // len(KILLED) + (name == KILLED[0] and options.kills % len(KILLED))
        kills = [rng.uniform(0.2, 1) * options.kill_within for _ in range(share)] if name in KILLED else []
        print(f"{name} ...", end=" ", flush=True)
        done = run_watched(name, command, log, kills)
        stages.append(done)
        print(
            f"{done.seconds:,.0f} s, peak {done.peak_bytes / 2**30:.2f} GiB ({done.peak_anonymous_bytes / 2**30:.2f} "
            f"anonymous), killed {done.kills} times",
            flush=True,
        )

    stage(
        "corpus", sys.executable, str(ROOT / "benchmarks" / "upstream_corpus.py"), at["corpus"], "--gigabytes",
        str(options.gigabytes), "--seed", str(options.seed), *workers,
    )  # fmt: skip
    names = options.datasets or [path.name for path in folders_of(work / "corpus")]
    clean = [*hrm, "clean", *names, "--from", at["corpus"], *workers]
    stage("clean", *clean, "--out", at["cleaned"])
    sizes = ["--vocab-size", str(options.vocab_size), "--sample-mb", str(options.sample_mb)]
    stage("tokenizer", *hrm, "tokenizer", at["cleaned"], "--out", at["tokenizer"], *sizes)
    tokenize = [*hrm, "tokenize", at["cleaned"], "--tokenizer", at["tokenizer"], *workers]
    stage("tokenize", *tokenize, "--out", at["store"])
    plant(work / "cleaned", work / "benchmarks", options.seed)
    stage("duplicates", *hrm, "duplicates", at["store"], "--out", at["duplicates"], *workers)
    stage(
        "contamination", *hrm, "contamination", at["store"], "--benchmarks", str(work / "benchmarks"), "--out",
        at["contamination"], *workers,
    )  # fmt: skip
    exclude = ["--exclude", at["duplicates"], at["contamination"], "--epochs", "2"]
    stage("sample", *hrm, "sample", at["store"], "--out", at["sampled"], *exclude)
    stage("virtual", *hrm, "sample", at["store"], "--out", at["virtual"], "--virtual", *exclude)
    masks = ["--masks", at["duplicates"], at["contamination"]]
    stage("report", *hrm, "report", at["sampled"], "--records", at["cleaned"], *masks, "--out", at["report"])
    if options.again:
        stage("clean again", *clean, "--out", str(work / "cleaned_again"))
        assert digest(work / "cleaned_again") == digest(work / "cleaned"), "killed and undisturbed cleaning differ"
        stage("tokenize again", *tokenize, "--out", str(work / "store_again"))
        assert digest(work / "store_again") == digest(work / "store"), "killed and undisturbed tokenising differ"
    print(
        f"{check_contamination(work / 'benchmarks', work / 'masks' / 'contamination'):,} planted questions found, alone"
    )
    print(f"{check_store(work / 'cleaned', work / 'store', 20, options.seed):,} rows of the store equal their records")
    print(f"{check_sampled(work / 'sampled', work / 'store', work / 'virtual'):,} samples an epoch, in both layouts")

    (work / "stages.json").write_text(json.dumps([{**asdict(each), "curve": None} for each in stages], indent=2))
    if options.out:
        draw(stages, options.out)
        print(f"wrote {options.out}")
    worst = max(stages[1:], key=lambda each: each.peak_bytes)
    print(f"largest: {worst.name}, {worst.peak_bytes / 2**30:.2f} GiB of {LIMIT_GIB:g} allowed")
    if worst.peak_bytes > LIMIT_GIB * 2**30:
        raise SystemExit("a stage took more memory than it may")
    return stages


if __name__ == "__main__":
    main()
