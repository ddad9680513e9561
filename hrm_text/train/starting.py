"""Starting from trained weights (``init``): what a run takes over from them, and what has to agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.tokenizer import tokenizer_file, tokenizer_info
from hrm_text.files import read_json, sha256
from hrm_text.model.checkpoint_files import SavedState, step_folders
from hrm_text.model.config import RECURRENCE, ModelConfig
from hrm_text.model.lora import LoraConfig
from hrm_text.model.origin import Origin, base_of_adapters, checksum, find_origin
from hrm_text.settings import from_mapping, read_yaml, to_mapping
from hrm_text.train.config import TrainConfig, plain


@dataclass(frozen=True)
class Start:
    """What a run begins with, or continues upon, beside its own checkpoint."""

    weights: Mapping[str, Tensor] | None = None
    """fp32, by name: of ``init``; None: random ones, or those of the checkpoint."""
    lora: LoraConfig | None = None
    """Of adapters upon these weights; None: the weights themselves are trained."""
    base: Mapping[str, str] | None = None
    """Where they lay and their checksum, for the ``base`` of state.json; None for random weights."""


def starting_point(
    config: TrainConfig,
    tokenizer_info: Mapping[str, Any],
    checkpoint: Path | None,
    saved: SavedState | None,
    warn: Callable[[str], Any],
) -> Start:
    """What a run starts from: random weights, ``init``, or, once it has checkpoints, what these need beside themselves.

    Args:
        config: of the run, its model complete.
        tokenizer_info: of the data.
        checkpoint: to continue from, and ``saved``, what it holds; None for a run that begins.
        warn: is told what cannot be compared.

    Raises:
        UserError: ``init`` cannot be read, or is of another model or tokenizer; a checkpoint is of other adapters than
            asked for, or what they were trained upon is not there any more.
    """
    lora = config.lora if config.lora.rank else None
    if checkpoint is not None and saved is not None:
        _check_same_adapters(config, saved.config.get("lora") or plain_lora(LoraConfig()), checkpoint)
        base = saved.state.get("base")
        return Start(None if lora is None or base is None else base_of_adapters(checkpoint, base), lora, base)
    if config.init is None:
        return Start()
    origin = find_origin(config.init, warn)
    if differences := _differences(origin.config, config.model):
        raise UserError(
            f"init: {origin.folder} holds another model: {'; '.join(differences)}. With init, leave the model out."
        )
    if (doubt := check_same_tokenizer(origin, tokenizer_info, config.data.sampled)) is not None:
        warn(doubt)
    weights = origin.weights()
    return Start(weights, lora, {"path": str(origin.folder.resolve()), "sha256": checksum(weights)})


def plain_lora(lora: LoraConfig) -> dict[str, Any]:
    """Settings of adapters as config.yaml has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in to_mapping(lora).items()}


