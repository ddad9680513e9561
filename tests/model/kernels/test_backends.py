"""Every backend that can run here equals the definition, forward and backward."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans
from hrm_text.model.kernels import BACKENDS, available_backends, flash, packed_attention, pick_backend, varlen, why_not
from hrm_text.model.kernels.two_pass import Segments, TwoPassAttention

# torch.compile, inside flex, looks at the inputs' gradients, and hides it from users.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]

Pairs = list[tuple[int, int]]
"""(length, prefix) of each sample."""

EDGES: dict[str, tuple[Pairs, int]] = {
    "a prefix alone fills the batch": ([(7, 7)], 0),
    "one sample fills the batch": ([(64, 20)], 0),
    "one-token samples": ([(1, 0), (1, 1), (1, 0)], 2),
    "no prefixes, so causal": ([(9, 0), (5, 0), (17, 0)], 1),
    "prefixes alone": ([(4, 4), (9, 9)], 3),
    "empty responses among others": ([(5, 5), (8, 3), (6, 6), (4, 1)], 0),
    "several lengths, a padded tail": ([(5, 2), (50, 3), (6, 0), (49, 49)], 9),
    "an empty sample between others": ([(3, 1), (0, 0), (4, 2)], 0),
    "samples across tiles of 64 and 128": ([(130, 60), (67, 0), (64, 64), (70, 1)], 5),
}
"""Pairs and padding, by what is odd about them."""

RANDOM_PAIRS = st.lists(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=8
)


def spans_of(pairs: Pairs) -> Spans:
    lengths, prefixes = (torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for i in (0, 1))
    return Spans.of_samples(lengths, prefixes)


def segment_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """What a kernel for segments of varied length computes, written out: causal is aligned at the bottom right."""
    outputs = []
    bounds_q, bounds_k = segments.starts_q.tolist(), segments.starts_k.tolist()
    assert bounds_q[-1] == len(q) and bounds_k[-1] == len(k), "compacted: no row belongs to no segment"
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(*map(itertools.pairwise, (bounds_q, bounds_k)), strict=True)]
    assert all(queries > 0 and keys > 0 for queries, keys in lengths), "no segment is empty"
    assert (segments.longest_q, segments.longest_k) == tuple(map(max, zip(*lengths, strict=True)))
    for (a, b), (c, d) in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True):
        scores = torch.einsum("qnh,knh->nqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(diagonal=(d - c) - (b - a) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v[c:d]))
    return torch.cat(outputs)


class TwoPassReference(TwoPassAttention):
    name, dtypes = "reference", (torch.float32,)


def backend_for(name: str, spans: Spans, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Attention:
    if name == "two passes":
        if device != CPU or dtype != torch.float32:
            pytest.skip("the reference of the two passes is for fp32 on the CPU")
        return TwoPassReference(segment_by_segment, spans, num_tokens, device)
    if name == "triton" and device == CPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    if lack := why_not(name, device, dtype):
        pytest.skip(f"{name} on {device}: {lack}")
    return packed_attention(spans, num_tokens, device, name)


def outcome(attention: Attention, gqkv_T4NH: Tensor, wanted_TNH: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v, in fp32; the three lie in one tensor, as a block gives them."""
    leaves = [x_TNH.detach().requires_grad_() for x_TNH in gqkv_T4NH.unbind(1)[1:]]
    y_TNH = attention(leaves[0], leaves[1], leaves[2], 0)
    assert y_TNH.dtype == gqkv_T4NH.dtype
    return [x.detach().float() for x in (y_TNH, *torch.autograd.grad(y_TNH, leaves, wanted_TNH))]


