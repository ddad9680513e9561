from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.model.attention import PlainAttention, Spans, prefix_mask

samples = st.lists(st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=5)


def spans_of(pairs: list[tuple[int, int]]) -> Spans:
    lengths, prefixes = (torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for i in (0, 1))
    return Spans.of_samples(lengths, prefixes)


@settings(deadline=None, max_examples=60)
@given(samples, st.integers(0, 3))
def test_the_mask_is_that_of_the_words(pairs: list[tuple[int, int]], padding: int) -> None:
    """Prefix both ways, response causally, nothing across samples, padding nothing: written out as loops."""
    spans = spans_of(pairs)
    total = int(spans.starts[-1]) + padding
    expected = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for length, prefix in pairs:
        for row in range(length):
            for column in range(length):
                expected[start + row, start + column] = column <= row or column < prefix
        start += length
    assert torch.equal(prefix_mask(spans.starts, spans.prefix_lengths, total), expected)


def test_attention_is_a_weighted_mean_of_visible_values_and_padding_gets_zeros() -> None:
    torch.manual_seed(0)
    spans = spans_of([(3, 2), (1, 0)])
    q, k, v = torch.randn(3, 6, 2, 4).unbind(0)
    out = PlainAttention(spans, 6, torch.device("cpu"))(q, k, v, 0)
    seen = {0: [0, 1], 1: [0, 1], 2: [0, 1, 2], 3: [3]}
    for token, visible in seen.items():
        for head in range(2):
            scores = torch.stack([q[token, head] @ k[other, head] / 2.0 for other in visible])  # sqrt(4) = 2
            expected = scores.softmax(0) @ v[visible, head]
            torch.testing.assert_close(out[token, head], expected)
    assert torch.equal(out[4:], torch.zeros(2, 2, 4))


def test_lengths_are_the_distances_of_the_starts() -> None:
    spans = spans_of([(3, 1), (0, 0), (4, 4)])
    assert spans.starts.tolist() == [0, 3, 3, 7]
    assert spans.lengths.tolist() == [3, 0, 4]
