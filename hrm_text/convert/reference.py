"""Import of the reference trainer's checkpoints: a folder in torch DCP format, its configuration beside it.

    <run>/all_config.yaml, <run>/train_metadata.yaml
    <run>/fsdp2_epoch_<n>/.metadata, __<rank>_<part>.distcp

The model lies under ``model.``, the optimiser under ``optim.``; among its state each parameter has its moving average,
``param_ema``. The sizes are read off the tensors, what tensors cannot tell off the configuration.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from hrm_text.contracts import UserError
from hrm_text.convert.card import Card
from hrm_text.convert.huggingface import check_vocabulary, write_folder
from hrm_text.data.tokenizer import tokenizer_info
from hrm_text.model.config import ModelConfig
from hrm_text.model.weights import check_shapes, empty, inner_width, parse_dtype
from hrm_text.settings import from_mapping, read_yaml

HEAD_DIM = 128
"""Width of a head in every model of the paper."""

RENAMED = (
    (re.compile(r"model\.embed_tokens\.embedding_weight"), "model.embed_tokens.weight"),
    (re.compile(r"model\.lm_head\.weight"), "lm_head.weight"),
    (re.compile(r"model\.model\.zL_init"), "model.z_L_init"),
    (re.compile(r"model\.model\.([HL])_level\.core\.layers\.(\d+)\.(.+)"), r"model.\1_module.layers.\2.\3"),
)
"""Names in the checkpoint and in the weights folder."""

WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
"""What torch.compile and wrappers of modules put into names."""

TABLES = re.compile(r"(^|\.)(rotary\w*|rope\w*|inv_freq|cos_cached|sin_cached)(\.|$)")
"""Buffers that are computed from the configuration and carry no training."""


def import_reference(
    checkpoint: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    raw: bool = False,
    dtype: str = "bfloat16",
    name: str | None = None,
    warn: Callable[[str], Any] = warnings.warn,
) -> Path:
    """Write the weights folder of a reference training checkpoint; returns ``out``.

    Args:
        checkpoint: a ``fsdp2_epoch_<n>`` folder, or the folder that holds them: then the newest.
        out: replaced if it is a weights folder already, refused if it holds anything else.
        tokenizer: folder of the tokenizer it was trained with; without it the folder answers no prompts.
        raw: the weights of the last step in the place of their moving average.
        dtype: of the stored weights; the reference trainer computes in bfloat16.
        name: title of the card; None is the name of ``out``.
        warn: is told what had to be assumed.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or its tensors are not those of an HRM.
    """
    folder = find_epoch(checkpoint)
    reader = SafeReader(folder)
    shapes = reader.shapes()
    sources = {renamed(key): key for key in shapes if key.startswith("model.") and not TABLES.search(key)}
    settings = {
        **read_settings(folder.parent / "train_metadata.yaml"),
        **read_settings(folder.parent / "all_config.yaml"),
    }
    config = deduced_config({name: shapes[key] for name, key in sources.items()}, settings, folder, warn)
    expected = {name: tuple(tensor.shape) for name, tensor in empty(config).state_dict().items()}
    check_shapes(expected, {name: shapes[key] for name, key in sources.items()}, folder)
    if not raw:
        sources = averaged(sources, shapes, folder)
        check_shapes(expected, {name: shapes[key] for name, key in sources.items()}, folder)
    if tokenizer is not None:
        check_vocabulary(tokenizer_info(tokenizer)["vocab_size"], config, tokenizer)
    element = parse_dtype(dtype)
    tensors = reader.tensors(sources)
    card = Card(
        name=name or out.resolve().name,
        config=config,
        dtype=dtype,
        weights="raw weights of the last step" if raw else "moving average of the weights",
        origin=f"Imported by hrm-text from a checkpoint of the reference trainer, {folder.name}.",
        has_tokenizer=tokenizer is not None,
    )
    return write_folder(out, config, tensors, element, tokenizer, card)


def find_epoch(path: Path) -> Path:
    """The DCP folder that a path means: itself, or the newest epoch in it."""
    if (path / ".metadata").is_file():
        return path
    epochs = [p for p in path.glob("fsdp2_epoch_*") if re.fullmatch(r"fsdp2_epoch_\d+", p.name)]
    whole = [p for p in epochs if (p / ".metadata").is_file()]
    if not whole:
        what = (
            "no such folder" if not path.exists() else f"no .metadata in {path.name} or in its fsdp2_epoch_<n> folders"
        )
        raise UserError(f"{path}: {what}; expected a checkpoint of the reference trainer (torch DCP, fsdp2_epoch_<n>/)")
    return max(whole, key=lambda p: int(p.name.rpartition("_")[2]))


# --------------------------------------------------------------------------------------------- reading without code --


class SafeUnpickler(pickle.Unpickler):
    """Reads DCP's ``.metadata``, which is a pickle, without running what a stranger may have put into it.

    A pickle does harm through the callables it names. Here it may name the classes of the index alone, none of which
    does more than hold values; any other name is refused before anything is called.
    """

    _allowed: ClassVar[dict[tuple[str, str], Any]] = {
        **{
            (metadata.__name__, name): getattr(metadata, name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "ChunkStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        },
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        **{
            (room, name): PurePosixPath
            for room in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "PurePosixPath")
        },
        ("collections", "OrderedDict"): dict,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): lambda name: torch.strided,
        # Python before 3.11.4 pickles a member of an enumeration as getattr(class, name).
        ("builtins", "getattr"): lambda owner, name: metadata._MEM_FORMAT_ENCODING[name],
    }

    def find_class(self, module: str, name: str) -> Any:
        """The object of an allowed name."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which an index of tensors has no use for")
        return self._allowed[module, name]


