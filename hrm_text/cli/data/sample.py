"""`hrm-text data sample`: tokens to epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from hrm_text.cli.terminal import print_json, progress_bar, tell
from hrm_text.contracts import UserError

if TYPE_CHECKING:
    from hrm_text.data.sample import SampleSummary


def sample(
    store: Positional[Path],
    epochs: int,
    out: Path | None = None,
    rules: Path | None = None,
    seed: int = 0,
    max_seq_len: int = 4097,
    exclude: tuple[Path, ...] = (),
    virtual: bool = False,
    dry_run: bool = False,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Draw epochs from a token store: what training reads.

    Args:
        store: folder that `hrm-text data tokenize` wrote
        epochs: how many to draw
        out: folder for the epochs; not needed with --dry-run
        rules: YAML list of rules by file-name prefix (max_per_file, max_total, repeat, long_context); without it every
            row once
        seed: the same seed gives the same bytes
        max_seq_len: most tokens of a prompt and its response together: the context and one more
        exclude: folders of masks; rows that one of them marks are left out
        virtual: do not copy the tokens; training then reads them from the store, which must stay as it is
        dry_run: write nothing, and show what an epoch would hold, by rule
        json: with --dry-run, print it as one JSON object
    """
    from hrm_text.data.mixture import as_json, as_text, mixture
    from hrm_text.data.rules import read_rules
    from hrm_text.data.sample import preview_epochs, sample_epochs

    if json and not dry_run:
        raise UserError("--json prints what --dry-run finds: give both, or neither")
    chosen = read_rules(rules) if rules is not None else []
    with progress_bar("sampling", "strata") as on_progress:
        if dry_run:
            summary = preview_epochs(store, chosen, epochs, seed, max_seq_len, exclude=exclude, on_progress=on_progress)
        elif out is None:
            raise UserError("--out: name a folder for the epochs, or --dry-run to write nothing")
        else:
            summary = sample_epochs(
                store, out, chosen, epochs, seed, max_seq_len,
                exclude=exclude, virtual=virtual, on_progress=on_progress,
            )  # fmt: skip
    _tell_losses(summary)
    samples = ", ".join(f"{count:,}" for count in summary.samples_per_epoch)
    if dry_run:
        rows = mixture(summary)
        if json:
            print_json({"samples_per_epoch": summary.samples_per_epoch, "tokens_per_epoch": summary.tokens_per_epoch,
                        "unused_rules": summary.unused_rules, "rules": as_json(rows)})  # fmt: skip
        else:
            print(as_text(rows))
        tell(f"wrote nothing: {samples} samples per epoch. Next, the same without --dry-run:")
        options = (
            f" --rules {rules}" * (rules is not None) + " --exclude " * bool(exclude) + " ".join(map(str, exclude))
        )
        tell(f"  hrm-text data sample {store} --epochs {epochs}{options} --out {out or 'SAMPLED'}")
        return
    tell(f"wrote {out}: {samples} samples per epoch. Next:")
    tell("  hrm-text train CONFIG.yaml --data.sampled " + str(out))


def _tell_losses(summary: SampleSummary) -> None:
    for kind in ("excluded", "short_response", "too_long", "truncated"):
        if count := sum(getattr(stratum, kind) for stratum in summary.strata):
            tell(f"{kind.replace('_', ' ')}: {count:,} rows")
    for rule in summary.unused_rules:
        tell(f"rule with prefix {rule!r} matched no file", "yellow")


COMMANDS: dict[str, Callable[..., None]] = {"sample": sample}
