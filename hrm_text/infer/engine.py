"""The engine: a weights folder in, answers out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, run_tokenizer, tokenizer_info
from hrm_text.infer.cache import KeyValueCache
from hrm_text.infer.sampling import Sampler, Sampling
from hrm_text.model.attention import Spans
from hrm_text.model.checkpoint_files import find_checkpoint, load_state, step_folders
from hrm_text.model.config import ModelConfig
from hrm_text.model.origin import model_tensors
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.model.weights import empty, parse_dtype, read_model


class TextModel:
    """A model with its tokenizer: logits of ids, and responses to prompts (the ``Engine`` of the contracts)."""

    def __init__(self, module: RecurrentLM, prompt_format: PromptFormat, batch_size: int = 128) -> None:
        self.module = module.eval()
        self.prompt_format = prompt_format
        self.batch_size = batch_size

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.module.config

    def logits(self, input_ids: Tensor, prefix_lengths: Tensor) -> Tensor:
        """fp32 logits [B, T, V] of LongTensor ids [B, T]; prefix_lengths [B]: tokens seen both ways, 0 is causal."""
        return self.module.logits(input_ids, prefix_lengths)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The response to each prompt, up to the end token, ``max_new_tokens`` or the end of the context.

        Raises UserError for an unknown condition tag, or a prompt that leaves no room in the context.
        """
        ids: list[list[int]] = [[] for _ in prompts]
        for index, token in self._tokens(prompts, condition, max_new_tokens, Sampling(temperature, top_p, seed)):
            ids[index].append(token)
        return [self.prompt_format.decode(response) for response in ids]

    def stream(
        self,
        prompt: str,
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The response to one prompt in pieces as they are made; a piece never ends within a character."""
        waiting: list[int] = []  # tokens whose bytes do not yet end a character
        for _, token in self._tokens([prompt], condition, max_new_tokens, Sampling(temperature, top_p, seed)):
            waiting.append(token)
            text = self.prompt_format.decode(waiting)
            if not text.endswith("\ufffd"):  # bytes of an unfinished character decode to this mark
                yield text
                waiting = []
        yield self.prompt_format.decode(waiting)

    def _tokens(
        self, prompts: Sequence[str], condition: str, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """(prompt number, token id) as they are chosen; end tokens are left out."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of texts, found one text; write [text]")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        context = self.config.max_position_embeddings
        encoded = [self.prompt_format.prefix_ids(condition, prompt) for prompt in prompts]
        for number, ids in enumerate(encoded):
            if len(ids) >= context:
                raise UserError(
                    f"prompt {number + 1} has {len(ids)} tokens with its condition and the context is {context}: "
                    "no room for a response. Shorten the prompt."
                )
        sampler = Sampler(sampling, len(prompts))
        # Prompts of similar length share a batch, so that none waits long for a neighbour.
        order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
        for start in range(0, len(order), self.batch_size):
            yield from self._batch(order[start : start + self.batch_size], encoded, max_new_tokens, sampler)

    @torch.inference_mode()
    def _batch(
        self, requests: list[int], encoded: list[list[int]], max_new_tokens: int, sampler: Sampler
    ) -> Iterator[tuple[int, int]]:
        """Prefill one batch in one packed pass, then decode it token by token."""
        weight = self.module.lm_head.weight
        device = weight.device
        lengths = torch.tensor([len(encoded[request]) for request in requests])
        context = self.config.max_position_embeddings
        capacity = min(int(lengths.max()) + max_new_tokens, context)
        cache = KeyValueCache(self.config, len(requests), capacity, device, weight.dtype)
        prefixes = lengths if self.config.prefix_lm else torch.zeros_like(lengths)
        spans = Spans.of_samples(lengths, prefixes)
        ids_T = torch.tensor([token for request in requests for token in encoded[request]], device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
        hidden_TD = self.module(ids_T, positions_T, cache.prefill(spans))
        hidden_BD = hidden_TD[spans.starts[1:].to(device) - 1]
        made = 0
        while requests:
            chosen = sampler.choose(self.module.lm_head(hidden_BD).float(), requests)
            made += 1
            going = []
            for row, (request, token) in enumerate(zip(requests, chosen, strict=True)):
                if token == self.prompt_format.eoa_id:
                    continue
                yield request, token
                # Prompt and response together are at most as long as the context.
                if made < max_new_tokens and len(encoded[request]) + made < context:
                    going.append(row)
            if len(going) < len(requests):
                cache.keep(torch.tensor(going, dtype=torch.long, device=device))
                requests = [requests[row] for row in going]
                chosen = [chosen[row] for row in going]
            if requests:
                positions_B = cache.lengths_B
                hidden_BD = self.module(torch.tensor(chosen, device=device), positions_B, cache.decode())


def load(
    folder: str | Path, *, device: str = "cpu", dtype: str = "float32", tokenizer: str | Path | None = None
) -> TextModel:
    """The model in a folder, with its tokenizer.

    Args:
        folder: of weights, ours or written by Transformers; or of a training run, or one of its checkpoints: then the
            averaged weights of the newest good one, however many ranks wrote it.
        device: to compute on.
        dtype: to compute in.
        tokenizer: its folder, in case it is not where the run had it, nor with the weights.
    """
    folder, element = Path(folder), parse_dtype(dtype)
    given = None if tokenizer is None else Path(tokenizer)
    if is_checkpoint(folder):
        checkpoint = find_checkpoint(folder, warnings.warn)
        config, tensors = model_tensors(checkpoint)
        module = empty(config)
        module.load_state_dict({name: tensor.to(device, element) for name, tensor in tensors.items()}, assign=True)
        module.requires_grad_(False)
        given = run_tokenizer(load_state(checkpoint).state["tokenizer_info"], given)
    else:
        module = read_model(folder, device=device, dtype=element)
    place = given or folder
    return TextModel(module, PromptFormat(load_tokenizer(place), tokenizer_info(place)))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is of a training run, or of checkpoints, or one of these."""
    return (folder / "manifest.json").is_file() or any(step_folders(root) for root in (folder / "checkpoints", folder))
