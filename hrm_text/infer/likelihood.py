"""How likely a model finds responses that are given: many in one pass, each prompt computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.infer.answering import Answering
from hrm_text.infer.requests import Turn
from hrm_text.model.attention import Spans
from hrm_text.model.kernels import packed_attention

# T packed tokens, L response tokens of one prompt, C tokens they may see, R scored places, N heads, H head width

PASS_TOKENS = 8192
"""Tokens in one pass: about what fills a GPU."""

LOGIT_ROWS = 512
"""Places whose logits are there at a time: of 65,536 entries 128 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of a response to a prompt."""

    logprob: float
    """Natural logarithm of its probability, the tokens before each one given; 0 of no tokens."""
    greedy: bool
    """Whether greedy decoding says it: each token is the likeliest at its place, of equals the lowest id."""


@dataclass(frozen=True)
class Group:
    """Responses to one prompt, which is computed once: in PrefixLM it sees nothing of what follows."""

    prefix_ids: tuple[int, ...]
    numbers: list[int]
    """Of the turns."""
    responses: list[tuple[int, ...]]

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass: the last of a response tells nothing about the response."""
        return len(self.prefix_ids) + sum(len(response) - 1 for response in self.responses)


class PromptsThenResponses:
    """Attention of one pass: every prompt to itself; every response to its prompt and to itself, causally.

    The tokens of all prompts come first, then those of all responses, both in the order of the groups.
    """

    def __init__(self, groups: Sequence[Group], prefix_lm: bool, device: torch.device) -> None:
        lengths = torch.tensor([len(group.prefix_ids) for group in groups])
        self.num_prompt_tokens = int(lengths.sum())
        spans = Spans.of_samples(lengths, lengths if prefix_lm else torch.zeros_like(lengths))
        self.within_prompts = packed_attention(spans, self.num_prompt_tokens, device)
        self.parts: list[tuple[slice, slice, Tensor]] = []  # tokens of a prompt, those of its responses, mask [L, C]
        start = self.num_prompt_tokens
        for first, last, group in zip(spans.starts[:-1].tolist(), spans.starts[1:].tolist(), groups, strict=True):
            counts = torch.tensor([len(response) - 1 for response in group.responses])
            end = start + int(counts.sum())
            if end > start:
                owner_L = torch.repeat_interleave(counts)
                own_LL = (owner_L[:, None] == owner_L).tril()
                mask_LC = torch.cat([own_LL.new_ones(end - start, last - first), own_LL], 1)
                self.parts.append((slice(first, last), slice(start, end), mask_LC.to(device)))
            start = end

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend; ``slot`` does not matter."""
        P = self.num_prompt_tokens
        outputs = [self.within_prompts(q_TNH[:P], k_TNH[:P], v_TNH[:P], slot)]
        for prompt, own, mask_LC in self.parts:
            seen = (torch.cat([x_TNH[prompt], x_TNH[own]]) for x_TNH in (k_TNH, v_TNH))
            q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH[own], *seen))
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask_LC)[0].transpose(0, 1))
        return torch.cat(outputs)


def likelihoods(
    model: Answering, turns: Sequence[Turn], *, pass_tokens: int = PASS_TOKENS
) -> Iterator[tuple[int, Likelihood]]:
    """(number of the turn, likelihood of its response to its prompt), in the order in which they are computed.

    Probabilities are of the tokenizer's entries, from logits in fp32. The result does not depend on what else is asked,
    but for the rounding of batches of different size.

    Args:
        model: what answers.
        turns: prompts with responses; the end token counts where a response has it.
        pass_tokens: most tokens in one pass; a prompt with one response may be longer.

    Raises:
        UserError: a turn is longer than the context, or has an unknown token.
    """
    context = model.config.max_position_embeddings
    for turn in turns:
        if turn.num_tokens > context:
            raise UserError(
                f"a prompt of {len(turn.prefix_ids):,} tokens and a response of {len(turn.response_ids):,} do not fit "
                f"in the context of {context:,}: shorten the prompt"
            )
        for token in (*turn.prefix_ids, *turn.response_ids):
            if not 0 <= token < model.vocab_size:
                raise UserError(f"token id {token} is not one of the tokenizer's {model.vocab_size:,}")
    for number, turn in enumerate(turns):
        if not turn.response_ids:
            yield number, Likelihood(0.0, True)
    for groups in plan_passes(turns, pass_tokens):
        yield from _compute(model, groups)


def plan_passes(turns: Sequence[Turn], pass_tokens: int = PASS_TOKENS) -> list[list[Group]]:
    """Which turns go into which pass: long prompts first, those of one length and of one prompt together."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for number, turn in enumerate(turns):
        if turn.response_ids:
            by_prefix.setdefault(turn.prefix_ids, []).append(number)
    passes: list[list[Group]] = []
    room = 0
    for prefix_ids in sorted(by_prefix, key=len, reverse=True):
        for number in by_prefix[prefix_ids]:
            response = turns[number].response_ids
            group = passes[-1][-1] if passes else None
            if group is not None and group.prefix_ids == prefix_ids and len(response) - 1 <= max(room, 0):
                group.numbers.append(number)
                group.responses.append(response)
                room -= len(response) - 1
                continue
            group = Group(prefix_ids, [number], [response])
            if not passes or group.num_tokens > room:
                passes.append([])
                room = pass_tokens
            passes[-1].append(group)
            room -= group.num_tokens
    return passes


@torch.inference_mode()
def _compute(model: Answering, groups: Sequence[Group]) -> list[tuple[int, Likelihood]]:
    """One pass."""
    device = model.module.lm_head.weight.device
    ids = [token for group in groups for token in group.prefix_ids]
    positions = [place for group in groups for place in range(len(group.prefix_ids))]
    places: list[int] = []  # of the states that tell of a token of a response
    targets: list[int] = []
    starts: list[int] = []  # where in these each response begins
    first = 0
    for group in groups:
        prefix = len(group.prefix_ids)
        first += prefix
        for response in group.responses:
            starts.append(len(places))
            places += [first - 1, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            ids += response[:-1]
            positions += range(prefix, prefix + len(response) - 1)
    attention = PromptsThenResponses(groups, model.config.prefix_lm, device)
    ids_T, positions_T, places_R, targets_R = (
        torch.tensor(values, device=device) for values in (ids, positions, places, targets)
    )
    hidden_TD = model.module(ids_T, positions_T, attention)
    scored = [
        _score(model, hidden_TD[rows], targets)
        for rows, targets in zip(places_R.split(LOGIT_ROWS), targets_R.split(LOGIT_ROWS), strict=True)
    ]
    logprobs = np.add.reduceat(torch.cat([logprob_R for logprob_R, _ in scored]).double().numpy(force=True), starts)
    greedy = np.logical_and.reduceat(torch.cat([greedy_R for _, greedy_R in scored]).numpy(force=True), starts)
    numbers = [number for group in groups for number in group.numbers]
    return [
        (number, Likelihood(float(logprob), bool(likeliest)))
        for number, logprob, likeliest in zip(numbers, logprobs, greedy, strict=True)
    ]


def _score(model: Answering, hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, whether it is the likeliest token) of each target."""
    logits_RV = model.module.lm_head(hidden_RD)[:, : model.vocab_size].float()
    target_R1 = targets_R[:, None]
    own_R1 = logits_RV.gather(1, target_R1)
    entries_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    better_RV = (logits_RV > own_R1) | ((logits_RV == own_R1) & (entries_V < target_R1))
    return own_R1[:, 0] - logits_RV.logsumexp(1), ~better_RV.any(1)
