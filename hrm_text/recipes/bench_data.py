"""Times the data pipeline on this machine: tokenising, the plan of an epoch, and loading its batches."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from hrm_text.contracts import Example, UserError
from hrm_text.data.loader import Loader
from hrm_text.data.packing_plan import PackingMeasures, packing_report, plan_epoch
from hrm_text.data.records import BadRecords, RecordFile, find_record_files, read_records, read_texts, write_jsonl
from hrm_text.data.tokenize import tokenize_files
from hrm_text.data.tokenizer import load_tokenizer, train_tokenizer
from hrm_text.files import write_json
from hrm_text.recipes.synthetic import CONTEXT

TOKENS_ON_DISK = 1 << 25
"""Of the synthetic token file: samples lie anywhere in it, so that reading is as scattered as in a real one."""

TEXTS_AT_ONCE = 2048
"""For the tokenizer by itself: as many as a chunk of the command has."""

WORDS = 20_000

TURNS = 3


@dataclass(frozen=True)
class TokenizeTiming:
    """Tokenising records, by processor time, against the ``tokenizers`` library by itself on the same texts."""

    bytes: int
    """Of text."""
    tokens: int
    bare_bytes_per_second: float
    """``encode_batch_fast`` alone, a second of one core."""
    bytes_per_second: float
    """From records on the disk to the store, a second of one core."""

    @property
    def share(self) -> float:
        """Of the bare rate."""
        return self.bytes_per_second / self.bare_bytes_per_second


@dataclass(frozen=True)
class LoaderTiming:
    """Loading packed batches."""

    workers: int
    tokens_per_second: float
    batches: int


@dataclass(frozen=True)
class DataTimings:
    """What ``bench data`` found."""

    tokenize: TokenizeTiming
    samples: int
    tokens_per_batch: int
    ranks: int
    plan_seconds: float
    """Of one core, compilation not counted."""
    packing: dict[str, PackingMeasures]
    loader: list[LoaderTiming]


def anchor_lengths(count: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Prefix and response tokens [count] of each sample, distributed as in the anchor measurements."""
    rng = np.random.default_rng(seed)
    prefix = np.clip(rng.lognormal(4.6, 1.0, count), 8, 3000).astype(np.int64)
    response = np.clip(rng.lognormal(4.8, 1.2, count), 1, CONTEXT - prefix).astype(np.int64)
    return prefix, response


def generated_examples(count: int, seed: int) -> Iterable[Example]:
    """Records of the anchors' lengths, of invented words that are as unevenly frequent as those of a language."""
    rng = np.random.default_rng(seed)
    syllables = "ba ke lo mi tra ple con ver sta ing er tion ment re de un com pro al ic ous ent is the an or".split()
    words = np.array(["".join(rng.choice(syllables, size)) for size in rng.integers(1, 5, WORDS)])
    frequency = 1 / np.arange(1, WORDS + 1)
    frequency /= frequency.sum()
    prefix, response = anchor_lengths(count, seed)
    drawn = rng.choice(words, int((prefix + response).sum()), p=frequency)
    at = 0
    for prefix_words, response_words in zip(prefix, response, strict=True):
        instruction = " ".join(drawn[at : at + prefix_words])
        at += prefix_words
        answer = " ".join(drawn[at : at + response_words])
        at += response_words
        yield Example("synth,cot", instruction, answer)


def bench_tokenize(files: Sequence[RecordFile], tokenizer_dir: Path, out: Path) -> TokenizeTiming:
    """Tokenise record files into ``out`` and compare with the library alone, in seconds of processor time.

    The two take turns, as the clock of a shared machine drifts by more than they differ; the best turn of each counts.
    Opening the tokenizer, half a second however much there is to do, is not counted: a run over one record is taken
    off. Both keep theirs open over the turns.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # more threads wait for each other, which costs time of its own
    examples = (example for file in files for example in read_records(file.path, BadRecords()))
    write_jsonl(out / "one.jsonl", islice(examples, 1))
    tokenizer = load_tokenizer(tokenizer_dir)
    bare, ours, opening = [], [], []
    for turn in range(TURNS):
        seconds, size = _bare_seconds(files, tokenizer)
        bare.append(seconds)
        began = time.process_time()
        tokenize_files([out / "one.jsonl"], tokenizer_dir, out / f"one{turn}")
        opened = time.process_time()
        summary = tokenize_files([file.path for file in files], tokenizer_dir, out / str(turn))
        opening.append(opened - began)
        ours.append(time.process_time() - opened)
    return TokenizeTiming(size, summary.tokens, size / min(bare), size / (min(ours) - min(opening)))


def _bare_seconds(files: Sequence[RecordFile], tokenizer: Tokenizer) -> tuple[float, int]:
    """Of encoding all texts of some files, reading not counted; and the bytes of the texts."""
    bad = BadRecords()
    seconds, size = 0.0, 0
    examples = (example for file in files for example in read_records(file.path, bad))
    while batch := list(islice(examples, TEXTS_AT_ONCE // 2)):
        texts = [text for example in batch for text in (example.instruction, example.response)]
        began = time.process_time()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.process_time() - began
        size += sum(len(text.encode()) for text in texts)
    if not size:
        raise UserError(f"bench data: no usable record; {bad.summary()}")
    return seconds, size


def write_sampled(folder: Path, samples: int, seed: int) -> None:
    """A sampled folder of random tokens, with samples of the anchors' lengths."""
    rng = np.random.default_rng(seed)
    prefix, response = anchor_lengths(samples, seed)
    starts = rng.integers(0, TOKENS_ON_DISK - CONTEXT - 1, samples)
    (folder / "epoch_0").mkdir(parents=True)
    np.save(folder / "tokens.npy", rng.integers(0, 65_536, TOKENS_ON_DISK, np.uint16))
    columns = {"inst_start": starts, "inst_len": prefix, "resp_start": starts + prefix, "resp_len": response}
    for name, column in columns.items():
        np.save(folder / "epoch_0" / f"{name}.npy", column)
    info = {"vocab_size": 65_536}
    total = int((prefix + response).sum())
    metadata = {"tokenizer_info": info, "vocab_size": None, "max_seq_len": CONTEXT + 1, "total_length": total}
    write_json(folder / "metadata.json", metadata)


