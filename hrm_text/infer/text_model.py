"""A weights folder in, answers out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat, parse_condition
from hrm_text.data.tokenizer import load_tokenizer, run_tokenizer, tokenizer_info
from hrm_text.files import read_json
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.lane import with_cycles
from hrm_text.infer.requests import KeyValues, Piece, Request, Sampling, Turn
from hrm_text.model.checkpoint_files import find_checkpoint, load_state, step_folders
from hrm_text.model.config import ModelConfig
from hrm_text.model.origin import model_tensors
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.model.weights import empty, parse_dtype, read_model

Quantize = Literal["none", "int8"]
"""How the weights of the blocks are kept."""


class TextModel:
    """A model with its tokenizer: logits of ids, and responses to prompts (the ``Engine`` of the contracts)."""

    def __init__(
        self,
        module: RecurrentLM,
        prompt_format: PromptFormat,
        batch_size: int = 128,
        default_condition: str = "direct",
        kv_cache: KeyValues = "auto",
    ) -> None:
        self.module = module.eval()
        self.prompt_format = prompt_format
        self.batch_size = batch_size
        self.default_condition = default_condition
        self.kv_cache = kv_cache
        self._engine: DecodingEngine | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.module.config

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer; the model's own are rounded up, and those beyond mean nothing."""
        return min(self.prompt_format.vocab_size, self.config.vocab_size)

    def logits(self, input_ids: Tensor, prefix_lengths: Tensor) -> Tensor:
        """fp32 logits [B, T, V] of LongTensor ids [B, T]; prefix_lengths [B]: tokens seen both ways, 0 is causal."""
        return self.module.logits(input_ids, prefix_lengths)

    def engine(self, **options: Any) -> DecodingEngine:
        """An engine of one's own for this model; the options are those of ``DecodingEngine``."""
        return DecodingEngine(self, **options)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_progress: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """The response to each prompt, up to the end token, a stop text, ``max_new_tokens`` or the context's end.

        ``sampling`` takes the other fields of ``Sampling``, such as top_k; ``on_progress`` is called with the responses
        that are complete, and their number in all.

        Raises UserError for an unknown condition tag, or a prompt that leaves no room in the context.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of texts, found one text; write [text]")
        texts, ended = [""] * len(prompts), 0
        options = {"temperature": temperature, "top_p": top_p, **sampling}
        for index, piece in self._pieces(prompts, condition, max_new_tokens, seed, stop, options):
            texts[index] += piece.text
            if piece.finish_reason is not None and on_progress is not None:
                ended += 1
                on_progress(ended, len(prompts))
        return texts

    def stream(
        self,
        prompt: str,
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """The response to one prompt in pieces as they are made; a piece never ends within a character."""
        options = {"temperature": temperature, "top_p": top_p, **sampling}
        for _, piece in self._pieces([prompt], condition, max_new_tokens, seed, stop, options):
            if piece.text:
                yield piece.text

    def _pieces(
        self,
        prompts: Sequence[str],
        condition: str,
        max_new_tokens: int,
        seed: int,
        stop: Sequence[str],
        sampling: Mapping[str, Any],
    ) -> Iterator[tuple[int, Piece]]:
        """(prompt number, news of its response) as they come."""
        prefixes = self.prompt_format.prefix_ids_batch([condition] * len(prompts), prompts)
        context = self.config.max_position_embeddings
        for number, ids in enumerate(prefixes):
            if len(ids) >= context:
                raise UserError(
                    f"prompt {number + 1} has {len(ids)} tokens with its condition and the context is {context}: "
                    "no room for a response. Shorten the prompt."
                )
        if self._engine is None or self._engine.max_batch != self.batch_size:
            self._engine = None  # its memory is free before the next one asks how much there is
            self._engine = self.engine(max_batch=self.batch_size, kv_cache=self.kv_cache)
        engine = self._engine
        # Prompts of similar length are computed together, so that none is padded for a neighbour.
        order = sorted(range(len(prompts)), key=lambda number: len(prefixes[number]))
        numbers = {}
        try:
            for index in order:
                request = Request(
                    (Turn(tuple(prefixes[index])),),
                    max_new_tokens,
                    Sampling(seed=stream_seed(seed, index), **sampling),
                    tuple(stop),
                )
                numbers[engine.submit(request)] = index
            while engine.has_work:
                for piece in engine.step():
                    if piece.request in numbers:
                        yield numbers[piece.request], piece
        finally:  # whoever stops reading leaves nothing behind
            for number in numbers:
                engine.cancel(number)
            engine.pages.forget_all()  # before the next call somebody may have trained the weights


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tokenizer: str | Path | None = None,
    quantize: Quantize = "none",
    kv_cache: KeyValues = "auto",
    h_cycles: int | None = None,
    l_cycles: int | None = None,
) -> TextModel:
    """The model in a folder, with its tokenizer.

    Args:
        folder: of weights, ours or written by Transformers; or of a training run, or one of its checkpoints: then the
            averaged weights of the newest good one, however many ranks wrote it.
        device: to compute on.
        dtype: to compute in.
        tokenizer: its folder, in case it is not where the run had it, nor with the weights.
        quantize: int8 keeps the weights of the blocks in 8 bits, with a scale for each row: a quarter or half of the
            memory, and as much faster as they are read faster.
        kv_cache: of ``generate``: auto keeps keys and values in ``dtype``, int8 with a scale for each token and head.
        h_cycles: rounds of the recurrence (hrm, trm); None: as many as in training.
        l_cycles: fast calls in each of them; None: as many as in training.
    """
    folder, element = Path(folder), parse_dtype(dtype)
    given = None if tokenizer is None else Path(tokenizer)
    condition = "direct"
    if is_checkpoint(folder):
        checkpoint = find_checkpoint(folder, warnings.warn)
        config, tensors = model_tensors(checkpoint)
        module = empty(config)
        module.load_state_dict({name: tensor.to(device, element) for name, tensor in tensors.items()}, assign=True)
        module.requires_grad_(False)
        given = run_tokenizer(load_state(checkpoint).state["tokenizer_info"], given)
    else:
        module = read_model(folder, device=device, dtype=element)
        condition = default_condition(folder)
    match quantize:
        case "none":
            pass
        case "int8":
            quantize_weights(module)
        case _:
            raise UserError(f"quantize: unknown {quantize!r}; choose from none, int8")
    if h_cycles is not None or l_cycles is not None:
        set_cycles(module, h_cycles, l_cycles)
    place = given or folder
    prompt_format = PromptFormat(load_tokenizer(place), tokenizer_info(place))
    return TextModel(module, prompt_format, default_condition=condition, kv_cache=kv_cache)


def set_cycles(module: RecurrentLM, h_cycles: int | None, l_cycles: int | None) -> None:
    """Turn the dial of a model: other rounds of its recurrence over the same weights.

    Raises:
        UserError: its architecture has no such cycles, or a number below 1.
    """
    config = module.config
    if not config.H_cycles:
        raise UserError(f"h_cycles and l_cycles mean nothing to architecture {config.architecture!r}")
    chosen = (config.H_cycles if h_cycles is None else h_cycles, config.L_cycles if l_cycles is None else l_cycles)
    if min(chosen) < 1:
        raise UserError(f"h_cycles and l_cycles must be at least 1, found {chosen[0]} and {chosen[1]}")
    module.config = module.model.config = with_cycles(config, *chosen)


def stream_seed(seed: int, request: int) -> int:
    """A seed for each of several requests, that differs with the seed of all and with the request's number."""
    return int.from_bytes(hashlib.sha256(f"{seed} {request}".encode()).digest()[:8], "little")


def default_condition(folder: Path) -> str:
    """The condition that a weights folder asks for: ``condition`` of its generation_config.json, or direct.

    Raises:
        UserError: it names an unknown tag.
    """
    file = folder / "generation_config.json"
    condition = read_json(file).get("condition", "direct") if file.is_file() else "direct"
    if not isinstance(condition, str):
        raise UserError(f"{file}: condition must be a text such as 'synth,cot', found {condition!r}")
    parse_condition(condition)
    return condition


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is of a training run, or of checkpoints, or one of these."""
    return (folder / "manifest.json").is_file() or any(step_folders(root) for root in (folder / "checkpoints", folder))