def check(name: str, pairs: Pairs, padding: int, device: torch.device, dtype: torch.dtype) -> None:
    """The definition in fp32, of the same inputs, is the oracle; errors are shares of the largest value."""
    spans = spans_of(pairs)
    num_tokens = int(spans.starts[-1]) + padding
    if name == "flex":  # one length, so that it compiles once
        num_tokens = -(-num_tokens // 4096) * 4096
    attention = backend_for(name, spans, num_tokens, device, dtype)
    head_dim = 64 if device.type == "cuda" else 16
    generator = torch.Generator().manual_seed(num_tokens)
    gqkv_T4NH = torch.randn(num_tokens, 4, 2, head_dim, generator=generator).to(device, dtype)
    wanted_TNH = torch.randn(num_tokens, 2, head_dim, generator=generator).to(device, dtype)
    expected = outcome(PlainAttention(spans, num_tokens, device), gqkv_T4NH.float(), wanted_TNH.float())
    found = outcome(attention, gqkv_T4NH, wanted_TNH)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for what, x, oracle in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        # A gradient that should be zero (of a sample of one token, by its scores) is compared with the size of others.
        scale = max(float(oracle.abs().max()), 0.1)
        assert float((x - oracle).abs().max()) <= tolerance * scale, f"{name}: {what}"
    end = int(spans.starts[-1])
    assert all(not x[end:].any() for x in found), "padding gets zeros, and passes none on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", [*BACKENDS, "two passes"])
def test_equals_the_definition_at_the_edges(name: str, edge: str, device: torch.device, dtype: torch.dtype) -> None:
    check(name, *EDGES[edge], device, dtype)


