"""The mixture: what each rule gives to an epoch, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hrm_text.data.sample import SampleSummary

_COLUMNS = ("prefix", "files", "rows", "excluded", "short", "long", "truncated", "drawn", "tokens", "share", "repeats")


@dataclass(slots=True)
class RuleSummary:
    """What one rule gives: counts of rows in the store, and of an epoch."""

    prefix: str
    files: int = 0
    rows: int = 0
    """Rows in the store. Of these are lost:"""
    excluded: int = 0
    """rows that a mask leaves out,"""
    short: int = 0
    """rows whose response is too short,"""
    long: int = 0
    """rows that do not fit the context."""
    truncated: int = 0
    """Rows in use whose response is cut."""
    drawn: float = 0
    """Rows of an epoch, repeats included: the mean of the epochs."""
    tokens: float = 0
    """Of those rows."""
    share: float = 0
    """Of the tokens of an epoch."""
    drawn_tokens: int = 0
    """Over all epochs, repeats included."""
    unique_tokens: int = 0
    """Over all epochs, each row counted once."""

    @property
    def repeats(self) -> float:
        """How often a token is seen over all epochs."""
        return self.drawn_tokens / self.unique_tokens if self.unique_tokens else 0.0


def mixture(summary: SampleSummary) -> list[RuleSummary]:
    """A row for each rule that a file came to, in the order of the first such file; the last is their sum."""
    epochs = len(summary.samples_per_epoch)
    of_rule: dict[str, RuleSummary] = {}
    total = RuleSummary("all")
    for stratum in summary.strata:
        # A deck is dealt without replacement: a row comes twice only once every row has come.
        whole_decks = stratum.drawn_rows >= stratum.usable
        unique_tokens = stratum.usable_tokens if whole_decks else stratum.drawn_tokens
        for row in (of_rule.setdefault(stratum.rule, RuleSummary(stratum.rule)), total):
            row.files += 1
            row.rows += stratum.rows
            row.excluded += stratum.excluded
            row.short += stratum.short_response
            row.long += stratum.too_long
            row.truncated += stratum.truncated
            row.drawn += stratum.drawn_rows / epochs
            row.tokens += stratum.drawn_tokens / epochs
            row.drawn_tokens += stratum.drawn_tokens
            row.unique_tokens += unique_tokens
    rows = [*of_rule.values(), total]
    for row in rows:
        row.share = row.drawn_tokens / total.drawn_tokens if total.drawn_tokens else 0.0
    return rows


def as_json(rows: list[RuleSummary]) -> list[dict[str, Any]]:
    """The table as plain values."""
    return [asdict(row) | {"repeats": row.repeats} for row in rows]


def as_text(rows: list[RuleSummary]) -> str:
    """The table as aligned lines, a heading first."""
    cells = [list(_COLUMNS)]
    for row in rows:
        counts = [f"{round(getattr(row, name)):,}" for name in _COLUMNS[1:9]]
        cells.append([row.prefix or "(every file)", *counts, f"{row.share:.2%}", f"{row.repeats:.2f}"])
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
