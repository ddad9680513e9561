"""Prompts into the cache: many texts in one pass, each with what it has there already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.model.attention import Attention, Spans
from hrm_text.model.kernels import packed_attention, why_not
from hrm_text.model.kernels.transfer import to_device
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


@dataclass(frozen=True)
class Layout:
    """New tokens of several texts laid end to end: all that a pass needs of them, worked out on the host at once."""

    table_4T: Tensor
    """LongTensor: id, position in its text, page and place there of each token."""
    spans: Spans
    """What of them is one text, and the prefix of those that are as in training."""

    @staticmethod
    def of(texts: Sequence[NewTokens], page_size: int) -> Layout:
        """The texts in their order."""
        lengths = np.array([len(text.ids) for text in texts])
        past = np.array([text.past for text in texts])
        starts = np.cumsum([0, *lengths])
        first_pages = np.cumsum([0, *(len(text.pages) for text in texts[:-1])])
        own_pages = np.fromiter(itertools.chain.from_iterable(text.pages for text in texts), np.int64)
        ids_T = np.fromiter(itertools.chain.from_iterable(text.ids for text in texts), np.int64, int(starts[-1]))
        position_T = np.arange(starts[-1]) + np.repeat(past - starts[:-1], lengths)
        page_T = own_pages[np.repeat(first_pages, lengths) + position_T // page_size]
        table_4T = torch.from_numpy(np.stack([ids_T, position_T, page_T, position_T % page_size]))
        prefixes = np.minimum([text.blocks[0][1] if text.blocks else 0 for text in texts], lengths)
        return Layout(table_4T, Spans(torch.from_numpy(starts), torch.from_numpy(prefixes)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return self.table_4T.shape[1]

    @property
    def num_texts(self) -> int:
        """How many they are."""
        return len(self.spans.prefix_lengths)

    @property
    def last_B(self) -> Tensor:
        """LongTensor: where the last token of each text lies."""
        return self.spans.starts[1:] - 1


class Recorded(Protocol):
    """A pass over new texts that has been recorded: a host launches it at once, kernel by kernel it is the slower."""

    def __call__(self, steps: Plan, layout: Layout, /) -> Tensor | None:
        """The final state [T, D] or more of the tokens, until the next pass; None: none that fits."""
        ...


@torch.inference_mode()
def prefill(
    model: RecurrentLM,
    steps: Plan,
    cache: PagedKeyValues,
    texts: Sequence[NewTokens],
    recorded: Recorded | None = None,
) -> Tensor:
    """The final state [texts, D] of each text's last token, once the keys and values of all are in the cache.

    The host does not wait for the device. ``recorded`` is asked for texts of which the cache has nothing.
    """
    device = model.lm_head.weight.device
    order: list[int] = []
    states: list[Tensor] = []
    for whole in (True, False):
        numbers = [number for number, text in enumerate(texts) if text.is_one_prefix == whole]
        if not numbers:
            continue
        chosen = [texts[number] for number in numbers]
        layout = Layout.of(chosen, cache.page_size)
        hidden_TD = recorded(steps, layout) if whole and recorded is not None else None
        if hidden_TD is None:
            ids_T, positions_T, pages_T, places_T = to_device(layout.table_4T.unbind(0), device)

            def store(slot: int, k_TNH: Tensor, v_TNH: Tensor, at: tuple[Tensor, Tensor] = (pages_T, places_T)) -> None:
                cache.write(slot, *at, k_TNH, v_TNH)

            if whole:
                attention = packed(layout, store, device)
            else:
                attention = with_past(chosen, cache, layout, store, device)
            hidden_TD = model(ids_T, positions_T, attention, steps=steps)
        states.append(hidden_TD.index_select(0, *to_device([layout.last_B], device)))
        order += numbers
    if len(states) == 1:
        return states[0]
    return torch.cat(states).index_select(0, *to_device([torch.tensor(order).argsort()], device))


Store = Callable[[int, Tensor, Tensor], None]
"""Puts the keys and values [T, N, H] of a pass into a slot of the cache."""


def packed(layout: Layout, store: Store, device: torch.device) -> Attention:
    """As in training: each text sees itself, its prefix both ways."""
    if device.type == "cuda" and why_not("triton", device) is None:
        from hrm_text.model.kernels.triton_attention import TritonAttention

        return TritonAttention(layout.spans, layout.num_tokens, device, store)
    attend_within = packed_attention(layout.spans, layout.num_tokens, device)

    def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        store(slot, k_TNH, v_TNH)
        return attend_within(q_TNH, k_TNH, v_TNH, slot)

    return attend


def with_past(
    texts: Sequence[NewTokens], cache: PagedKeyValues, layout: Layout, store: Store, device: torch.device
) -> Attention:
    """Each new token sees what the cache has of its text, and of the new ones those that its place may see."""
    tables = to_device([torch.tensor(text.pages) for text in texts], device)
    masks = to_device([visible(text) for text in texts], device)
    starts = layout.spans.starts.tolist()

    def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        store(slot, k_TNH, v_TNH)
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