@pytest.mark.parametrize("name", ["grouped", "two passes"])
@settings(deadline=None, max_examples=40)
@given(RANDOM_PAIRS, st.integers(0, 5))
def test_equals_the_definition_on_random_packings(name: str, pairs: Pairs, padding: int) -> None:
    check(name, pairs, padding, CPU, torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition_on_random_batches(name: str, seed: int, device: torch.device) -> None:
    """As above on every device, of sizes that the interpreter stands and a GPU finds larger than a tile."""
    longest, samples = (300, 12) if device.type == "cuda" else (40, 4)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (samples,), generator=generator).tolist()
    pairs = [(n, int(torch.randint(0, n + 1, (), generator=generator))) for n in lengths]
    check(name, pairs, seed, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def test_a_wrong_alignment_of_the_causal_pass_would_be_seen() -> None:
    def top_left(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        scores = torch.einsum("qnh,knh->nqk", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(diagonal=1)
        return torch.einsum("nqk,knh->qnh", scores.masked_fill(hidden, -torch.inf).softmax(-1) if causal else scores, v)

    spans = spans_of([(6, 2)])
    q, k, v = torch.randn(3, 6, 1, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    plain = PlainAttention(spans, 6, CPU)(q, k, v, 0)
    right, wrong = (TwoPassReference(f, spans, 6, CPU)(q, k, v, 0) for f in (segment_by_segment, top_left))
    torch.testing.assert_close(right, plain)
    assert not torch.allclose(wrong[2:], plain[2:], atol=1e-2)


def test_two_passes_do_the_work_of_the_visible_pairs_and_no_more() -> None:
    """Counted in products of queries with keys; a causal segment counts as the rectangle that it is cut from."""
    work = 0

    def counting(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        nonlocal work
        work += int((segments.starts_q.diff() * segments.starts_k.diff()).sum())
        return segment_by_segment(q, k, v, segments, causal)

    pairs = [(9, 4), (5, 5), (7, 0), (0, 0)]
    spans = spans_of(pairs)
    x = torch.randn(23, 1, 4)
    TwoPassReference(counting, spans, 23, CPU)(x, x, x, 0)
    assert work == sum(prefix * prefix + (length - prefix) * length for length, prefix in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler asks for it where the graph breaks
def test_two_passes_in_a_compiled_block_compile_once_whatever_the_batch() -> None:
    def block(x_TNH: Tensor, attention: Attention) -> Tensor:
        return attention(x_TNH * 2, x_TNH + 1, x_TNH, 0) * 3

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", dynamic=False)
    for compilations, pairs in enumerate([[(20, 5)], [(8, 8), (12, 3)], [(3, 0), (3, 1), (14, 14)]]):
        attention = TwoPassReference(segment_by_segment, spans_of(pairs), 20, CPU)
        x_TNH = torch.randn(20, 2, 8, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=compilations > 0):
            torch.testing.assert_close(compiled(x_TNH, attention), block(x_TNH, attention))


def window_form(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert window_size in [(-1, -1), (-1, 0)]
    return segment_by_segment(query, key, value, Segments(cu_seq_q, cu_seq_k, max_q, max_k), window_size == (-1, 0))


def flag_form(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    return segment_by_segment(query, key, value, Segments(cu_seq_q, cu_seq_k, max_q, max_k), is_causal)


@pytest.mark.parametrize("form", [window_form, flag_form])
def test_both_forms_of_varlen_attn_are_called_rightly(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of PyTorch 2.13 and 2.10; ``test_equals_...`` runs the real one on CUDA."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", form)
    monkeypatch.setattr(varlen.VarlenAttention, "dtypes", (torch.float32,))
    varlen.varlen_function.cache_clear()
    try:
        check_against_plain(lambda spans, total: varlen.VarlenAttention(spans, total, CPU))
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, mask: query)
        varlen.varlen_function.cache_clear()
        assert varlen.varlen_function() is None
    finally:
        varlen.varlen_function.cache_clear()


def version_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: None = None, seqused_k: None = None, softmax_scale: None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    return segment_by_segment(q, k, v, Segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), causal)


def version_4(
    q: Tensor, k: Tensor, v: Tensor, qv: None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0, causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    assert qv is None and cu_seqlens_q is not None and cu_seqlens_k is not None
    return version_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal), None


@pytest.mark.parametrize(
    ("installed", "capability", "used"),
    [
        ({"flash_attn_interface": version_3}, (9, 0), "flash_attn_interface"),
        ({"flash_attn": None, "flash_attn.cute": version_4}, (9, 0), "flash_attn.cute"),
        (
            {"flash_attn": None, "flash_attn.cute": version_4, "flash_attn_interface": version_3},
            (10, 0),
            "flash_attn.cute",
        ),
        ({"flash_attn_interface": version_3}, (10, 0), None),
        ({"flash_attn": None, "flash_attn.cute": version_4}, (8, 0), None),
        ({}, (9, 0), None),
    ],
)  # fmt: skip
def test_the_flash_attention_that_is_installed_is_found_and_called_rightly(
    installed: dict[str, object], capability: tuple[int, int], used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the signatures of the two versions."""
    for name, function in installed.items():
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed)
    assert flash.installed_version(capability) == used
    if used is None:
        return
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(flash.FlashAttention, "dtypes", (torch.float32,))
    flash.flash_function.cache_clear()
    try:
        check_against_plain(lambda spans, total: flash.FlashAttention(spans, total, CPU))
    finally:
        flash.flash_function.cache_clear()


def check_against_plain(attention_over: Callable[[Spans, int], Attention]) -> None:
    spans = spans_of([(9, 4), (5, 5), (7, 0)])
    q, k, v = torch.randn(3, 23, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = attention_over(spans, 23)(q, k, v, 0)
    torch.testing.assert_close(found, PlainAttention(spans, 23, CPU)(q, k, v, 0))


def test_what_cannot_run_says_why_and_lists_what_can() -> None:
    spans = spans_of([(2, 1)])
    with pytest.raises(UserError, match="unknown attention backend 'best'; the backends are plain, grouped, varlen"):
        packed_attention(spans, 2, CPU, "best")
    for name in ("varlen", "flex", "flash"):
        with pytest.raises(UserError, match=rf"'{name}' .* needs a GPU .* 'cpu'; choose from plain, grouped"):
            packed_attention(spans, 2, CPU, name)
    x = torch.zeros(2, 1, 4, dtype=torch.float64)
    with pytest.raises(UserError, match="computes in float32, found float64; choose from plain, grouped"):
        TwoPassReference(segment_by_segment, spans, 2, CPU)(x, x, x, 0)


def test_the_pick_can_run_and_a_machine_without_triton_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in DEVICES:
        assert pick_backend(device) in available_backends(device)
    assert pick_backend(CPU) == "grouped"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for device in DEVICES:
        assert pick_backend(device) == "grouped"
        assert why_not("triton", device) is not None
