"""The tokenizer: byte-level BPE with the released special tokens, in a folder that Transformers loads as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from hrm_text.contracts import UserError
from hrm_text.files import whole_folder, write_json

SPECIAL_TOKENS = (
    "<|PAD|>",
    "<|direct|>",
    "<|cot|>",
    "<|noisy|>",
    "<|synth|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""In the order of their ids, from 0. All are "special" to the library, so that no text need produce any of them."""

BOQ, EOQ, EOA = "<|im_start|>", "<|im_end|>", "<|box_end|>"
"""Begin of the question, end of the question, end of the answer."""

PADDING = "<|endoftext|>"
"""What the released tokenizer pads with; its <|PAD|> is not used, nor are <|direct|> to <|synth|>."""

CONDITION_TOKENS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}

_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or sign before it
        r"\p{N}",  # digits one by one: numbers of any length are spelt alike
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # spaces, but for the last one, which goes with the word that follows
        r"\s+",
    )
)
"""Where merges stop: the expression of GPT-4's tokenizer, but for single digits."""

PIECE_CHARACTERS = 1 << 16
"""Longest piece of a text that the trainer is fed."""


def train_tokenizer(texts: Iterator[str], vocab_size: int, out: Path) -> Path:
    """Train a tokenizer and write its folder; returns the folder.

    All 256 bytes are in the alphabet, so any text survives the round trip, up to NFC normalisation. The same texts in
    the same order give the same bytes on disk. Texts with too few different words give a smaller vocabulary than asked.

    Long texts are cut between words, for the library has every text that it is fed in memory several times over.

    Args:
        texts: read once, streamed. Memory grows with the different words in them: see docs/tokenizer.md.
        vocab_size: special tokens included.
        out: the folder; an older tokenizer there is replaced.

    Raises:
        UserError: the vocabulary is too small for special tokens and bytes, there is no text, or ``out`` holds
            something else.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"vocabulary of {vocab_size}: the {len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes take "
            f"{smallest}; ask for more than that, such as 4096"
        )
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    others = sorted(set(names) - {"tokenizer.json", "tokenizer_config.json"})
    if others:
        raise UserError(f"{out}: holds {others[0]}, which would be lost; choose another folder for the tokenizer")
    pieces = (piece for text in texts for piece in cut(text))
    first = next(pieces, None)
    if first is None:
        raise UserError("no text to train a tokenizer on: there was no usable record")

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chain([first], pieces), trainer)
    for index, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.token_to_id(token) == index, token

    with whole_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", transformers_config())
    return out


def cut(text: str, most: int = PIECE_CHARACTERS) -> Iterator[str]:
    """A text in pieces of at most ``most`` characters that join to it again, cut before spaces and line breaks if any.

    An empty text has no piece.
    """
    start = 0
    while len(text) - start > most:
        end = max(text.rfind(space, start + 1, start + most + 1) for space in (" ", "\n"))
        end = end if end > 0 else start + most
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def transformers_config() -> dict[str, Any]:
    """What Transformers' AutoTokenizer reads beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOQ,
        "eos_token": EOA,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json of a tokenizer folder; a path to a file stands for itself."""
    return path if path.is_file() else path / "tokenizer.json"


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer folder (or its tokenizer.json). Special tokens in text are read as plain text.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = tokenizer_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; a tokenizer folder is made by `hrm-text data tokenizer`")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{file}: not a readable tokenizer ({error})") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_info(path: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """What is to be known of a tokenizer folder to render prompts: the content of ``tokenizer_info.json``.

    Keys: tokenizer_path (absolute), boq, eoq, eoa, condition_mapping (tag to token), vocab_size (with special tokens).
    ``tokenizer`` is that of ``path``, where it has been opened before.

    Raises:
        UserError: the tokenizer is missing, or lacks a token that prompts are made with.
    """
    tokenizer = tokenizer or load_tokenizer(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lacking = [token for token in (BOQ, EOQ, EOA, *CONDITION_TOKENS.values()) if token not in vocabulary]
    if lacking:
        raise UserError(f"{path}: the tokenizer lacks {', '.join(lacking)}, which prompts are made with")
    return {
        "tokenizer_path": str(path.resolve()),
        "boq": BOQ,
        "eoq": EOQ,
        "eoa": EOA,
        "condition_mapping": dict(CONDITION_TOKENS),
        "vocab_size": max(vocabulary.values()) + 1,
    }


def run_tokenizer(info: Mapping[str, Any], given: Path | None = None) -> Path:
    """The folder of the tokenizer a run was trained with: where it was then, or the one that is ``given``.

    ``info`` is what the run kept of its ``tokenizer_info``.

    Raises:
        UserError: it is not there, or not that tokenizer.
    """
    folder = given or Path(info["tokenizer_path"])
    if not tokenizer_file(folder).is_file():
        raise UserError(
            f"{folder}: the run's tokenizer is not there; name its folder with --tokenizer (tokenizer= in Python)"
        )
    found = tokenizer_info(folder)
    differences = [
        f"{key} is {found[key]!r}, in the run {info[key]!r}"
        for key in ("vocab_size", "boq", "eoq", "eoa")
        if found[key] != info[key]
    ]
    for tag, token in info["condition_mapping"].items():
        if found["condition_mapping"].get(tag) != token:
            differences.append(f"tag {tag!r} is {found['condition_mapping'].get(tag)!r}, in the run {token!r}")
    if differences:
        raise UserError(f"{folder}: not the tokenizer that the run was trained with: {'; '.join(differences)}")
    return folder