def bench_loader(sampled: Path, tokens_per_batch: int, workers: int, seconds: float) -> LoaderTiming:
    """Iterate over batches for so many seconds, the first eight not counted."""
    loader = Loader(sampled, tokens_per_batch=tokens_per_batch, workers=workers)
    batches = tokens = 0
    began = time.perf_counter()
    steps = iter(loader)
    for number, (step, _) in enumerate(steps):
        if number == 8:
            batches = tokens = 0
            began = time.perf_counter()
        batches += 1
        tokens += step.tokens
        if number > 8 and time.perf_counter() - began > seconds:
            break
    elapsed = time.perf_counter() - began
    steps.close()  # type: ignore[attr-defined]
    return LoaderTiming(workers, tokens / elapsed, batches)


def bench_data(
    records: Sequence[Path] = (),
    tokenizer_dir: Path | None = None,
    *,
    samples: int = 1_000_000,
    tokens_per_batch: int = 12_288,
    ranks: int = 16,
    workers: Sequence[int] = (0, 2),
    seconds: float = 5.0,
    seed: int = 0,
) -> DataTimings:
    """Time tokenising, planning and loading.

    Args:
        records: files or folders of records to tokenise; generated ones if there are none.
        tokenizer_dir: the tokenizer; one trained on the records if not given.
        samples: of the synthetic epoch that is planned and loaded.
        tokens_per_batch: token budget of a micro-batch.
        ranks: for which the plan is made; a batch for each.
        workers: threads of the loader, each measured; 0 is the caller's thread.
        seconds: how long each loader runs.
        seed: of everything drawn.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not records:
            write_jsonl(folder / "records.jsonl", generated_examples(5_000, seed))
            records = [folder / "records.jsonl"]
        files = find_record_files(records)
        if tokenizer_dir is None:
            tokenizer_dir = train_tokenizer(read_texts(files, BadRecords()), 16_384, folder / "tokenizer")
        tokenize = bench_tokenize(files, tokenizer_dir, folder / "store")

        prefix, response = anchor_lengths(samples, seed)
        lengths = prefix + np.maximum(response - 1, 0)
        small = slice(0, min(samples, 10_000))
        plan_epoch(lengths[small], prefix[small], tokens_per_batch, ranks)  # compiles
        began = time.process_time()
        plan_epoch(lengths, prefix, tokens_per_batch, ranks)
        plan_seconds = time.process_time() - began
        packing = packing_report(lengths, prefix, tokens_per_batch, ranks)

        write_sampled(folder / "sampled", min(samples, 200_000), seed)
        loader = [bench_loader(folder / "sampled", tokens_per_batch, count, seconds) for count in workers]
    return DataTimings(tokenize, samples, tokens_per_batch, ranks, plan_seconds, packing, loader)


def show(timings: DataTimings, console: Console) -> None:
    """Three small tables; they fit 80 columns."""
    tokenize = timings.tokenize
    table = Table("", "MB/s a core", "share", title="tokenising", box=SIMPLE_HEAD, title_justify="left")
    table.add_row("tokenizers alone", f"{tokenize.bare_bytes_per_second / 1e6:.2f}", "")
    table.add_row("records to store", f"{tokenize.bytes_per_second / 1e6:.2f}", f"{100 * tokenize.share:.0f} %")
    console.print(table)
    title = f"plan: {timings.samples:,} samples, {timings.ranks} x {timings.tokens_per_batch:,} tokens"
    table = Table(
        "", "full", "tokens apart", "most work above mean", title=title, box=SIMPLE_HEAD, title_justify="left"
    )
    for name, found in timings.packing.items():
        shares = (f"{100 * found.full:.2f} %", f"{100 * found.token_spread:.2f} %", f"{100 * found.work_excess:.1f} %")
        table.add_row(f"by {name}" if name == "tokens" else name, *shares)
    console.print(table)
    console.print(f"  {timings.plan_seconds:.1f} s on one core\n")
    table = Table("workers", "tokens/s", title="loading", box=SIMPLE_HEAD, title_justify="left")
    for timing in timings.loader:
        table.add_row(str(timing.workers), f"{timing.tokens_per_second:,.0f}")
    console.print(table)
