"""Decoding on a CPU: one new token of each of several texts, at the speed at which the weights can be read.

``speed_up_decoding`` replaces the forward of a model's stacks and head from outside. A step then spends its time in
compiled loops (``cpu_decode_kernels``) that read bf16 and int8 weights as they are and compute in fp32: activations
stay fp32 within a stack, so a bf16 model is computed at least as exactly as its own modules do.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_text.model.attention import Attention
from hrm_text.model.block import Block, Stack, rms_norm
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedDecoding, PagedKeyValues
from hrm_text.model.quantized import Int8Linear
from hrm_text.model.recurrence import RecurrentLM

# B texts, M pages a text at most, N heads, H head width, D width

MOST_TEXTS = 64
"""More texts, and prompts, are many rows, for which PyTorch's products are the right ones."""
LANES = 8
"""What the widths of products and heads must be multiples of: the numbers of one vector."""
DTYPES = (torch.float32, torch.bfloat16, torch.int8)

_NO_SCALES: np.ndarray[Any, Any] = np.empty(0, np.float32)
_NO_TABLE: np.ndarray[Any, Any] = np.empty((0, 0, 0), np.float32)


class CompiledDecoding(PagedDecoding):
    """The attention of one decoding step that reads the pages where they lie."""

    def attend(self, slot: int, q_BNH: Tensor) -> Tensor:
        """What each query sees of its text."""
        return attend(self.cache, slot, q_BNH, self.table_BM, self.lengths_B)


def why_not(config: ModelConfig) -> str | None:
    """Why a model's decoding cannot be sped up, in words; None: it can."""
    widths = (config.hidden_size, config.attention_size, config.intermediate_size, config.head_dim)
    odd = [width for width in widths if width % LANES]
    return f"widths must be multiples of {LANES}, and the model has {odd[0]}" if odd else None


def speed_up_decoding(model: RecurrentLM) -> None:
    """Replace the forward of a model's stacks and head.

    The stacks are faster where their attention is ``CompiledDecoding``, and fall back to their own forward for any
    other, such as a prompt's; the head is faster for few rows. A model that ``why_not`` speaks of, or that is not on a
    CPU or not in fp32 or bf16, keeps what it has.
    """
    if why_not(model.config) is not None:
        return
    for name in model.config.stacks:
        stack = model.model.stack(name)
        stack.forward = functools.partial(stack_forward, stack)  # type: ignore[method-assign]
    model.lm_head.forward = functools.partial(head_forward, model.lm_head)  # type: ignore[method-assign]


