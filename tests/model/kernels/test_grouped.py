from __future__ import annotations

import torch

from hrm_text.model.kernels.grouped import LEAST_FILL, SHORT, similar_lengths


def test_groups_hold_every_sample_once_and_little_padding() -> None:
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(1))
    groups = similar_lengths(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    for group in groups:
        longest = int(lengths[group].max())
        assert longest <= SHORT or int(lengths[group].min()) >= LEAST_FILL * longest
