"""What a model is: its architecture and its sizes."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

from hrm_text.contracts import UserError
from hrm_text.settings import from_mapping, settings

Architecture = Literal["hrm", "trm", "trm_match_recurrence", "rins", "looped", "transformer"]

# Each architecture's own recurrence, and the number of its module calls that carry gradient (paper, table of
# architectures). HRM's number is where its warm-up ends. A key that is absent here means nothing to that architecture.
RECURRENCE: dict[str, dict[str, int]] = {
    "hrm": {"H_cycles": 2, "L_cycles": 3, "bp_steps": 5},
    "trm": {"H_cycles": 2, "L_cycles": 1, "bp_steps": 2},
    "trm_match_recurrence": {"H_cycles": 2, "L_cycles": 3, "bp_steps": 5},
    "rins": {"cycles": 7, "bp_steps": 5},
    "looped": {"cycles": 4, "bp_steps": 2},
    "transformer": {"bp_steps": 1},
}


@settings
class ModelConfig:
    """A model's architecture and sizes. In the recurrence fields, 0 stands for the architecture's own number."""

    architecture: Architecture = "hrm"
    """Which plan of module calls to follow."""
    vocab_size: int = 0
    """Rows of the embedding and of the head; in training 0 takes the data's, rounded up to a multiple of 256."""
    max_position_embeddings: int = 0
    """Longest sample in tokens; in training 0 takes the data's."""
    hidden_size: int
    """Width D of the residual stream."""
    num_layers: int
    """Transformer blocks in all stacks together; L and H hold half each."""
    num_heads: int
    """Attention heads; each has keys and values of its own."""
    head_dim: int = 128
    """Width of one attention head."""
    expansion: float = 4.0
    """The SwiGLU's inner width is this times D times 2/3, rounded up to a multiple of inner_multiple."""
    inner_multiple: int = 256
    """The SwiGLU's inner width is a multiple of this."""
    H_cycles: int = 0
    """H-module calls (hrm, trm)."""
    L_cycles: int = 0
    """L-module calls before each H-module call (hrm, trm)."""
    cycles: int = 0
    """Calls of the repeated stack (looped, rins)."""
    bp_steps: int = 0
    """K: module calls that carry gradient, once the warm-up is over."""
    norm: Literal["magic", "pre", "post"] = "magic"
    """magic: PreNorm blocks, one norm at a stack's exit. pre: one norm, before the head. post: PostNorm blocks."""
    norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    init: Literal["lecun", "normal", "megatron"] = "lecun"
    """lecun: std 1/sqrt(fan_in). normal: init_std. megatron: that, out-projections divided by sqrt(2 num_layers)."""
    init_std: float = 0.02
    """Standard deviation for init normal and megatron."""
    prefix_lm: bool = True
    """True: prefix tokens see each other both ways. False: purely causal."""

    def __post_init__(self) -> None:
        own = RECURRENCE[self.architecture]
        for name in ("H_cycles", "L_cycles", "cycles", "bp_steps"):
            value = getattr(self, name)
            if value < 0 or (value and name not in own):
                used = ", ".join(own)
                raise ValueError(
                    f"{name} = {value} means nothing to architecture {self.architecture!r}, which has {used}"
                )
            if value == 0:
                own_number = own.get(name, 0)
                if name == "bp_steps":  # comes last, so the number of calls is settled
                    own_number = min(own_number, self.num_calls)
                object.__setattr__(self, name, own_number)
        for name in ("hidden_size", "num_layers", "num_heads", "head_dim", "expansion", "inner_multiple", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, found {self.head_dim}")
        if self.num_layers % 2 and self.architecture in ("hrm", "rins", "trm_match_recurrence"):
            raise ValueError(f"num_layers must be even, so that each stack gets half; found {self.num_layers}")
        least = 2 if self.architecture in ("hrm", "trm", "trm_match_recurrence", "rins") else 1
        if not least <= self.bp_steps <= self.num_calls:
            raise ValueError(f"bp_steps must be {least} to {self.num_calls} (the module calls), found {self.bp_steps}")

    @property
    def num_calls(self) -> int:
        """Module calls in one forward pass."""
        match self.architecture:
            case "hrm" | "trm" | "trm_match_recurrence":
                return self.H_cycles * (self.L_cycles + 1)
            case "rins":
                return self.cycles + 1
            case "looped":
                return self.cycles
            case "transformer":
                return 1

    @property
    def stacks(self) -> dict[str, int]:
        """Name of each stack of blocks -> its number of layers."""
        match self.architecture:
            case "hrm" | "rins":
                return {"L": self.num_layers // 2, "H": self.num_layers // 2}
            case "trm_match_recurrence":
                return {"S": self.num_layers // 2}
            case "trm" | "looped" | "transformer":
                return {"S": self.num_layers}

    @property
    def layers_per_stack(self) -> int:
        """Layers of every stack (all stacks of an architecture are equally deep)."""
        return next(iter(self.stacks.values()))

    @property
    def intermediate_size(self) -> int:
        """Inner width of the SwiGLU."""
        return math.ceil(round(self.expansion * self.hidden_size * 2 / 3) / self.inner_multiple) * self.inner_multiple

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the embedding at initialisation; its inverse scales the embedding at use."""
        return 1 / math.sqrt(self.hidden_size) if self.init == "lecun" else self.init_std

    @property
    def block_parameters(self) -> int:
        """Parameters of one Transformer block."""
        return 5 * self.hidden_size * self.attention_size + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Trained parameters, embedding and head included."""
        return sum(self.stacks.values()) * self.block_parameters + 2 * self.vocab_size * self.hidden_size

    @property
    def num_cache_slots(self) -> int:
        """Key-value slots: every module call has keys and values of its own in each of its layers."""
        return self.num_calls * self.layers_per_stack

    def cache_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of keys and values one token needs; elements of 2 bytes are bf16."""
        return 2 * self.num_cache_slots * self.attention_size * element_bytes


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "head_dim": 32, "inner_multiple": 32},
    "mini": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "head_dim": 32, "inner_multiple": 64},
    "S": {"num_layers": 8, "hidden_size": 512, "num_heads": 4},
    "B": {"num_layers": 12, "hidden_size": 1024, "num_heads": 8},
    "L": {"num_layers": 24, "hidden_size": 1280, "num_heads": 10},
    "XL": {"num_layers": 32, "hidden_size": 1536, "num_heads": 12},
    "XXL": {"num_layers": 72, "hidden_size": 1792, "num_heads": 14},
    "XXL_wide": {"num_layers": 32, "hidden_size": 2560, "num_heads": 20},
}
"""The named sizes; B to XXL_wide are the paper's, the smaller ones are ours."""


def preset(size: str, **changes: Any) -> ModelConfig:
    """The configuration of a named size, with 65,536 entries and a context of 4,096 unless ``changes`` say otherwise.

    >>> preset("B", architecture="transformer").stacks
    {'S': 12}
    """
    if size not in PRESETS:
        close = difflib.get_close_matches(size, PRESETS, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown size {size!r}; the sizes are {', '.join(PRESETS)}{hint}")
    values = {"vocab_size": 65_536, "max_position_embeddings": 4096} | PRESETS[size] | changes
    return from_mapping(ModelConfig, values, f"preset({size!r})")