def attend(cache: PagedKeyValues, slot: int, q_BNH: Tensor, table_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """``PagedKeyValues.attend`` that reads the pages where they lie."""
    if not supported(cache.keys, q_BNH) or q_BNH.shape[-1] % LANES:
        return cache.attend(slot, q_BNH, table_BM, lengths_B)
    out_BNH = torch.empty(q_BNH.shape, dtype=torch.float32)
    with_threads().attend(
        q_BNH.float().contiguous().numpy(),
        *slot_arrays(cache, slot),
        table_BM.long().contiguous().numpy(),
        lengths_B.long().contiguous().numpy(),
        out_BNH.numpy(),
    )
    return out_BNH.to(q_BNH.dtype)


def stack_forward(
    stack: Stack,
    x_BD: Tensor,
    rotary: tuple[Tensor, Tensor],
    attention: Attention,
    first_slot: int,
) -> Tensor:
    """``Stack.forward``, for a decoding step in compiled loops."""
    if torch.is_grad_enabled() or not len(x_BD):
        return Stack.forward(stack, x_BD, rotary, attention, first_slot)
    if not isinstance(attention, CompiledDecoding) or len(x_BD) > MOST_TEXTS:
        if x_BD.dtype == torch.bfloat16 and bf16_is_slow():
            return forward_in_fp32(stack, x_BD, rotary, attention, first_slot)
        return Stack.forward(stack, x_BD, rotary, attention, first_slot)
    layers = [matrices_of(layer) for layer in stack.layers]
    if not supported(x_BD, attention.cache.keys, *(matrix.weight for layer in layers for matrix in layer)):
        return Stack.forward(stack, x_BD, rotary, attention, first_slot)
    kernels = with_threads()
    y_BD = x_BD.to(torch.float32, copy=True)
    cos, sin = (table.reshape(len(table), -1).numpy() for table in rotary)
    table, lengths = attention.table_BM.long().contiguous().numpy(), attention.lengths_B.long().contiguous().numpy()
    first = stack.layers[0]
    assert isinstance(first, Block)
    for index, matrices in enumerate(layers):
        kernels.block(
            y_BD.numpy(),
            *(array for matrix in matrices for array in matrix_arrays(matrix)),
            cos,
            sin,
            *slot_arrays(attention.cache, first_slot + index),
            table,
            lengths,
            first.eps,
            first.post,
            torch.get_num_threads(),
        )
    return (rms_norm(y_BD, stack.eps) if stack.magic else y_BD).to(x_BD.dtype)


def forward_in_fp32(
    stack: Stack, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, first_slot: int
) -> Tensor:
    """``Stack.forward`` of a prompt, with each layer's weights in fp32 while it is at work."""
    y_TD = x_TD.float()
    for index, layer in enumerate(stack.layers):
        weights = {name: w.float() if w.dtype == x_TD.dtype else w for name, w in layer.state_dict().items()}
        y_TD = torch.func.functional_call(layer, weights, (y_TD, rotary, attention, first_slot + index))
    return (rms_norm(y_TD, stack.eps) if stack.magic else y_TD).to(x_TD.dtype)


@functools.cache
def bf16_is_slow() -> bool:
    """Whether this CPU has no instructions for bf16: PyTorch's products then take 6 to 12 times as long as in fp32."""
    capabilities = torch.cpu.get_capabilities()
    x86 = capabilities.get("architecture") == "x86_64"
    return x86 and not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def head_forward(head: nn.Linear, x_BD: Tensor) -> Tensor:
    """``nn.Linear.forward``, for few rows in compiled loops."""
    fit = x_BD.dim() == 2 and 0 < len(x_BD) <= MOST_TEXTS and not torch.is_grad_enabled()
    if not fit or not supported(x_BD, head.weight):
        return F.linear(x_BD, head.weight)
    y_BV = torch.empty(len(x_BD), len(head.weight))
    with_threads().linear(
        *matrix_arrays(head), x_BD.float().contiguous().numpy(), y_BV.numpy(), torch.get_num_threads()
    )
    return y_BV.to(x_BD.dtype)


# ----------------------------------------------------------------------------------------------------------- arrays ---


def matrices_of(layer: nn.Module) -> tuple[nn.Linear | Int8Linear, ...]:
    """The four products of a block."""
    assert isinstance(layer, Block)
    return layer.attn.gqkv_proj, layer.attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj


def supported(*tensors: Tensor) -> bool:
    """Whether the loops can read tensors."""
    return all(tensor.dtype in DTYPES and tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def with_threads() -> Any:
    """The compiled loops, which then use as many threads as PyTorch."""
    import numba

    from hrm_text.model.kernels import cpu_decode_kernels

    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, vars(numba.config)["NUMBA_NUM_THREADS"]))
    if torch.get_num_threads() != threads:  # numba's first call gives PyTorch, which shares its OpenMP, all cores
        torch.set_num_threads(threads)
    return cpu_decode_kernels


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor; bf16 as uint16, its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def matrix_arrays(module: nn.Linear | Int8Linear) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The weights of a product, and their scales, of which there may be none."""
    return as_array(module.weight), module.scale.numpy() if isinstance(module, Int8Linear) else _NO_SCALES


def slot_arrays(cache: PagedKeyValues, slot: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Keys and values [pages, N, P, H] of a slot, and their scales [pages, N, P], of which there may be none."""
    scales = (_NO_TABLE if table is None else table[slot].numpy() for table in (cache.key_scales, cache.value_scales))
    return as_array(cache.keys[slot]), as_array(cache.values[slot]), *scales
