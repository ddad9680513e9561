"""`hrm-text data inspect | report | tokenizer-report`: what lies in the folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from tyro.conf import Positional

from hrm_text.cli.terminal import progress_bar, tell, tell_of_bad_records
from hrm_text.contracts import UserError

if TYPE_CHECKING:
    from hrm_text.data.inspect import Piece, SampleText

_PICTURE_CELLS = 36
"""Two pictures beside each other fit 80 columns."""


def inspect(
    folder: Positional[Path],
    limit: int = 5,
    tokenizer: Path | None = None,
    mask: bool = True,
    source: str = "",
    seed: int | None = None,
) -> None:
    """Show samples of a token store or of a sampled folder: text, control tokens, labels, positions, the mask.

    Args:
        folder: token store or sampled folder
        limit: how many samples
        tokenizer: its folder, in case it has moved
        mask: draw which tokens see which, for the first sample and for all that are shown as one packed batch
        source: only source files whose name starts so
        seed: draw samples at random; without it the first ones, spread over the files
    """
    from hrm_text.data.inspect import inspect_folder

    if limit < 1:
        raise UserError(f"limit: expected at least 1 sample, found {limit}")
    show(inspect_folder(folder, limit, tokenizer, source=source, seed=seed), Console(), mask)


def show(samples: Sequence[SampleText], console: Console, mask: bool) -> None:
    """Print samples: in colour where the console has any, as plain text elsewhere."""
    plain = console.color_system is None
    for sample in samples:
        if plain:
            console.print(Text(str(sample)), end="\n\n", soft_wrap=True)
            continue
        console.print(Text.assemble((sample.source, "bold"), f" row {sample.row:,}  ", (sample.condition, "magenta")))
        for note, pieces, style in (
            (sample.prefix_note, sample.prefix_pieces, "cyan"),
            (sample.response_note, sample.response_pieces, "green underline"),
        ):
            console.print(Text(f"  {note}", "dim"))
            console.print(Padding(_coloured(pieces, style), (0, 0, 0, 4)))
        console.print()
    shown = [sample for sample in samples if sample.input_tokens]
    if mask and shown:
        for line in _masks(shown, plain):
            console.print(line, soft_wrap=True)


def _coloured(pieces: Sequence[Piece], style: str) -> Text:
    """Labels are underlined, control tokens among them."""
    text = Text()
    for piece in pieces:
        control = f"bold yellow{' underline' * ('underline' in style)}"
        text.append(piece.text, "dim italic" if piece.is_left_out else control if piece.is_control else style)
    return text


def _masks(samples: Sequence[SampleText], plain: bool) -> list[Text]:
    """The mask of the first sample and that of all, beside each other: a row is a query, a column a key."""
    from hrm_text.data.inspect import mask_cells

    groups = [samples[:1]] if len(samples) == 1 else [samples[:1], samples]
    size = _PICTURE_CELLS // 2 if plain else _PICTURE_CELLS
    pictures = []
    for group in groups:
        lengths = [sample.input_tokens for sample in group]
        cells = mask_cells(lengths, [sample.prefix_tokens for sample in group], size).tolist()
        what = "the first sample" if len(group) == 1 else f"all {len(group)}, packed"
        heading = Text(f"{what}: {sum(lengths):,} tokens", "bold")
        pictures.append([heading, *(_plain_rows(cells) if plain else _half_block_rows(cells))])
    legend = (("##", "cyan", "the prefix, both ways"), ("++", "green", "the response, what came before it"))
    lines = [Text("Which token (row) sees which (column)?")]
    lines.append(
        Text.assemble(
            *(part for sign, style, what in legend for part in ((sign if plain else "■", style), f" {what}   "))
        )
    )
    lines[-1].rstrip()
    width = max(_PICTURE_CELLS, *(len(picture[0]) for picture in pictures)) + 4
    for number in range(max(map(len, pictures))):
        line = Text()
        for picture in pictures:
            part = picture[number] if number < len(picture) else Text()
            line.append_text(part).append(" " * (width - len(part)))
        line.rstrip()
        lines.append(line)
    return lines


def _plain_rows(cells: list[list[int]]) -> list[Text]:
    """Two characters a cell, as a character is twice as high as it is wide."""
    return [Text("".join((" ·", "##", "++")[cell] for cell in row)) for row in cells]


def _half_block_rows(cells: list[list[int]]) -> list[Text]:
    """A character shows two cells, one above the other."""
    colours = ("grey19", "cyan", "green")
    rows = []
    for number in range(0, len(cells), 2):
        lower = [f" on {colours[cell]}" for cell in cells[number + 1]] if number + 1 < len(cells) else [""] * len(cells)
        styles = [f"{colours[cell]}{below}" for cell, below in zip(cells[number], lower, strict=True)]
        rows.append(Text.assemble(*(("▀", style) for style in styles)))
    return rows


def report(
    folder: Positional[Path],
    out: Path,
    records: Path | None = None,
    masks: tuple[Path, ...] = (),
    tokens_per_batch: int = 12_288,
    ranks: int = 16,
    max_seq_len: int = 4097,
) -> None:
    """Write a report on a token store or a sampled folder: coverage, repeats, lengths, packing, what was left out.

    Args:
        folder: token store or sampled folder
        out: folder for report.html and report.md
        records: folder that `hrm-text data clean` wrote, for what was kept and dropped
        masks: folders that `hrm-text data duplicates` and `hrm-text data contamination` wrote
        tokens_per_batch: token budget of a micro-batch
        ranks: micro-batches of a step
        max_seq_len: context and one more that a store is to be sampled for; a sampled folder knows its own
    """
    from hrm_text.data.corpus_stats import corpus_stats
    from hrm_text.recipes.data_report import write_data_report

    with progress_bar("counting", "rows") as on_progress:
        stats = corpus_stats(
            folder, records=records, masks=masks, tokens_per_batch=tokens_per_batch, ranks=ranks,
            max_seq_len=max_seq_len, on_progress=on_progress,
        )  # fmt: skip
    page = write_data_report(stats, out)
    tell(f"wrote {page}, and {page.with_suffix('.md').name} beside it")


def tokenizer_report(
    tokenizer: Positional[Path],
    records: Positional[tuple[Path, ...]],
    against: tuple[str, ...] = ("cl100k_base",),
    sample_mb: float = 1,
    seed: int = 0,
) -> None:
    """Show how many bytes a token stands for, by source, beside public tokenizers.

    Args:
        tokenizer: its folder
        records: JSONL or Parquet files, or folders of them
        against: cl100k_base (GPT-4) and o200k_base (GPT-4o), which the package bpe-openai carries
        sample_mb: megabytes of text of each source
        seed: of the sample
    """
    from rich.table import Table

    from hrm_text.data.inspect import visible
    from hrm_text.data.records import BadRecords, find_record_files
    from hrm_text.data.tokenizer_report import public_tokenizer, tokenizer_quality

    counters = {name: counter for name in against if (counter := public_tokenizer(name)) is not None}
    if len(counters) < len(set(against)):
        tell("nothing to compare with: public tokenizers need `pip install 'hrm-text[tokenizer-report]'`", "yellow")
    bad = BadRecords()
    with progress_bar("counting", "sources") as on_progress:
        found = tokenizer_quality(
            tokenizer, find_record_files(records), counters, bad,
            source_bytes=round(sample_mb * 1e6), seed=seed, on_progress=on_progress,
        )  # fmt: skip
    tell_of_bad_records(bad)
    table = Table("source", title="bytes per token", title_justify="left", box=None, pad_edge=False)
    for name in found[0].tokens:
        table.add_column(name, justify="right")
    table.add_column("sample, kB", justify="right")
    for quality in found:
        cells = [f"{quality.bytes_per_token(name):.2f}" for name in quality.tokens]
        table.add_row(Text(visible(quality.source)), *cells, f"{quality.bytes / 1000:,.0f}")
    Console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "report": report,
    "tokenizer-report": tokenizer_report,
}
