"""From records straight to a training run: tokenised and sampled into the run's folder, once.

    RUN/data/records.json         what the rest was made from: checksums of records and tokenizer, and the settings
             tokenizer/           a copy, so that the run and its checkpoints need no other folder
             store/               token store (data.tokenize)
             masks/held_out/      with validation.share: rows that are not trained on
                   trained/       rows that are not validated on
             sampled/train/       what training reads (data.sample)
                     held_out/    what it validates on

A second start finds all of it. Other records or settings are made anew while the run has no checkpoint, and are an
error once it has one: its position would be one in another sequence of samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.engine import Progress
from hrm_text.data.masks import folder_identity, write_masks
from hrm_text.data.records import find_record_files
from hrm_text.data.sample import SampleSummary, sample_epochs
from hrm_text.data.storage import read_integers
from hrm_text.data.tokenize import SPANS, TokenizeSummary, store_folders, tokenize_files
from hrm_text.data.tokenizer import tokenizer_file
from hrm_text.files import read_json, sha256, whole_folder, write_json
from hrm_text.model.checkpoint_files import step_folders
from hrm_text.model.origin import find_origin
from hrm_text.train.config import TrainConfig

UNBOUNDED_CONTEXT = 4096
"""Tokens of a sample at most where neither the model nor its origin says."""


def prepared(
    config: TrainConfig,
    tell: Callable[[str], None] = lambda text: None,
    on_progress: Progress | None = None,
) -> TrainConfig:
    """The settings with ``data.records`` tokenised and sampled: ``data.sampled`` is in their place.

    Without records the settings are returned as they are. Called again, it finds what was made. One process at a time
    may call it for a run.

    Args:
        config: of the run, its model filled in where ``init`` has it.
        tell: is told in a line or more what was made and left out.
        on_progress: bytes of records tokenised, and in all.

    Raises:
        UserError: no records or none that can be used, no tokenizer or two different ones; or other records or
            settings than those that a run with checkpoints was begun with.
    """
    if config.data.records is None:
        return config
    data = config.run / "data"
    begun = bool(step_folders(config.run / "checkpoints"))
    tokenizer = _tokenizer(config, data / "tokenizer" if begun else None)
    files = find_record_files(config.data.records)
    context = config.model.max_position_embeddings or UNBOUNDED_CONTEXT
    epochs = config.data.epochs or 1
    identity: dict[str, Any] = {
        "records": {file.safe_name: sha256(file.path) for file in files},
        "tokenizer": sha256(tokenizer_file(tokenizer)),
        "max_seq_len": context + 1,
        "epochs": epochs,
        "seed": config.seed,
        "share": config.validation.share,
    }
    _begin(data, identity, begun)
    if not tokenizer_file(data / "tokenizer").is_file():
        with whole_folder(data / "tokenizer") as beside:
            source = tokenizer_file(tokenizer)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if source.with_name(name).is_file():
                    shutil.copyfile(source.with_name(name), beside / name)
    share = config.validation.share
    splits = ("held_out", "train") if share else ("train",)  # train last: where it is, all is
    if not (data / "sampled" / "train" / "metadata.json").is_file():
        # Their own sources, wherever they lie now: the store is the run's alone.
        store = data / "store"
        summary = tokenize_files(
            config.data.records, data / "tokenizer", store, max_seq_len=context + 1, on_progress=on_progress
        )
        if share:
            hold_out(store, data / "masks", share)
        for split in splits:
            masks = () if not share else (data / "masks" / ("held_out" if split == "train" else "trained"),)
            sampled = sample_epochs(
                store,
                data / "sampled" / split,
                [],
                epochs if split == "train" else 1,
                config.seed,
                context + 1,
                exclude=masks,
                virtual=True,
            )
        tell(_made(data, summary, sampled))
    validation = config.validation
    if share:
        validation = dataclasses.replace(validation, sampled=data / "sampled" / "held_out", share=0.0)
    of_run = dataclasses.replace(
        config.data, sampled=data / "sampled" / "train", records=None, tokenizer=None, epochs=epochs
    )
    return dataclasses.replace(config, data=of_run, validation=validation)


def _tokenizer(config: TrainConfig, own: Path | None) -> Path:
    """The tokenizer of the records: the run's own once it has one, else that of ``init``, or the one that is named."""
    named = config.data.tokenizer
    if own is not None and tokenizer_file(own).is_file():
        origin: Path | None = own
    else:
        origin = None if config.init is None else find_origin(config.init).tokenizer
    if named is None:
        assert origin is not None, "records without a tokenizer are refused by the settings"
        return origin
    if not tokenizer_file(named).is_file():
        raise UserError(f"data.tokenizer: {tokenizer_file(named)}: no such file; name a tokenizer folder")
    if origin is not None and sha256(tokenizer_file(named)) != sha256(tokenizer_file(origin)):
        raise UserError(
            f"data.tokenizer {named} is another one than that of the weights to start from, {origin}: "
            "the same text has other ids there. Leave data.tokenizer out."
        )
    return named


