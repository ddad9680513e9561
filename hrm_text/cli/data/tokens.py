"""`hrm-text data tokenizer | tokenize`: records to tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tyro.conf import Positional

from hrm_text.cli.terminal import progress_bar, tell, tell_of_bad_records
from hrm_text.data.engine import Kind


def tokenizer(
    records: Positional[tuple[Path, ...]],
    out: Path,
    vocab_size: int = 65_536,
    sample_mb: float = 2000.0,
    seed: int = 0,
    strict: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on records.

    Args:
        records: JSONL or Parquet files, or folders of them
        out: folder for tokenizer.json
        vocab_size: entries, special tokens included
        sample_mb: megabytes of text to train on, evenly from all files
        seed: of the sample
        strict: stop at the first bad record instead of counting it
    """
    from hrm_text.data.records import BadRecords, find_record_files
    from hrm_text.data.text_sample import sample_texts
    from hrm_text.data.tokenizer import tokenizer_info, train_tokenizer

    bad = BadRecords(strict=strict)
    budget = round(sample_mb * 1e6)
    with progress_bar("reading text", "bytes") as on_progress:
        texts = sample_texts(find_record_files(records), budget, seed, bad, on_progress=on_progress)
        train_tokenizer(texts, vocab_size, out)
    tell_of_bad_records(bad)
    tell(f"wrote {out}: {tokenizer_info(out)['vocab_size']:,} entries. Next:")
    paths = " ".join(map(str, records))
    tell(f"  hrm-text data tokenize {paths} --tokenizer {out} --out STORE")


def tokenize(
    records: Positional[tuple[Path, ...]],
    tokenizer: Path,
    out: Path,
    max_seq_len: int | None = None,
    strict: bool = False,
    workers: int = 1,
    engine: Kind = "local",
    partition: str = "",
) -> None:
    """Turn records into token ids, one folder per file; finished folders are kept.

    Args:
        records: JSONL or Parquet files, or folders of them
        tokenizer: folder of the tokenizer
        out: folder for the token store
        max_seq_len: report prompts that leave no room for a response in so many tokens
        strict: stop at the first bad record instead of counting it
        workers: processes, each with a file of its own; 1 is this process, with the tokenizer's threads on all cores
        engine: where they run
        partition: of slurm
    """
    from hrm_text.data.engine import Engine
    from hrm_text.data.tokenize import tokenize_files

    with progress_bar("tokenising", "bytes") as on_progress:
        summary = tokenize_files(
            records, tokenizer, out, strict=strict, max_seq_len=max_seq_len,
            engine=Engine(engine, workers, out.parent / f".{out.name}.logs", partition), on_progress=on_progress,
        )  # fmt: skip
    tell_of_bad_records(summary.bad)
    reused = f", {summary.reused} of them kept from before" if summary.reused else ""
    counts = f"{summary.tokens:,} tokens of {summary.records:,} records in {summary.files} files{reused}"
    tell(f"wrote {out}: {counts}. Next:")
    tell(f"  hrm-text data sample {out} --out SAMPLED --rules RULES.yaml --epochs 1")


COMMANDS: dict[str, Callable[..., None]] = {"tokenizer": tokenizer, "tokenize": tokenize}
