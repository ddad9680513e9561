"""From a training checkpoint to a weights folder: here, once, the averaged weights are chosen over the raw ones."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.convert.card import Card, Rows, Score, render
from hrm_text.data.prompt import parse_condition
from hrm_text.data.tokenizer import (
    BOQ,
    EOA,
    PADDING,
    load_tokenizer,
    run_tokenizer,
    tokenizer_file,
    tokenizer_info,
    transformers_config,
)
from hrm_text.files import whole_folder, write_json
from hrm_text.model.checkpoint_files import find_checkpoint, load_state
from hrm_text.model.config import ModelConfig
from hrm_text.model.origin import model_tensors
from hrm_text.model.weights import parse_dtype, write_weights

FOLDER_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What a weights folder of ours holds; one with anything else in it is never replaced."""

RELEASED_SPECIAL_IDS = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
"""Of the released tokenizer, for a folder that is written without one."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    raw: bool = False,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    condition: str | None = None,
    name: str | None = None,
    license: str | None = "apache-2.0",
    about_data: str = "",
    scores: Sequence[Score] = (),
    scored_on: str = "held-out questions",
    warn: Callable[[str], Any] = warnings.warn,
) -> Path:
    """Write the weights folder of a training checkpoint; returns ``out``.

    Args:
        checkpoint: a checkpoint, or the folder of a run: then its newest good checkpoint.
        out: replaced if it is a weights folder already, refused if it holds anything else.
        raw: the weights of the last step in the place of their moving average, which is what is meant to be released.
        dtype: of the stored weights; None is the one the run computed in.
        tokenizer: folder, in case the one that the run was trained with has moved.
        condition: tags such as synth,cot, that prompts are answered under where none is named; None is direct.
        name: title of the card; None is the name of ``out``.
        license, about_data, scores, scored_on: facts for the card that a checkpoint does not hold.
        warn: is told of damaged checkpoints that were passed over.

    Raises:
        UserError: the checkpoint is missing, damaged or of another model than its config says; the tokenizer is not
            the run's; the condition names an unknown tag; ``out`` may not be replaced.
    """
    if condition is not None:
        condition = ",".join(parse_condition(condition))
    folder = find_checkpoint(checkpoint, warn)
    saved = load_state(folder)
    state, settings = saved.state, saved.config
    element = parse_dtype(dtype or settings.get("dtype", "float32"))
    config, tensors = model_tensors(folder, raw=raw)
    tokenizer = run_tokenizer(state["tokenizer_info"], tokenizer)
    check_vocabulary(tokenizer_info(tokenizer)["vocab_size"], config, tokenizer)
    decay = settings.get("optimizer", {}).get("ema_decay")
    step, total = state["step"], state["total_steps"]
    card = Card(
        name=name or out.resolve().name,
        config=config,
        dtype=str(element).removeprefix("torch."),
        weights="raw weights of the last step" if raw else f"moving average of the weights, decay {decay}",
        origin=f"{begun_from(state, settings)} by hrm-text for {step:,} of {total:,} steps.",
        license=license,
        about_data=about_data,
        data=data_rows(state, settings),
        training=training_rows(state, settings, saved.versions),
        scores=scores,
        scored_on=scored_on,
    )
    return write_folder(out, config, tensors, element, tokenizer, card, condition)


def begun_from(state: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """How a run began, for the card: names stay, paths of the machine do not."""
    if not state.get("base"):
        return "Trained from scratch"
    rank = (settings.get("lora") or {}).get("rank")
    how = f"Adapters of rank {rank} trained and merged upon" if rank else "Fine-tuned from"
    return f"{how} the weights {Path(state['base']['path']).name} (SHA-256 {state['base']['sha256'][:12]}...)"


def check_vocabulary(vocab_size: int, config: ModelConfig, tokenizer: Path) -> None:
    """A tokenizer with ids that the embedding does not have is an error."""
    if vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer}: {vocab_size:,} entries, but the model has {config.vocab_size:,}; "
            "give the tokenizer that the model was trained with"
        )


def write_folder(
    out: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    tokenizer: Path | None,
    card: Card,
    condition: str | None = None,
) -> Path:
    """Write a weights folder, whole or not at all; returns it. A folder with anything else in it is refused."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if others := sorted(names - FOLDER_FILES):
        raise UserError(f"{out}: holds {others[0]}, which would be lost; choose another folder for the weights")
    with whole_folder(out) as beside:
        write_weights(beside, config, tensors, dtype, special_ids(tokenizer), condition)
        if tokenizer is not None:
            file = tokenizer_file(tokenizer)
            shutil.copyfile(file, beside / "tokenizer.json")
            if (settings := file.with_name("tokenizer_config.json")).is_file():
                shutil.copyfile(settings, beside / "tokenizer_config.json")
            else:
                write_json(beside / "tokenizer_config.json", transformers_config())
        (beside / "README.md").write_text(render(card), encoding="utf-8")
    return out