def _check_same_adapters(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Adapters go on as they began: with another scale they would be another model at once."""
    differences = [
        f"lora.{key} is {saved.get(key)!r} there and {value!r} here"
        for key, value in plain(config)["lora"].items()
        if saved.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{checkpoint} was trained otherwise: {'; '.join(differences)}. "
            "Put the settings back, or give this run another folder (run: ...)."
        )


def train_config(values: Any, where: str) -> TrainConfig:
    """The settings of a run from a parsed mapping; with ``init``, what is not given of the model is taken from there.

    A run that has begun takes it from its own record (RUN/config.yaml): what it started from may be gone by then.

    Raises:
        UserError: as ``from_mapping``; ``init`` cannot be read, or holds another model than the one given.
    """
    if not isinstance(values, dict) or not isinstance(init := values.get("init"), (str, Path)):
        return from_mapping(TrainConfig, values, where)
    run = values.get("run")
    record = Path(run) / "config.yaml" if isinstance(run, (str, Path)) and str(run) else None
    if record is not None and record.is_file() and step_folders(record.parent / "checkpoints"):
        source, model = record, from_mapping(ModelConfig, read_yaml(record).get("model"), f"{record}: model")
    else:
        origin = find_origin(Path(init))
        source, model = origin.folder, origin.config
    return from_mapping(TrainConfig, values | {"model": _filled(values.get("model"), model, source, where)}, where)


def _filled(given: Any, model: ModelConfig, source: Path, where: str) -> dict[str, Any]:
    """The model of ``source`` with the ``bp_steps`` that are given, once all else that is given has been compared."""
    known = to_mapping(model)
    if given is None:
        return known
    if not isinstance(given, dict):
        raise UserError(f"{where}: model: expected keys and values, found {type(given).__name__}")
    given = {key: value for key, value in given.items() if key not in _OF_DATA or value not in (0, "0")}
    rest = dict(known)
    if given.get("architecture", known["architecture"]) != known["architecture"]:
        # The numbers of one recurrence mean nothing to another, and the difference to tell of is the recurrence.
        rest = {key: value for key, value in known.items() if key not in RECURRENCE[model.architecture]}
    for pair in _TOGETHER:
        if not pair.isdisjoint(given):
            rest = {key: value for key, value in rest.items() if key not in pair}
    ours = from_mapping(ModelConfig, rest | given, f"{where}: model")
    if differences := _differences(model, ours):
        raise UserError(
            f"{where}: model: {source} holds another model: {'; '.join(differences)}. "
            "Leave these keys out: with init, the model is that of the weights."
        )
    return known | {"bp_steps": ours.bp_steps if "bp_steps" in given else model.bp_steps}


_OF_DATA = ("vocab_size", "max_position_embeddings")
"""Where 0 is what the data says."""
_TOGETHER = ({"expansion", "inner_multiple"}, {"init", "init_std"})
"""Settings that say one thing between them: the inner width, the scale of the embedding."""


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """What two models differ in, whichever way their settings say it; K is a matter of training."""

    def facts(model: ModelConfig) -> dict[str, Any]:
        apart = {"bp_steps", *set().union(*_TOGETHER)}
        own = {key: value for key, value in to_mapping(model).items() if key not in apart}
        return own | {"intermediate_size": model.intermediate_size, "embedding_std": round(model.embedding_std, 9)}

    there, here = facts(theirs), facts(ours)
    return [f"{key} is {there[key]!r} there and {here[key]!r} here" for key in there if there[key] != here[key]]


def check_same_tokenizer(origin: Origin, info: Mapping[str, Any], sampled: Any) -> str | None:
    """Weights know the ids of one tokenizer: data made with another one would be noise to them.

    Files are compared by content. Where that of the data or of the weights is not there any more, what the data says of
    its tokenizer is all there is to compare: a warning comes back.

    Args:
        origin: the weights to start from.
        info: ``tokenizer_info`` of the sampled folder.
        sampled: the folder, to be named.

    Raises:
        UserError: the tokenizers differ.
    """
    ours, theirs = tokenizer_file(origin.tokenizer), tokenizer_file(Path(info.get("tokenizer_path") or "unnamed"))
    again = "Sample the data from records that were tokenised with it."
    if not ours.is_file() or not theirs.is_file():
        if int(info["vocab_size"]) > origin.config.vocab_size:
            raise UserError(
                f"{sampled} has ids up to {info['vocab_size']:,}, and {origin.folder} an embedding of "
                f"{origin.config.vocab_size:,}: the tokenizers differ. {again}"
            )
        absent = theirs if ours.is_file() else ours
        return f"{absent} is not there: whether {sampled} was made with the tokenizer of {origin.folder} is not certain"
    if sha256(ours) == sha256(theirs) or _parsed(ours) == _parsed(theirs):
        return None
    found, expected = tokenizer_info(theirs), tokenizer_info(ours)
    differences = [
        f"{key} is {found[key]!r}, there {expected[key]!r}"
        for key in expected
        if key != "tokenizer_path" and found[key] != expected[key]
    ]
    raise UserError(
        f"{sampled} was made with the tokenizer {theirs}, which is not that of the weights to start from, {ours}: "
        f"{'; '.join(differences) or 'the same text has other ids'}. {again}"
    )


def _parsed(file: Path) -> str:
    """The content of a tokenizer.json whatever its layout."""
    return json.dumps(read_json(file), sort_keys=True)
