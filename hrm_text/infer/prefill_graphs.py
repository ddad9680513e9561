"""Short prompts on a GPU: the pass over them recorded once for each number of tokens, and replayed.

A pass over a few hundred tokens is a thousand kernels of some microseconds each, which a host launches one by one more
slowly than the GPU computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_text.infer.prefill import Layout
from hrm_text.model.attention import Spans
from hrm_text.model.kernels.tiles import PackedTiles
from hrm_text.model.kernels.transfer import to_device
from hrm_text.model.kernels.triton_attention import TritonAttention, launches, shared_memory
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.plan import Plan
from hrm_text.model.recurrence import RecurrentLM

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
"""Numbers of tokens that are recorded: a pass takes the next larger one. With more the GPU is slower than its host."""

MOST_TEXTS = 32
"""Texts of a recorded pass."""

WIDTH = 4
"""Numbers that a tile of work is told by."""


class GivenTiles(PackedTiles):
    """Tiles of queries in a tensor of fixed size that another batch may be written to; there is no backward pass."""

    def __init__(self, num_tokens: int, own: int, device: torch.device) -> None:
        nothing = torch.zeros(1, dtype=torch.long)
        super().__init__(Spans(nothing, nothing[:0]), num_tokens, device)
        self.own = own
        # At most one tile of a text is not full. Those that are left over have no token, and cost next to nothing.
        self.work = torch.zeros(num_tokens // own + MOST_TEXTS, WIDTH, dtype=torch.int32, device=device)

    def of(self, size: int, *, keys: bool) -> Tensor:
        """See ``PackedTiles``."""
        assert size == self.own and not keys
        return self.work


class PaddedPass:
    """A pass over up to ``size`` new tokens, none of whose kernels knows on the host how many there are.

    Tokens that are left over belong to no text, and their keys and values go to page 0, which is nobody's.
    """

    def __init__(self, model: RecurrentLM, steps: Plan, cache: PagedKeyValues, size: int) -> None:
        self.model, self.steps, self.cache, self.size = model, steps, cache, size
        weight = model.lm_head.weight
        self.device = weight.device
        self.table_4T = torch.zeros(4, size, dtype=torch.long, device=self.device)
        sizes = launches(model.config.head_dim, weight.element_size(), shared_memory(self.device))
        self.tiles = GivenTiles(size, sizes.forward.own, self.device)

    def take(self, layout: Layout) -> None:
        """What the next pass is over."""
        host = torch.device("cpu")
        tiles = PackedTiles(layout.spans, layout.num_tokens, host).of(self.tiles.own, keys=False)
        work = torch.zeros(self.tiles.work.shape, dtype=torch.int32)
        work[: len(tiles)] = tiles
        table_4T = torch.zeros(4, self.size, dtype=torch.long)
        table_4T[:, : layout.num_tokens] = layout.table_4T
        for held, new in ((self.tiles.work, work), (self.table_4T, table_4T)):
            held.copy_(to_device([new], self.device)[0])

    def run(self) -> Tensor:
        """The final state [size, D]."""
        ids_T, positions_T, pages_T, places_T = self.table_4T.unbind(0)
        nothing = torch.zeros(1, dtype=torch.long)
        attention = TritonAttention(
            Spans(nothing, nothing[:0]),
            self.size,
            self.device,
            lambda slot, k_TNH, v_TNH: self.cache.write(slot, pages_T, places_T, k_TNH, v_TNH),
        )
        attention.tiles = self.tiles
        hidden_TD: Tensor = self.model(ids_T, positions_T, attention, steps=self.steps)
        return hidden_TD


class GraphedPrefill:
    """``Recorded`` passes of a model over one cache. A recording is made when its plan and size are first met."""

    def __init__(self, model: RecurrentLM, cache: PagedKeyValues) -> None:
        self.model, self.cache = model, cache
        self._recorded: dict[tuple[Plan, int], tuple[PaddedPass, torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, steps: Plan, layout: Layout) -> Tensor | None:
        """See ``Recorded``."""
        size = next((size for size in SIZES if size >= layout.num_tokens), None)
        if size is None or layout.num_texts > MOST_TEXTS:
            return None
        if (steps, size) not in self._recorded:
            self._recorded[steps, size] = self._record(steps, layout, size)
        padded, graph, hidden_TD = self._recorded[steps, size]
        padded.take(layout)
        graph.replay()
        return hidden_TD

    def _record(self, steps: Plan, layout: Layout, size: int) -> tuple[PaddedPass, torch.cuda.CUDAGraph, Tensor]:
        padded = PaddedPass(self.model, steps, self.cache, size)
        padded.take(layout)
        # A pass twice over changes nothing: the same keys and values go to the same places.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            padded.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_TD = padded.run()
        return padded, graph, hidden_TD
