"""The Transformer block: gated attention and SwiGLU, without biases and with a norm that has no parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_text.model.attention import Attention
from hrm_text.model.config import ModelConfig

# T packed tokens, D width, N heads, H head width, I inner width of the SwiGLU


def rms_norm(x_TD: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, without a gain."""
    return F.rms_norm(x_TD.float(), x_TD.shape[-1:], eps=eps).type_as(x_TD)


def rotary_table(position_ids_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's rotary angles, fp32 [T, 1, 1, H / 2] each."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    angle = position_ids_T.float()[:, None] * (1.0 / theta**exponent)
    return angle.cos()[:, None, None], angle.sin()[:, None, None]


def rotate(x_TCNH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding over half-split pairs (first half, second half), in fp32, of C tensors at once."""
    cos, sin = rotary
    first, second = x_TCNH.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x_TCNH)


class GatedAttention(nn.Module):
    """W_o(sigmoid(gate) * attention(rope(q), rope(k), v)), every head with keys and values of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.gqkv_proj = nn.Linear(config.hidden_size, 4 * config.attention_size, bias=False)
        self.o_proj = nn.Linear(config.attention_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, slot: int) -> Tensor:
        gqkv = self.gqkv_proj(x_TD).view(len(x_TD), 4, self.num_heads, self.head_dim)
        gate_T1NH, qk_T2NH, v_T1NH = gqkv.split([1, 2, 1], dim=1)
        q_TNH, k_TNH = rotate(qk_T2NH, rotary).unbind(1)
        y_TNH = attention(q_TNH, k_TNH, v_T1NH.squeeze(1), slot)
        return self.o_proj((gate_T1NH.squeeze(1).sigmoid() * y_TNH).flatten(1))


class SwiGLU(nn.Module):
    """W_down(silu(g) * u) with g, u = split(W_gate_up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_TI) * up_TI)


class Block(nn.Module):
    """x + Attn(norm(x)), then x + SwiGLU(norm(x)); with ``norm: post``, norm(x + Attn(x)) and norm(x + SwiGLU(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.post, self.eps = config.norm == "post", config.norm_eps
        self.attn = GatedAttention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, slot: int) -> Tensor:
        if self.post:
            x_TD = rms_norm(x_TD + self.attn(x_TD, rotary, attention, slot), self.eps)
            return rms_norm(x_TD + self.mlp(x_TD), self.eps)
        x_TD = x_TD + self.attn(rms_norm(x_TD, self.eps), rotary, attention, slot)
        return x_TD + self.mlp(rms_norm(x_TD, self.eps))


class Stack(nn.Module):
    """Blocks in a row; with ``norm: magic``, one norm at the exit.

    MagicNorm: the forward pass meets that norm at every module call, so activations stay bounded as with PostNorm; the
    truncated backward pass meets it only K times, so gradients behave as with PreNorm (paper, section 3).
    """

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.magic, self.eps = config.norm == "magic", config.norm_eps
        self.layers = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.with_hooks = True
        """Whether a call of the stack is a call of its layers as modules, with the hooks that others put on them."""

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, first_slot: int) -> Tensor:
        for index, call in enumerate(self.calls()):
            x_TD = call(x_TD, rotary, attention, first_slot + index)
        return rms_norm(x_TD, self.eps) if self.magic else x_TD

    def calls(self) -> list[Callable[..., Tensor]]:
        """What to call for each layer."""
        return [layer if self.with_hooks else layer.forward for layer in self.layers]
