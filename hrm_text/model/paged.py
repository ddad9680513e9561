"""The definition of attention over a paged key-value cache: what one new token of each of several texts sees.

Memory is cut into pages of P tokens. A text owns a list of pages, its row of the table; token t of it lies in page
``table[t // P]`` at place ``t % P``, and that holds for every slot at once: a slot is one layer of one module call
(index of the call in the plan * layers per stack + layer), and a page has room for its tokens in all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import why_not

# B texts, M pages a text at most, P tokens a page, T tokens, C places, N heads, H head width


@dataclass(frozen=True)
class PagedKeyValues:
    """Keys and values of all slots and pages; 8-bit ones have a scale for each token and head."""

    keys: Tensor
    """[slots, pages, N, P, H]: fp32, bf16, fp16 or int8."""
    values: Tensor
    key_scales: Tensor | None = None
    """fp32 [slots, pages, N, P] beside int8 keys: what a key's integers are multiplied with."""
    value_scales: Tensor | None = None

    @staticmethod
    def allocate(
        config: ModelConfig, pages: int, page_size: int, device: torch.device, dtype: torch.dtype
    ) -> PagedKeyValues:
        """Room for ``pages`` pages of ``page_size`` tokens, filled with zeros."""
        shape = (config.num_cache_slots, pages, config.num_heads, page_size, config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        if dtype != torch.int8:
            return PagedKeyValues(keys, values)
        return PagedKeyValues(keys, values, *(torch.zeros(shape[:-1], device=device) for _ in range(2)))

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.keys.shape[3]

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self.keys.shape[1]

    def write(self, slot: int, pages_T: Tensor, places_T: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> None:
        """Store the keys and values of T tokens, each in its page at its place: on a GPU in one kernel."""
        if has_kernel(self.keys.device):
            from hrm_text.model.kernels import cache_write

            cache_write.write(self, slot, pages_T, places_T, k_TNH, v_TNH)
            return
        for store, scales, x_TNH in (
            (self.keys, self.key_scales, k_TNH),
            (self.values, self.value_scales, v_TNH),
        ):
            if scales is None:
                store[slot, pages_T, :, places_T] = x_TNH.to(store.dtype)
            else:
                integers_TNH, scales_TN = quantize(x_TNH)
                store[slot, pages_T, :, places_T] = integers_TNH
                scales[slot, pages_T, :, places_T] = scales_TN

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, in all slots."""
        for store in (self.keys, self.values, self.key_scales, self.value_scales):
            if store is not None:
                store[:, target] = store[:, source]

    def gather(self, slot: int, pages_M: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [length, N, H] of one text's first tokens, a copy."""
        found = []
        for store, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            x_MNPH = store[slot, pages_M]
            if scales is not None:
                x_MNPH = x_MNPH * scales[slot, pages_M][..., None]
            found.append(x_MNPH.transpose(1, 2).flatten(0, 1)[:length].to(dtype))
        return found[0], found[1]

    def attend(self, slot: int, q_BNH: Tensor, table_BM: Tensor, lengths_B: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(H)) v over the first ``lengths_B`` (at least 1) tokens of each text: [B, N, H]."""
        most = table_BM.shape[1]
        found = []
        for store, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            x_BMNPH = store[slot, table_BM]
            if scales is not None:
                x_BMNPH = x_BMNPH * scales[slot, table_BM][..., None]
            found.append(x_BMNPH.to(q_BNH.dtype).transpose(1, 2).flatten(2, 3))
        mask_BC = torch.arange(most * self.page_size, device=q_BNH.device) < lengths_B[:, None]
        keys, values = found
        return F.scaled_dot_product_attention(q_BNH.unsqueeze(2), keys, values, mask_BC[:, None, None]).squeeze(2)


@dataclass(frozen=True)
class PagedDecoding:
    """The attention of one decoding step: each text's newest token is stored, and sees all of its text."""

    cache: PagedKeyValues
    table_BM: Tensor
    """LongTensor: the pages of each text."""
    lengths_B: Tensor
    """LongTensor: tokens of each text, the newest included."""

    def __call__(self, q_BNH: Tensor, k_BNH: Tensor, v_BNH: Tensor, slot: int) -> Tensor:
        newest_B, size = self.lengths_B - 1, self.cache.page_size
        pages_B = self.table_BM.gather(1, (newest_B // size)[:, None]).squeeze(1)
        self.cache.write(slot, pages_B, newest_B % size, k_BNH, v_BNH)
        return self.attend(slot, q_BNH)

    def attend(self, slot: int, q_BNH: Tensor) -> Tensor:
        """What each query sees of its text."""
        return self.cache.attend(slot, q_BNH, self.table_BM, self.lengths_B)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., H] and fp32 scales [...] of vectors: the largest of each becomes 127, halves go to the even."""
    scales = x.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (x.float() / scales[..., None]).round().to(torch.int8), scales


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether keys and values are written by a kernel there."""
    return device.type == "cuda" and why_not("triton", device) is None
