from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from hrm_text.model.attention import Spans, prefix_mask
from hrm_text.model.kernels import flex

CPU = torch.device("cpu")
LISTS = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]
LISTS += [("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")]


def blocks(mask: BlockMask, numbers: str, indices: str) -> list[list[int]]:
    """The blocks that each row of blocks has, in the order in which they are walked."""
    counts, rows = getattr(mask, numbers), getattr(mask, indices)
    assert counts.dtype == rows.dtype == torch.int32
    return [row[:count] for row, count in zip(rows.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=6),
    st.integers(0, 40),
    st.sampled_from([(16, 16), (16, 8), (32, 16)]),
)
def test_the_mask_and_its_blocks_are_those_of_the_definition(
    pairs: list[tuple[int, int]], padding: int, sizes: tuple[int, int]
) -> None:
    lengths, prefixes = (torch.tensor([pair[i] for pair in pairs], dtype=torch.long) for i in (0, 1))
    spans = Spans.of_samples(lengths, prefixes)
    total = int(spans.starts[-1]) + padding
    if total == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "QUERY_BLOCK", sizes[0])
        patch.setattr(flex, "KEY_BLOCK", sizes[1])
        mask = flex.block_mask(spans, total, CPU)
    expected = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=sizes)
    definition = prefix_mask(spans.starts, prefixes, total)
    assert torch.equal(create_mask(mask.mask_mod, None, None, total, total, device="cpu")[0, 0], definition)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert mask.seq_lengths == expected.seq_lengths
    assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for numbers, indices in LISTS:
        assert blocks(mask, numbers, indices) == blocks(expected, numbers, indices)


def test_other_batches_of_one_length_do_not_compile_again() -> None:
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, backend="eager", dynamic=False)
    x = torch.randn(1, 2, 256, 16)
    for compilations, lengths in enumerate([[256], [100, 120], [1, 2, 250]]):
        spans = Spans.of_samples(torch.tensor(lengths), torch.tensor(lengths) // 2)
        with torch._dynamo.config.patch(error_on_recompile=compilations > 0):
            attend(x, x, x, block_mask=flex.block_mask(spans, 256, CPU))
