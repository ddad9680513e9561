"""The recurrent language model: an embedding, one or two stacks of blocks, and the loop that obeys the plan."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, Spans
from hrm_text.model.block import Stack, rms_norm, rotary_table
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import packed_attention
from hrm_text.model.plan import Plan, Step, plan

Observer = Callable[[int, Step, Tensor, Tensor], None]
"""Called after each module call with its index, its step, the state [T, D] it overwrote and the state it wrote."""


class Recurrence(nn.Module):
    """Embedding, stacks and initial fast state: token ids in, the final state out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # With a weight given, the embedding draws none: `initialise` does, and drawing on "meta" takes a second.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.z_L_init = nn.Buffer(torch.empty(config.hidden_size))  # frozen: a buffer, so no optimiser ever owns it
        for name, num_layers in config.stacks.items():
            self.add_module(f"{name}_module", Stack(config, num_layers))

    def stack(self, name: str) -> Stack:
        """The stack a plan calls ``name``."""
        return self.get_submodule(f"{name}_module")  # type: ignore[return-value]

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        attention: Attention,
        k: int | None = None,
        observer: Observer | None = None,
        steps: Plan | None = None,
    ) -> Tensor:
        """The final state [T, D] of T packed tokens; ``k`` module calls carry gradient (None: the config's number).

        ``steps`` is a plan to follow instead of the configuration's, over the same stacks.
        """
        config = self.config
        z_H = self.embed_tokens(input_ids_T) * (1 / config.embedding_std)
        states = {"z_H": z_H, "z_L": self.z_L_init.to(z_H.dtype).expand_as(z_H)}
        rotary = rotary_table(position_ids_T, config.head_dim, config.rope_theta)
        for index, step in enumerate(steps or plan(config, k)):
            slot = index * config.layers_per_stack
            with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
                read = sum((states[name] for name in step.reads[1:]), start=states[step.reads[0]])
                written = self.stack(step.stack)(read, rotary, attention, slot)
            if observer is not None:
                observer(index, step, states[step.writes], written)
            states[step.writes] = written
        output = states[step.writes]
        return rms_norm(output, config.norm_eps) if config.norm == "pre" else output


class RecurrentLM(nn.Module):
    """A recurrence and an untied head. Parameter names are those of the weights folder (spec, section 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size <= 0 or config.max_position_embeddings <= 0:
            raise UserError("a model needs vocab_size and max_position_embeddings; training takes them from its data")
        self.config = config
        self.model = Recurrence(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        attention: Attention,
        k: int | None = None,
        steps: Plan | None = None,
    ) -> Tensor:
        """The final state [T, D]; ``head`` turns it into logits or a loss."""
        hidden: Tensor = self.model(input_ids_T, position_ids_T, attention, k, steps=steps)
        return hidden

    @torch.no_grad()
    def logits(self, input_ids_BT: Tensor, prefix_lengths_B: Tensor) -> Tensor:
        """Logits [B, T, V] in fp32 of B sequences of T ids; prefix_lengths [B] (0 = causal) sets each one's mask."""
        batch, length = input_ids_BT.shape
        prefix_lengths_B = prefix_lengths_B.cpu()
        if len(prefix_lengths_B) != batch or not ((prefix_lengths_B >= 0) & (prefix_lengths_B <= length)).all():
            raise UserError(
                f"prefix_lengths must be {batch} numbers from 0 to {length}, found {prefix_lengths_B.tolist()}"
            )
        if length > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise UserError(f"{length} tokens are longer than the model's context of {limit}; shorten the input")
        device = self.lm_head.weight.device
        spans = Spans.of_samples(torch.full((batch,), length), prefix_lengths_B)
        attention = packed_attention(spans, batch * length, device)
        positions = torch.arange(length, device=device).repeat(batch)
        hidden = self(input_ids_BT.to(device).flatten(), positions, attention)
        return self.lm_head(hidden).float().view(batch, length, -1)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every weight anew from ``seed`` (spec, section 1); the values do not depend on device or dtype."""
        generator = torch.Generator().manual_seed(seed)
        config = self.config
        for name, weight in [*self.named_parameters(), ("model.z_L_init", self.model.z_L_init)]:
            if name == "model.z_L_init":
                std = 1.0
            elif name == "model.embed_tokens.weight":
                std = config.embedding_std
            elif config.init == "lecun":
                std = 1 / math.sqrt(weight.shape[-1])
            elif config.init == "megatron" and name.endswith(("o_proj.weight", "down_proj.weight")):
                std = config.init_std / math.sqrt(2 * config.num_layers)
            else:
                std = config.init_std
            weight.copy_(truncated_normal(weight.shape, std, generator))


# The standard deviation of a unit normal cut off at 3 sigma.
TRUNCATED_STD = 0.9866


def truncated_normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """fp32 draws from a normal cut off at 3 sigma, widened so that their standard deviation is ``std``."""
    unit = nn.init.trunc_normal_(torch.empty(shape), std=1.0, a=-3.0, b=3.0, generator=generator)
    return unit * (std / TRUNCATED_STD)


def build(
    config: ModelConfig, *, seed: int | None = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> RecurrentLM:
    """An untrained model, initialised from ``seed``; None: its weights hold anything, for a caller who has others."""
    with torch.device("meta"):
        model = RecurrentLM(config)
    model = model.to_empty(device=device).to(dtype)
    if seed is not None:
        model.initialise(seed)
    return model
