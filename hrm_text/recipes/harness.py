"""A model of ours under lm-evaluation-harness: `lm_eval --model hrm_text --model_args path=WEIGHTS_DIR --tasks ...`.

The entry point ``lm_eval.models`` of the package names ``HarnessModel``; the harness reads it from the first release
after 0.4.13 on. Before, `python -m hrm_text.recipes.harness ARGUMENTS` is the same command line with our model known.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hrm_text.contracts import UserError
from hrm_text.eval.harness import keep_end, read_condition, read_generation, response_of, windows
from hrm_text.files import sha256
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.likelihood import Likelihood, likelihoods
from hrm_text.infer.requests import KeyValues, Request, Sampling, Turn
from hrm_text.infer.text_model import Quantize, load, stream_seed

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from tqdm import tqdm
except ImportError as lack:
    raise UserError(
        f'lm-evaluation-harness needs the extra harness: pip install "hrm-text[harness]" ({lack})'
    ) from None

NAME = "hrm_text"
ENTRY_POINT = "hrm_text.recipes.harness:HarnessModel"

MAX_BATCH = 64
"""Texts that take a step together: the batch size ``auto``."""

logger = logging.getLogger("lm_eval.models.hrm_text")  # below the harness's own, so that its settings hold


class HarnessModel(LM):
    """Answers the harness's three kinds of request; docs/evaluation.md says what each is for a PrefixLM.

    A prompt is the context, to the character, under a condition. A continuation is a response.
    """

    def __init__(
        self,
        path: str,
        *,
        condition: str | None = None,
        end: bool = False,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        quantize: Quantize = "none",
        kv_cache: KeyValues = "auto",
        h_cycles: int | None = None,
        l_cycles: int | None = None,
        seed: int = 0,
    ) -> None:
        """Load the model.

        Args:
            path: of a weights folder, a training run or a checkpoint.
            condition: tags, joined by + (``synth+cot``); None: the folder's own.
            end: whether the end token is part of a continuation that is scored: then its likelihood is that of saying
                this and no more.
            batch_size: texts that take a decoding step together. 1 is what the harness passes where nothing was said,
                and would only be slower: it means auto, as 64 do.
            max_batch_size: the most that auto takes.
            max_gen_toks: longest response of tasks that set none.
            device: None: a GPU if there is one. The harness passes cuda:0 where nothing was said, so without a GPU that
                is the CPU.
            dtype: to compute in; log-probabilities are taken in fp32.
            tokenizer: see ``text_model.load``, also for quantize, kv_cache, h_cycles and l_cycles.
            quantize: how the weights of the blocks are kept.
            kv_cache: how keys and values are kept while text is made.
            h_cycles: rounds of the recurrence.
            l_cycles: fast calls in each of them.
            seed: of sampled responses.

        Raises:
            UserError: an unknown condition, a batch size below 1; what ``load`` raises.
        """
        super().__init__()
        device = choose_device(device)
        self.model = load(
            path, device=device, dtype=dtype, tokenizer=tokenizer, quantize=quantize, kv_cache=kv_cache,
            h_cycles=h_cycles, l_cycles=l_cycles,
        )  # fmt: skip
        self.condition = self.model.default_condition if condition is None else read_condition(condition)
        self.end, self.max_gen_toks, self.seed = end, max_gen_toks, seed
        self._path, self._dtype, self._device = Path(path), dtype, torch.device(device)
        self._max_batch = read_batch_size(batch_size, max_batch_size)
        self._engine: DecodingEngine | None = None
        self._head = 1 + len(self.model.prompt_format.condition_ids(self.condition))

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.config.max_position_embeddings

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the arguments."""
        weights = self._path / "model.safetensors"
        return {
            "model_num_parameters": sum(weight.numel() for weight in self.model.module.parameters()),
            "model_dtype": self._dtype,
            "model_sha256": sha256(weights) if weights.is_file() else None,
            "condition": self.condition,
            "end_token_scored": self.end,
        }

    # ------------------------------------------------------------------------------------------------ likelihoods ---

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding says it) of each continuation, given its context as the prompt."""
        prefixes = self._prefixes([request.args[0] for request in requests])
        responses = self._responses([response_of(request.args[1]) for request in requests])
        prompts = self._cut(prefixes, [len(response) for response in responses])
        turns = [Turn(prompt, tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(turns)
        for number, each in self._likelihoods(turns, "loglikelihood", disable_tqdm):
            found[number] = (each.logprob, each.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[number].args, found[number])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text: said to an empty prompt, and in windows where it is longer than the context.

        Neither an empty prompt nor one that its response goes on from is what the model has learnt.
        """
        texts = self.model.prompt_format.response_ids_batch([request.args[0] for request in requests])
        empty = self._prefixes([""])[0]
        turns, owners = [], []
        for owner, (*ids, _) in enumerate(texts):  # without the end token: the text may go on
            for seen, start, end in windows(len(ids), self.max_length - len(empty)):
                turns.append(Turn((*empty[:-1], *ids[seen:start], empty[-1]), tuple(ids[start:end])))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for number, each in self._likelihoods(turns, "loglikelihood_rolling", disable_tqdm):
            totals[owners[number]] += each.logprob
        return totals

    def _likelihoods(self, turns: Sequence[Turn], title: str, quiet: bool) -> Iterable[tuple[int, Likelihood]]:
        bar: Iterable[tuple[int, Likelihood]] = tqdm(
            likelihoods(self.model, turns), total=len(turns), desc=title, disable=quiet
        )
        return bar

    def _prefixes(self, contexts: Sequence[str]) -> list[list[int]]:
        return self.model.prompt_format.prefix_ids_batch([self.condition] * len(contexts), contexts)

    def _responses(self, texts: Sequence[str]) -> list[list[int]]:
        responses = self.model.prompt_format.response_ids_batch(texts)
        return responses if self.end else [ids[:-1] for ids in responses]

    def _cut(self, prefixes: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[tuple[int, ...]]:
        """The prompts, cut where one does not leave its response so many tokens of room."""
        kept = [
            keep_end(prefix, self._head, self.max_length - room) for prefix, room in zip(prefixes, rooms, strict=True)
        ]
        if cut := sum(len(whole) > len(rest) for whole, rest in zip(prefixes, kept, strict=True)):
            logger.warning(
                "%d of %d prompts leave no room for their response in the context of %d: their beginning is left out",
                cut,
                len(kept),
                self.max_length,
            )
        return kept

    # ----------------------------------------------------------------------------------------------------- texts ---

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response to each context, up to the end token, one of the texts ``until``, or the longest length."""
        wanted = [read_generation(request.args[1], self.max_gen_toks) for request in requests]
        prefixes = self._prefixes([request.args[0] for request in requests])
        # A prompt makes room for its response, but never more than half of the context.
        rooms = [min(each.max_new_tokens, self.max_length // 2) for each in wanted]
        prompts = self._cut(prefixes, rooms)
        asked = [
            Request(
                (Turn(prompt),),
                each.max_new_tokens,
                Sampling(**each.sampling, seed=stream_seed(self.seed, number)),  # type: ignore[arg-type]
                each.until,
            )
            for number, (prompt, each) in enumerate(zip(prompts, wanted, strict=True))
        ]
        if self._engine is None:
            self._engine = self.model.engine(max_batch=self._max_batch, kv_cache=self.model.kv_cache)
        engine, texts = self._engine, [""] * len(asked)
        # Those of one length are computed together, and a prompt that is asked again finds its keys and values there.
        order = sorted((len(kept), kept, number) for number, kept in enumerate(prompts))
        numbers = {engine.submit(asked[number]): number for *_, number in order}
        with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm) as bar:
            while engine.has_work:
                for piece in engine.step():
                    number = numbers[piece.request]
                    texts[number] += piece.text
                    if piece.finish_reason is not None:
                        self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                        bar.update()
        return texts


def choose_device(asked: str | None) -> str:
    """The device to compute on; a GPU that is not there is told of, for it may have been asked for."""
    if torch.cuda.is_available():
        return asked or "cuda"
    if asked is not None and asked.startswith("cuda"):
        logger.warning("there is no GPU: %s becomes cpu", asked)
        return "cpu"
    return asked or "cpu"


def read_batch_size(batch_size: int | str, most: int | None) -> int:
    """Texts in a batch: a number, or ``auto``; the harness's ``auto:4`` measures sizes anew and is auto here.

    Raises:
        UserError: neither.
    """
    text = str(batch_size)
    if text == "1" or text.partition(":")[0] == "auto":
        return min(MAX_BATCH, most or MAX_BATCH)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size must be auto or a number from 1 on, found {batch_size!r}")
    return int(text)


def register() -> None:
    """Make the model known to a harness that does not look for entry points; to any other it changes nothing."""
    import lm_eval.models  # noqa: F401  fills the registry with the harness's own, which it does only while it is empty

    if NAME not in model_registry:
        model_registry.register(NAME, target=ENTRY_POINT)


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's command line, with our model known."""
    from lm_eval.__main__ import cli_evaluate

    register()
    if arguments is not None:
        sys.argv[1:] = arguments
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