def _begin(data: Path, identity: dict[str, Any], begun: bool) -> None:
    """Note what the folder is made from, and clear it of what was made from something else."""
    note = data / "records.json"
    found = read_json(note) if note.is_file() else None
    if found == identity:
        return
    if found is not None:
        differences = _differences(found, identity)
        if begun:
            raise UserError(
                f"{data}: the run was begun with other records or settings: {'; '.join(differences)}. "
                "Put them back, or give this run another folder (run: ...)."
            )
        for name in ("sampled", "masks", "store", "tokenizer"):
            shutil.rmtree(data / name, ignore_errors=True)
    elif data.is_dir() and any(data.iterdir()):
        raise UserError(f"{data}: is there already and was not made for a run; give this run another folder (run: ...)")
    write_json(note, identity)


def _differences(found: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    before, now = found.get("records", {}), identity["records"]
    told = [f"{name} has changed" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    told += [f"{name} is not given any more" for name in sorted(before.keys() - now.keys())]
    told += [f"{name} was not given then" for name in sorted(now.keys() - before.keys())]
    if found.get("tokenizer") != identity["tokenizer"]:
        told.append("the tokenizer is another one")
    told += [
        f"{name} was {found.get(key)!r} and is {identity[key]!r}"
        for key, name in (
            ("max_seq_len", "the context plus one"),
            ("epochs", "data.epochs"),
            ("seed", "seed"),
            ("share", "validation.share"),
        )
        if found.get(key) != identity[key]
    ]
    return told


def hold_out(store: Path, masks: Path, share: float) -> None:
    """Write two folders of masks that complete each other: ``held_out``, of about this share of the rows, ``trained``.

    The tokens of a record alone decide, so a record stays on its side however the records are ordered, split into files
    or added to, and the same record never lies on both.
    """
    folders = store_folders(store)
    chosen = {folder.name: _held_out_rows(folder, share) for folder in folders}
    held, rows = sum(int(mask.sum()) for mask in chosen.values()), sum(len(mask) for mask in chosen.values())
    if not 0 < held < rows:
        raise UserError(
            f"validation.share: {share} of {rows:,} records holds out {held:,}; "
            "raise or lower it, give more records, or leave it at 0"
        )
    for name, complement in (("held_out", False), ("trained", True)):
        with write_masks(masks / name) as writer:
            for folder in folders:
                writer.add(folder.name, folder_identity(folder), chosen[folder.name] ^ complement)
            writer.finish("held_out", {"share": share}, {"rows": rows, "held_out": held})


def _held_out_rows(folder: Path, share: float) -> npt.NDArray[np.bool_]:
    """[rows]; True where the first 8 bytes of the SHA-256 of a row's token ids, as a fraction, are below the share."""
    tokens = read_integers(folder / "tokens.npy")
    columns = [read_integers(folder / f"{name}.npy").astype(np.int64) for name in SPANS]
    mask = np.zeros(len(columns[0]), np.bool_)
    for row, (inst_start, inst_len, resp_start, resp_len) in enumerate(zip(*columns, strict=True)):
        digest = hashlib.sha256(tokens[inst_start : inst_start + inst_len].astype("<u4").tobytes())
        digest.update(tokens[resp_start : resp_start + resp_len].astype("<u4").tobytes())
        mask[row] = int.from_bytes(digest.digest()[:8], "big") < share * 2**64
    return mask


def _made(data: Path, summary: TokenizeSummary, sampled: SampleSummary) -> str:
    """What became of the records, for people."""
    lines = [summary.bad.summary()] if summary.bad.total else []
    truncated = sum(stratum.truncated for stratum in sampled.strata)
    short = sum(stratum.short_response for stratum in sampled.strata)
    held_out = sum(stratum.excluded for stratum in sampled.strata)
    lines += [f"{truncated:,} responses do not fit the context and are cut"] if truncated else []
    lines += [f"{short:,} records have a response without content and are left out"] if short else []
    lines += [f"{held_out:,} records are held out and validated on"] if held_out else []
    epochs = len(sampled.samples_per_epoch)
    samples = sampled.samples_per_epoch[0]
    tokens = sampled.tokens_per_epoch[0]
    lines.append(f"wrote {data}: {samples:,} records of {tokens:,} tokens an epoch, {epochs} epoch(s)")
    return "\n".join(lines)
