from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.kernels import packed_attention
from hrm_text.model.kernels.grouped import LEAST_FILL, SHORT, GroupedAttention, similar_lengths

CPU = torch.device("cpu")


def check_equal_to_plain(pairs: list[tuple[int, int]], padding: int) -> None:
    """Outputs and gradients of grouped attention are those of the definition."""
    lengths, prefixes = (torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for i in (0, 1))
    spans = Spans.of_samples(lengths, prefixes)
    total = int(spans.starts[-1]) + padding
    generator = torch.Generator().manual_seed(total)
    inputs = torch.randn(3, total, 2, 8, generator=generator)
    wanted = torch.randn(total, 2, 8, generator=generator)
    results: list[tuple[Tensor, Tensor]] = []
    for attention in (PlainAttention(spans, total, CPU), GroupedAttention(spans, total, CPU)):
        leaf = inputs.clone().requires_grad_()
        out = attention(leaf[0], leaf[1], leaf[2], 0)
        out.backward(wanted)
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=8),
    st.integers(0, 5),
)
def test_equals_the_definition_on_random_packings(pairs: list[tuple[int, int]], padding: int) -> None:
    check_equal_to_plain(pairs, padding)


@pytest.mark.parametrize(
    ("pairs", "padding"),
    [
        ([(7, 7)], 0),  # a prefix alone, filling the batch
        ([(64, 20)], 0),  # one sample fills the batch
        ([(1, 0), (1, 1), (1, 0)], 2),  # samples of one token
        ([(5, 2), (50, 3), (6, 0), (49, 49)], 9),  # several groups, a padded tail
        ([(3, 1), (0, 0), (4, 2)], 0),  # an empty sample between others
    ],
)
def test_equals_the_definition_at_the_edges(pairs: list[tuple[int, int]], padding: int) -> None:
    check_equal_to_plain(pairs, padding)


def test_groups_hold_every_sample_once_and_little_padding() -> None:
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(1))
    groups = similar_lengths(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    for group in groups:
        longest = int(lengths[group].max())
        assert longest <= SHORT or int(lengths[group].min()) >= LEAST_FILL * longest


def test_an_unknown_backend_lists_the_backends() -> None:
    spans = Spans.of_samples(torch.tensor([2]), torch.tensor([1]))
    with pytest.raises(UserError, match="unknown attention backend 'flash'; the backends are plain, grouped, flex"):
        packed_attention(spans, 2, CPU, "flash")
