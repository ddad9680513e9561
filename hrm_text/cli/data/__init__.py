"""`hrm-text data`: from sources to sampled epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from hrm_text.cli.terminal import notes, progress_bar, tell, tell_of_bad_records
from hrm_text.contracts import UserError


def sources() -> None:
    """List the sources of training records that this package can make itself."""
    from rich.text import Text

    from hrm_text.data.sources import SOURCES

    console = Console(soft_wrap=True)
    for source in SOURCES.values():
        ready = "ready" if source.is_available or source.needs is None else f"needs: {source.needs.how}"
        console.print(Text.assemble((source.name, "bold"), f"  {sum(source.files.values()):,} records  {ready}"))
        console.print(Text(f"    {source.description}. Conditions: {source.condition}. Licence: {source.licence}."))


def clean(sources: Positional[tuple[str, ...]], out: Path, scale: float = 1.0, seed: int = 0, workers: int = 2) -> None:
    """Write the records of some sources: training records to OUT/train, held-out ones to OUT/held_out.

    Args:
        sources: names as `hrm-text data sources` lists them, or all
        out: folder for the records; files that are finished are kept
        scale: factor on the number of records of every source
        seed: of the draws
        workers: processes
    """
    from hrm_text.data.sources import build_gpu_mixture

    reports = build_gpu_mixture(
        out,
        seed,
        scale=scale,
        workers=workers,
        sources=None if sources == ("all",) else sources,
        on_progress=lambda report, done, total: tell(
            f"{done}/{total} {report.source}/{report.file}: {report.examples:,} records [{report.seconds:.1f} s]"
        ),
    )
    tell(f"{sum(report.examples for report in reports):,} records in {out}/train. Next:")
    tell(f"  hrm-text data tokenizer {out}/train --out {out}/tokenizer")


def tokenizer(records: Positional[tuple[Path, ...]], out: Path, vocab_size: int = 65_536, strict: bool = False) -> None:
    """Train a byte-level BPE tokenizer on records.

    Args:
        records: JSONL or Parquet files, or folders of them
        out: folder for tokenizer.json
        vocab_size: entries, special tokens included
        strict: stop at the first bad record instead of counting it
    """
    from hrm_text.data.records import BadRecords, find_record_files, read_texts
    from hrm_text.data.tokenizer import tokenizer_info, train_tokenizer

    bad = BadRecords(strict=strict)
    with notes().status("training the tokenizer"):
        train_tokenizer(read_texts(find_record_files(records), bad), vocab_size, out)
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
) -> None:
    """Turn records into token ids, one folder per file; finished folders are kept.

    Args:
        records: JSONL or Parquet files, or folders of them
        tokenizer: folder of the tokenizer
        out: folder for the token store
        max_seq_len: report prompts that leave no room for a response in so many tokens
        strict: stop at the first bad record instead of counting it
    """
    from hrm_text.data.tokenize import tokenize_files

    with progress_bar("tokenising", "bytes") as on_progress:
        summary = tokenize_files(
            records, tokenizer, out, strict=strict, max_seq_len=max_seq_len, on_progress=on_progress
        )
    tell_of_bad_records(summary.bad)
    reused = f", {summary.reused} of them kept from before" if summary.reused else ""
    counts = f"{summary.tokens:,} tokens of {summary.records:,} records in {summary.files} files{reused}"
    tell(f"wrote {out}: {counts}. Next:")
    tell(f"  hrm-text data sample {out} --out SAMPLED --rules RULES.yaml --epochs 1")


def sample(
    store: Positional[Path],
    out: Path,
    epochs: int,
    rules: Path | None = None,
    seed: int = 0,
    max_seq_len: int = 4097,
) -> None:
    """Draw epochs from a token store: what training reads.

    Args:
        store: folder that `hrm-text data tokenize` wrote
        out: folder for the epochs
        epochs: how many to draw
        rules: YAML list of rules by file-name prefix (max_per_file, repeat, long_context); without it every row once
        seed: the same seed gives the same bytes
        max_seq_len: most tokens of a prompt and its response together: the context and one more
    """
    from hrm_text.data.sample import read_rules, sample_epochs

    with progress_bar("sampling", "strata") as on_progress:
        chosen = read_rules(rules) if rules is not None else []
        summary = sample_epochs(store, out, chosen, epochs, seed, max_seq_len, on_progress=on_progress)
    for kind in ("short_response", "too_long", "truncated"):
        if count := sum(getattr(stratum, kind) for stratum in summary.strata):
            tell(f"{kind.replace('_', ' ')}: {count:,} rows")
    for rule in summary.unused_rules:
        tell(f"rule with prefix {rule!r} matched no file", "yellow")
    samples = ", ".join(f"{count:,}" for count in summary.samples_per_epoch)
    tell(f"wrote {out}: {samples} samples per epoch. Next:")
    tell("  hrm-text train CONFIG.yaml --data.sampled " + str(out))


def inspect(folder: Positional[Path], limit: int = 5, tokenizer: Path | None = None) -> None:
    """Show samples of a token store or of a sampled folder as text, special tokens visible.

    Args:
        folder: token store or sampled folder
        limit: how many samples
        tokenizer: its folder, in case it has moved
    """
    from hrm_text.data.inspect import inspect_folder

    if limit < 1:
        raise UserError(f"limit: expected at least 1 sample, found {limit}")
    for sample in inspect_folder(folder, limit, tokenizer):
        print(sample, end="\n\n")


COMMANDS: dict[str, Callable[..., None]] = {
    "sources": sources,
    "clean": clean,
    "tokenizer": tokenizer,
    "tokenize": tokenize,
    "sample": sample,
    "inspect": inspect,
}