class SafeReader(filesystem.FileSystemReader):
    """Reads the tensors of a DCP folder on one CPU, without a process group and without running foreign code.

    The index goes through ``SafeUnpickler``; the shards are torch.save files, which the base class loads with
    ``weights_only``; values that are not tensors are full pickles, and are never asked for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        try:
            with (folder / ".metadata").open("rb") as file:
                self._index = SafeUnpickler(file).load()
            if not isinstance(self._index, metadata.Metadata):
                raise pickle.UnpicklingError(f"it holds {type(self._index).__name__}")
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{folder / '.metadata'}: not an index of a torch DCP checkpoint ({error})") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index, already read."""
        if self._index.storage_meta is None:
            self._index.storage_meta = metadata.StorageMeta()
        return self._index

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor."""
        entries = self._index.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)}

    def tensors(self, sources: Mapping[str, str]) -> dict[str, Tensor]:
        """Name -> fp32 tensor, from name -> key."""
        entries = self._index.state_dict_metadata
        state = {key: torch.empty(entries[key].size, dtype=entries[key].properties.dtype) for key in sources.values()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that there is one process: there is
                load(state, storage_reader=self, no_dist=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, CheckpointException, EOFError, KeyError) as error:
            first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise UserError(f"{self.folder}: its shards cannot be read ({first}); copy the checkpoint again") from None
        return {name: state[key].float() for name, key in sources.items()}


# -------------------------------------------------------------------------------------------------- names and sizes --


def renamed(key: str) -> str:
    """The weights folder's name of a model tensor; a name that is not known stays as it is, to be reported."""
    plain = WRAPPERS.sub("", key)
    for pattern, name in RENAMED:
        if match := pattern.fullmatch(plain):
            return match.expand(name)
    return plain