def special_ids(tokenizer: Path | None) -> dict[str, int]:
    """The ids at which generation begins, ends and pads."""
    if tokenizer is None:
        return RELEASED_SPECIAL_IDS
    loaded = load_tokenizer(tokenizer)
    ids = {}
    for role, token in (("bos", BOQ), ("eos", EOA), ("pad", PADDING)):
        index = loaded.token_to_id(token)
        if index is None:
            raise UserError(f"{tokenizer}: the tokenizer lacks {token}, the {role} token")
        ids[f"{role}_token_id"] = index
    return ids


def data_rows(state: Mapping[str, Any], settings: Mapping[str, Any]) -> Rows:
    """What a checkpoint says of its data, for the card."""
    rows: dict[str, Any] = {"Tokens seen": state["tokens_seen"]}
    for key, value in (state.get("data") or {}).items():
        rows[key.replace("_", " ").capitalize()] = value
    data = settings.get("data", {})
    loss = {"response": "responses alone", "all": "all tokens"}
    if data.get("supervise") in loss:
        rows["Loss on"] = loss[data["supervise"]]
    return rows


def training_rows(state: Mapping[str, Any], settings: Mapping[str, Any], versions: Mapping[str, str]) -> Rows:
    """What a checkpoint says of its training, for the card; a setting that it does not hold is left out."""
    rows: dict[str, Any] = {"Steps": f"{state['step']:,} of {state['total_steps']:,}"}
    if state.get("skipped"):
        rows["Skipped steps (not finite)"] = state["skipped"]
    data, optimizer, credit = (settings.get(key) or {} for key in ("data", "optimizer", "credit"))
    if "tokens_per_batch" in data:
        rows["Batch, tokens at most"] = data["tokens_per_batch"] * data.get("micro_batches", 1)
    if optimizer:
        betas = " and ".join(f"{beta:g}" for beta in optimizer.get("betas", ()))
        rows["Optimizer"] = f"Adam-atan2, betas {betas}, weight decay {optimizer.get('weight_decay')}"
        rows["Moving average of the weights"] = f"decay {optimizer.get('ema_decay')}"
    if lr := optimizer.get("lr"):
        after = f"cosine to {lr.get('floor')} of the peak" if lr.get("decay") == "cosine" else "constant"
        rows["Learning rate"] = f"{lr.get('peak'):g} after {lr.get('warmup_steps'):,} steps of warm-up, then {after}"
    model = settings["model"]
    graded = f"{model['bp_steps']}"
    if model["architecture"] == "hrm" and credit.get("warmup_ratio"):
        graded = f"{credit['k_min']} to {graded}, over the first {100 * credit['warmup_ratio']:g} % of the steps"
    rows["Module calls with gradient (K)"] = graded
    rows["Initialisation"] = f"{model['init']}, seed {settings.get('seed')}"
    rows["Computed in"] = f"{settings.get('dtype')}, master weights in float32"
    rows["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return rows
