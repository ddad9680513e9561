"""Accelerated attention. Each backend equals ``attention.PlainAttention``; the best one for a device is picked here."""

from __future__ import annotations

import importlib.util
import os

import torch

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans
from hrm_text.model.kernels.grouped import GroupedAttention

BACKENDS = ("plain", "grouped", "varlen", "flex", "flash", "triton")


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """What a backend lacks on a device, for tensors of a dtype if one is given; None where it runs."""
    match backend:
        case "plain" | "grouped":
            return None
        case "varlen" | "flash":
            lack = why_not_nvidia(device) or why_not_half(dtype)
            return lack or (why_not_varlen() if backend == "varlen" else why_not_flash(device))
        case "flex":
            return why_not_gpu(device) or why_not_triton()
        case "triton":
            # The interpreter runs the kernels on CPU tensors, slowly: for tests.
            interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
            return (None if interpreted else why_not_gpu(device)) or why_not_triton()
        case _:
            raise UserError(f"unknown attention backend {backend!r}; the backends are {', '.join(BACKENDS)}")


def why_not_gpu(device: torch.device) -> str | None:
    """CUDA, or AMD's ROCm, which PyTorch calls by the same name; of NVIDIA's GPUs what Triton supports."""
    if device.type != "cuda":
        return f"it needs a GPU with CUDA, and the device is {device.type!r}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or above"
    return None


def why_not_nvidia(device: torch.device) -> str | None:
    """FlashAttention's kernels for NVIDIA's GPUs; whether AMD's align a causal mask in the same way was not tried."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "it is for GPUs of NVIDIA"
    return why_not_gpu(device)


def why_not_half(dtype: torch.dtype | None) -> str | None:
    """FlashAttention computes in half precision alone."""
    from hrm_text.model.kernels.two_pass import HALVES

    if dtype is None or dtype in HALVES:
        return None
    return f"it computes in bfloat16 or float16, and the dtype is {str(dtype).removeprefix('torch.')}"


def why_not_triton() -> str | None:
    """Triton comes with PyTorch for CUDA on Linux, and has to be installed elsewhere."""
    return None if importlib.util.find_spec("triton") else "it needs the package triton"


def why_not_varlen() -> str | None:
    """``torch.nn.attention.varlen`` is young: its form is looked at, not its version."""
    from hrm_text.model.kernels.varlen import varlen_function

    if varlen_function() is None:
        return f"it needs torch.nn.attention.varlen as of PyTorch 2.11 to 2.13, and this is PyTorch {torch.__version__}"
    return None


def why_not_flash(device: torch.device) -> str | None:
    """FlashAttention is installed by hand."""
    from hrm_text.model.kernels.flash import VERSION_3, VERSION_4, installed_version

    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return "it needs compute capability 9.0 (Hopper) or above"
    if installed_version(capability) is None:
        return f"it needs FlashAttention 3 (module {VERSION_3}, Hopper alone) or flash-attn-4 (module {VERSION_4})"
    return None


def available_backends(device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """The backends that run on a device, for tensors of a dtype if one is given."""
    return tuple(backend for backend in BACKENDS if why_not(backend, device, dtype) is None)


def pick_backend(device: torch.device) -> str:
    """The best backend on a device: FlexAttention on GPUs of NVIDIA, groups of similar length elsewhere.

    As measured (docs/attention.md) for a backend by itself. Fused blocks have the triton kernels, which are faster
    there, as the block computes on its way what the backward pass needs.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "flex" if nvidia and why_not("flex", device) is None else "grouped"


def packed_attention(spans: Spans, num_tokens: int, device: torch.device, backend: str = "grouped") -> Attention:
    """Attention over one packed batch of ``num_tokens`` tokens, padding included, on ``device``.

    Raises:
        UserError: the backend cannot run there; the message says why and lists those that can.
    """
    if lack := why_not(backend, device):
        raise UserError(
            f"attention: {backend!r} is not to be had here: {lack}; choose from {', '.join(available_backends(device))}"
        )
    match backend:
        case "plain":
            return PlainAttention(spans, num_tokens, device)
        case "grouped":
            return GroupedAttention(spans, num_tokens, device)
        case "varlen":
            from hrm_text.model.kernels.varlen import VarlenAttention

            return VarlenAttention(spans, num_tokens, device)
        case "flex":
            from hrm_text.model.kernels.flex import FlexAttention

            return FlexAttention(spans, num_tokens, device)
        case "flash":
            from hrm_text.model.kernels.flash import FlashAttention

            return FlashAttention(spans, num_tokens, device)
        case _:
            from hrm_text.model.kernels.triton_attention import TritonAttention

            return TritonAttention(spans, num_tokens, device)
