from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.model.attention import Spans, prefix_mask
from hrm_text.model.kernels.tiles import PackedTiles

CPU = torch.device("cpu")
SIZE = 8

Samples = list[tuple[int, int]]
"""(length, prefix) of each."""

SAMPLES = st.lists(st.integers(0, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=8)


def spans_of(samples: Samples) -> Spans:
    lengths, prefixes = (torch.tensor([sample[i] for sample in samples], dtype=torch.long) for i in (0, 1))
    return Spans.of_samples(lengths, prefixes)


def tiles_of(spans: Spans, padding: int, keys: bool) -> list[tuple[int, int, int, int]]:
    tiles = PackedTiles(spans, int(spans.starts[-1]) + padding, CPU).of(SIZE, keys=keys)
    assert tiles.dtype == torch.int32 and tiles.shape[1:] == (4,)
    return [tuple(tile) for tile in tiles.tolist()]


def seen_by(tile: tuple[int, int, int, int], keys: bool) -> tuple[range, range]:
    """The rows of a tile and those of the other side that see them or are seen, as a kernel reads the four numbers."""
    start, length, prefix, first = tile
    rows = range(start + first, start + min(first + SIZE, length))
    if keys:  # queries from the first that sees one of these keys
        return rows, range(start + (0 if first < prefix else first), start + length)
    return rows, range(start, start + min(length, max(prefix, first + SIZE)))


@pytest.mark.parametrize("keys", [False, True])
@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.integers(0, 5))
def test_every_visible_pair_is_in_one_tile(keys: bool, samples: Samples, padding: int) -> None:
    spans = spans_of(samples)
    total = int(spans.starts[-1]) + padding
    covered = torch.zeros(total, total, dtype=torch.long)
    for tile in tiles_of(spans, padding, keys):
        own, other = seen_by(tile, keys)
        assert len(own) > 0
        (rows, columns) = (other, own) if keys else (own, other)
        covered[rows.start : rows.stop, columns.start : columns.stop] += 1
    visible = prefix_mask(spans.starts, spans.prefix_lengths, total)
    assert torch.equal(covered[visible], torch.ones_like(covered[visible]))
    assert total == 0 or covered.max() <= 1


@pytest.mark.parametrize("keys", [False, True])
@settings(deadline=None, max_examples=60)
@given(SAMPLES)
def test_tiles_lie_inside_samples_and_those_with_most_work_come_first(keys: bool, samples: Samples) -> None:
    spans = spans_of(samples)
    tiles = tiles_of(spans, 0, keys)
    bounds = {(int(start), length, prefix) for start, (length, prefix) in zip(spans.starts, samples, strict=False)}
    assert all((start, length, prefix) in bounds for start, length, prefix, _ in tiles)
    assert all(first % SIZE == 0 and 0 <= first < length for _, length, _, first in tiles)
    work = [len(seen_by(tile, keys)[1]) for tile in tiles]
    assert work == sorted(work, reverse=True)


def test_a_list_is_made_once() -> None:
    tiles = PackedTiles(spans_of([(9, 2), (4, 4)]), 15, CPU)
    assert tiles.filled == 13
    assert tiles.of(SIZE, keys=True) is tiles.of(SIZE, keys=True)
    assert tiles.of(SIZE, keys=True) is not tiles.of(SIZE, keys=False)
    assert len(tiles.of(16, keys=False)) == 2 and len(tiles.of(SIZE, keys=False)) == 3
