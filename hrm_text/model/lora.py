"""Low-rank adapters of a recurrent model: which matrices have them, how strongly they act, and how they are merged.

An adapter changes a matrix W [O, I] by a product of rank r (LoRA, arXiv 2106.09685)::

    W_eff = W + s B A           A [r, I], B [O, r]

The model knows nothing of it: its matrices hold W_eff. A stack that a plan calls n times meets its change at every
call, so what is a small step for a layer that runs once is up to n steps for this one. Hence s is divided by n::

    s = alpha / r / n           n: calls of the stack in the plan; an HRM calls L six times and H twice
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig
from hrm_text.model.plan import plan
from hrm_text.settings import settings

A, B = ".lora_A", ".lora_B"
"""What the names of an adapter's two matrices add to the name of the matrix that they change."""
_BLOCKS = ("model.*_module.layers.*",)


@settings
class LoraConfig:
    """Adapters of low rank in the place of training the weights themselves."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank r of the change of each matrix, such as 16; 0 trains the weights themselves."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """The change is B A times alpha / rank, and that by calls."""
    match: tuple[str, ...] = _BLOCKS
    """Which matrices have an adapter: shell patterns for whole names, such as *.attn.*; all others stay as they are."""
    calls: Literal["divide", "root", "ignore"] = "divide"
    """A stack that runs n times meets its change n times. divide: by n. root: by the square root of n. ignore: not at
    all, which is as if the learning rate of the stack were n times as high."""

    def __post_init__(self) -> None:
        if not self.rank and (self.alpha, self.match, self.calls) != (16.0, _BLOCKS, "divide"):
            raise ValueError("rank is 0, so there are no adapters for the other settings; give a rank, such as 16")


def num_calls(config: ModelConfig, name: str) -> int:
    """How often one forward pass uses the weight of that name."""
    stack = re.match(r"model\.(\w+)_module\.", name)
    return 1 if stack is None else sum(step.stack == stack[1] for step in plan(config))


def scale(lora: LoraConfig, config: ModelConfig, name: str) -> float:
    """The factor s of B A for the weight of that name."""
    exponent = {"divide": 1.0, "root": 0.5, "ignore": 0.0}[lora.calls]
    return lora.alpha / lora.rank / num_calls(config, name) ** exponent


def adapted(lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the weights that have an adapter, in their order.

    Raises:
        UserError: a pattern matches no weight, or one that is no matrix; a matrix has no room for the rank.
    """
    found: set[str] = set()
    for pattern in lora.match:
        matched = fnmatch.filter(shapes, pattern)
        if not matched:
            close = difflib.get_close_matches(pattern, shapes, n=1, cutoff=0)
            raise UserError(f"lora.match: {pattern!r} matches none of the {len(shapes)} weights, such as {close[0]!r}")
        found.update(matched)
    if not found:
        raise UserError("lora.match: no pattern, expected at least one, such as 'model.*_module.layers.*'")
    for name in sorted(found):
        shape = shapes[name]
        if len(shape) != 2:
            raise UserError(f"lora.match: {name!r} has shape {list(shape)} and an adapter needs a matrix")
        if lora.rank > min(shape):
            raise UserError(f"lora.rank is {lora.rank}, but {name!r} [{shape[0]}, {shape[1]}] has rank {min(shape)}")
    return [name for name in shapes if name in found]


@torch.no_grad()
def merged_weight(base_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """W + s B A in fp32."""
    return torch.addmm(base_OI.float(), b_OR.float(), a_RI.float(), alpha=scale)


def merged(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: LoraConfig, config: ModelConfig
) -> dict[str, Tensor]:
    """Weights by name with the adapters in them; what has none is as in ``base``.

    Args:
        base: the weights that the adapters were trained upon, by name.
        adapters: ``<name>.lora_A`` and ``<name>.lora_B``.

    Raises:
        UserError: an adapter is incomplete, or does not fit its weight.
    """
    weights = dict(base)
    for name in sorted({key.removesuffix(A).removesuffix(B) for key in adapters}):
        a_RI, b_OR = adapters.get(name + A), adapters.get(name + B)
        if a_RI is None or b_OR is None or name not in base:
            lacking = name if name not in base else name + (A if a_RI is None else B)
            raise UserError(f"the adapter of {name!r} cannot be merged: {lacking!r} is missing")
        if (b_OR.shape[0], a_RI.shape[1]) != tuple(base[name].shape) or a_RI.shape[0] != b_OR.shape[1]:
            raise UserError(
                f"the adapter of {name!r} has shapes {list(b_OR.shape)} and {list(a_RI.shape)}, "
                f"which do not fit a weight of {list(base[name].shape)}"
            )
        weights[name] = merged_weight(base[name], a_RI, b_OR, scale(lora, config, name))
    return weights
