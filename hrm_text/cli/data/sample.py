"""`hrm-text data sample`: tokens to epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tyro.conf import Positional

from hrm_text.cli.terminal import progress_bar, tell


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


COMMANDS: dict[str, Callable[..., None]] = {"sample": sample}
