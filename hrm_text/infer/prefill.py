"""Prompts into the cache: many texts in one pass, each with what it has there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.model.attention import Attention, Spans
from hrm_text.model.kernels import packed_attention, why_not
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.plan import Plan
from hrm_text.model.recurrence import RecurrentLM

# T packed tokens, L tokens of one text, C tokens of it that are in the cache, N heads, H head width


@dataclass(frozen=True)
class NewTokens:
    """Tokens of one text that are to go into the cache, behind ``past`` tokens that are there."""

    ids: Sequence[int]
    past: int
    blocks: Sequence[tuple[int, int]]
    """Ranges of places in the text, end exclusive, whose tokens see each other both ways; all else is causal."""
    pages: Sequence[int]
    """Of the text, for its past and its new tokens."""

    @property
    def is_one_prefix(self) -> bool:
        """Whether nothing of the text is in the cache, and both ways only its beginning sees: as in training."""
        return self.past == 0 and (not self.blocks or (len(self.blocks) == 1 and self.blocks[0][0] == 0))


@torch.inference_mode()
def prefill(model: RecurrentLM, steps: Plan, cache: PagedKeyValues, texts: Sequence[NewTokens]) -> Tensor:
    """The final state [texts, D] of each text's last token, once the keys and values of all are in the cache."""
    device = model.lm_head.weight.device
    hidden: list[Tensor | None] = [None] * len(texts)
    for whole in (True, False):
        numbers = [number for number, text in enumerate(texts) if text.is_one_prefix == whole]
        if not numbers:
            continue
        chosen = [texts[number] for number in numbers]
        ids_T = torch.tensor([token for text in chosen for token in text.ids], device=device)
        positions_T = torch.cat([torch.arange(text.past, text.past + len(text.ids)) for text in chosen])
        starts = [0, *torch.tensor([len(text.ids) for text in chosen]).cumsum(0).tolist()]
        where = Places(chosen, cache.page_size, device)
        if whole:
            attention = packed(chosen, cache, where, len(ids_T), device)
        else:
            attention = with_past(chosen, cache, where, starts, device)
        hidden_TD = model(ids_T, positions_T.to(device), attention, steps=steps)
        last = hidden_TD[torch.tensor(starts[1:], device=device) - 1]
        for number, row in zip(numbers, last.unbind(0), strict=True):
            hidden[number] = row
    return torch.stack([row for row in hidden if row is not None])


class Places:
    """Where packed new tokens go in the cache."""

    def __init__(self, texts: Sequence[NewTokens], page_size: int, device: torch.device) -> None:
        pages, places = [], []
        for text in texts:
            position_L = torch.arange(text.past, text.past + len(text.ids))
            pages.append(torch.tensor(text.pages)[position_L // page_size])
            places.append(position_L % page_size)
        self.pages_T, self.places_T = torch.cat(pages).to(device), torch.cat(places).to(device)


def packed(
    texts: Sequence[NewTokens], cache: PagedKeyValues, where: Places, num_tokens: int, device: torch.device
) -> Attention:
    """As in training: each text sees itself, its prefix both ways."""
    lengths = torch.tensor([len(text.ids) for text in texts])
    prefixes = torch.tensor([text.blocks[0][1] if text.blocks else 0 for text in texts])
    spans = Spans.of_samples(lengths, prefixes.minimum(lengths))
    if device.type == "cuda" and why_not("triton", device) is None:
        from hrm_text.model.kernels.triton_attention import TritonAttention

        return TritonAttention(
            spans, num_tokens, device, store=lambda slot, k, v: cache.write(slot, where.pages_T, where.places_T, k, v)
        )
    attend_within = packed_attention(spans, num_tokens, device)

    def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        cache.write(slot, where.pages_T, where.places_T, k_TNH, v_TNH)
        return attend_within(q_TNH, k_TNH, v_TNH, slot)

    return attend


def with_past(
    texts: Sequence[NewTokens], cache: PagedKeyValues, where: Places, starts: Sequence[int], device: torch.device
) -> Attention:
    """Each new token sees what the cache has of its text, and of the new ones those that its place may see."""
    tables = [torch.tensor(text.pages, device=device) for text in texts]
    masks = [visible(text).to(device) for text in texts]

    def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        cache.write(slot, where.pages_T, where.places_T, k_TNH, v_TNH)
        outputs = []
        for text, pages, mask_LC, start, end in zip(texts, tables, masks, starts[:-1], starts[1:], strict=True):
            k_CNH, v_CNH = cache.gather(slot, pages, text.past, q_TNH.dtype)
            # The new ones as they are: an 8-bit cache rounds what is read from it, and nothing else.
            k_CNH, v_CNH = torch.cat([k_CNH, k_TNH[start:end]]), torch.cat([v_CNH, v_TNH[start:end]])
            q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH[start:end], k_CNH, v_CNH))
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask_LC)[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def visible(text: NewTokens) -> Tensor:
    """BoolTensor [L, past + L]: what each new token sees. Earlier tokens always; later ones within its block."""
    end = text.past + len(text.ids)
    row_L1, column_C = torch.arange(text.past, end)[:, None], torch.arange(end)
    mask_LC = column_C <= row_L1
    for first, behind in text.blocks:
        mask_LC |= (first <= row_L1) & (row_L1 < behind) & (first <= column_C) & (column_C < behind)
    return mask_LC