def averaged(sources: Mapping[str, str], shapes: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Name -> key of the moving average, matched by the parameter's name within the optimiser's keys.

    The frozen initial state is no parameter: without an average of its own it stays as it is.
    """
    averages: dict[str, str] = {}
    for key in shapes:
        parts = key.split(".")
        if "param_ema" in parts:
            averages[WRAPPERS.sub("", ".".join(part for part in parts if part != "param_ema"))] = key
    found: dict[str, str] = {}
    for name, key in sources.items():
        parameter = WRAPPERS.sub("", key).removeprefix("model.")
        # "optim.state.<parameter>" as a rule; whatever stands before the parameter's name does not matter.
        matches = [k for plain, k in averages.items() if plain == parameter or plain.endswith(f".{parameter}")]
        if len(matches) == 1:
            found[name] = matches[0]
        elif name == "model.z_L_init" and not matches:
            found[name] = key
    lacking = sorted(sources.keys() - found.keys())
    if lacking:
        optimiser = [key for key in shapes if not key.startswith("model.")]
        seen = (
            f"its {len(averages)} keys with param_ema are like {next(iter(averages.values()))}"
            if averages
            else (
                f"no key has param_ema; keys outside the model are like {optimiser[0]}"
                if optimiser
                else "it has no optimiser"
            )
        )
        raise UserError(
            f"{folder}: no moving average was found for {len(lacking)} of {len(sources)} tensors, such as "
            f"{sources[lacking[0]]} ({seen}). --raw imports the weights of the last step."
        )
    return found


def deduced_config(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], folder: Path, warn: Callable[[str], Any]
) -> ModelConfig:
    """The model that has tensors of these shapes, with what they cannot tell from the reference's configuration."""
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.H_module\.layers\.(\d+)\.", name))}
    first = "model.H_module.layers.0"
    try:
        vocab_size, width = shapes["model.embed_tokens.weight"]
        attention_size = shapes[f"{first}.attn.gqkv_proj.weight"][0] // 4
        intermediate_size = shapes[f"{first}.mlp.down_proj.weight"][1]
    except (KeyError, ValueError) as error:
        known = sorted(shapes)[0] if shapes else "nothing"
        raise UserError(f"{folder}: not an HRM of the reference trainer, {error} is missing (found {known})") from None

    def setting(default: Any, *keys: str) -> Any:
        """The value under the first of these keys that is anywhere in the configuration."""
        for key in keys:
            values = {repr(value): value for value in find_key(settings, key) if value is not None}
            if len(values) > 1:
                raise UserError(f"{folder.parent}: {key} has several values: {', '.join(values)}; keep one of them")
            if values:
                return next(iter(values.values()))
        return default

    heads = setting(None, "num_heads", "num_attention_heads", "n_heads")
    head_dim = setting(None, "head_dim") or (attention_size // heads if heads else min(HEAD_DIM, attention_size))
    h_cycles, l_cycles = setting(None, "H_cycles"), setting(None, "L_cycles")
    context = setting(None, "max_position_embeddings")
    if context is None and (longest := setting(None, "max_seq_len")) is not None:
        context = longest - 1  # a sample's last token is only ever a label
    assumed = {"H_cycles": (h_cycles, 2), "L_cycles": (l_cycles, 3), "max_position_embeddings": (context, 4096)}
    for key, (value, default) in assumed.items():
        if value is None:
            warn(f"{folder.parent}: no {key} in all_config.yaml or train_metadata.yaml; assuming {default}")
    values = {
        "vocab_size": vocab_size,
        "max_position_embeddings": context or 4096,
        "hidden_size": width,
        "num_layers": 2 * len(layers),
        "num_heads": attention_size // head_dim,
        "head_dim": head_dim,
        "H_cycles": h_cycles or 2,
        "L_cycles": l_cycles or 3,
        "bp_steps": min(5, (h_cycles or 2) * ((l_cycles or 3) + 1)),
        "rope_theta": setting(10_000.0, "rope_theta"),
        "norm_eps": setting(1e-6, "norm_eps", "rms_norm_eps"),
        **inner_width(intermediate_size, width),
    }
    return from_mapping(ModelConfig, values, f"{folder.parent / 'all_config.yaml'}")


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a YAML file that may be missing, under its name so that no key hides another's."""
    return {path.name: read_yaml(path)} if path.is_file() else {}


def find_key(values: Any, key: str) -> Iterator[Any]:
    """Every value under ``key``, at any depth."""
    if isinstance(values, Mapping):
        for name, inner in values.items():
            if name == key:
                yield inner
            else:
                yield from find_key(inner, key)
    elif isinstance(values, list):
        for inner in values:
            yield from find_key(inner, key)
