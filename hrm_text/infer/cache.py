"""The key-value cache of a recurrent model: every module call has keys and values of its own in each layer.

Slot = index of the call in the plan * layers per stack + layer. A forward pass meets the cache as its ``Attention``, so
the model's code is the same in training and in decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.model.attention import Attention, Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import packed_attention

# B sequences, C places a sequence, N heads, H head width, T packed tokens


class KeyValueCache:
    """Keys and values of B sequences of up to C tokens each, at their own lengths."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_cache_slots, batch, config.num_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        """Tokens a sequence may have before the cache must grow."""
        return self.keys.shape[3]

    def grow(self, capacity: int) -> None:
        """Make room for sequences of ``capacity`` tokens."""
        extra = capacity - self.capacity
        if extra > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, extra))
            self.values = F.pad(self.values, (0, 0, 0, extra))

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence whose row is not in ``rows`` (LongTensor)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths_B = self.lengths_B[rows]

    def prefill(self, spans: Spans) -> Attention:
        """Attention for one packed pass over all prompts: sample b of ``spans`` fills row b from its start."""
        device = self.keys.device
        lengths = spans.lengths
        num_tokens = int(spans.starts[-1])
        row_T = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        place_T = (torch.arange(num_tokens) - spans.starts[:-1].repeat_interleave(lengths)).to(device)
        packed = packed_attention(spans, num_tokens, device)
        self.lengths_B = lengths.to(device)
        self.grow(int(lengths.max()))

        def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
            self.keys[slot, row_T, :, place_T] = k_TNH
            self.values[slot, row_T, :, place_T] = v_TNH
            return packed(q_TNH, k_TNH, v_TNH, slot)

        return attend

    def decode(self) -> Attention:
        """Attention for one more token of every sequence; afterwards ``lengths_B`` counts it."""
        row_B = torch.arange(len(self.lengths_B), device=self.keys.device)
        place_B = self.lengths_B
        longest = int(place_B.max()) + 1
        self.grow(longest)
        mask_B11C = (torch.arange(longest, device=self.keys.device) <= place_B[:, None])[:, None, None]
        self.lengths_B = place_B + 1

        def attend(q_BNH: Tensor, k_BNH: Tensor, v_BNH: Tensor, slot: int) -> Tensor:
            self.keys[slot, row_B, :, place_B] = k_BNH
            self.values[slot, row_B, :, place_B] = v_BNH
            keys, values = self.keys[slot, :, :, :longest], self.values[slot, :, :, :longest]
            return F.scaled_dot_product_attention(q_BNH.unsqueeze(2), keys, values, mask_B11C).squeeze(2)

        return attend
