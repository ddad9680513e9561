"""The budget's counts against counts by hand and against the real thing, its model against what was measured."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from hrm_text import cli
from hrm_text.contracts import UserError
from hrm_text.model.attention import Spans
from hrm_text.model.config import RECURRENCE, ModelConfig, preset
from hrm_text.model.kernels import why_not_triton
from hrm_text.model.plan import training_flops
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.recipes import budget_gpus as rates
from hrm_text.recipes import budget_run
from hrm_text.recipes.bench_attention import visible_pairs
from hrm_text.recipes.budget import Budget, budget, parameters_by_part
from hrm_text.recipes.budget_estimate import Estimate, attention_flops
from hrm_text.recipes.budget_gpus import GPUS, find_gpu
from hrm_text.recipes.budget_measurements import EXCHANGES, MEASUREMENTS, ExchangeMeasurement, Measurement, predict
from hrm_text.recipes.budget_memory import Recompute, Setup, kept_bytes, moments, peak_memory
from hrm_text.recipes.budget_network import Group, Network, exchange, groups, unit_seconds
from hrm_text.recipes.budget_run import Question, read_config, shares_of_k
from hrm_text.recipes.budget_speed import backward_bytes, forward_bytes, product, step_time
from hrm_text.recipes.budget_tables import show
from hrm_text.recipes.budget_work import Work, synthetic_work, tile_pairs
from hrm_text.recipes.synthetic import synthetic_spans
from hrm_text.settings import read_yaml, with_options
from hrm_text.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
XL = preset("XL")
NEVER_SLOW = Network(1e18, 1e18)


def config(name: str = "XL", *options: str) -> TrainConfig:
    return read_config(with_options(read_yaml(ROOT / "configs" / f"{name}.yaml"), options, name), name)[0]


def estimate(name: str = "XL", *options: str, **question: Any) -> Estimate:
    [found] = budget(config(name, *options), Question(**question)).estimates
    return found


def command(*arguments: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `hrm-text budget`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(["budget", *map(str, arguments)])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


def fails(*arguments: Any) -> str:
    code, out, err = command(*arguments)
    assert (code, out) == (1, ""), err
    return " ".join(err.split())


# -------------------------------------------------------------------------------------------- against measurements ---


@pytest.mark.parametrize("row", MEASUREMENTS, ids=lambda row: row.name)
def test_the_model_meets_what_was_measured(row: Measurement) -> None:
    found = predict(row)
    assert found.ms == pytest.approx(row.measured_ms, rel=0.15)
    if row.gib is not None and row.ours:  # others keep what their code keeps
        assert found.gib == pytest.approx(row.gib, rel=0.10)
    if row.launch_ms is not None:
        assert found.launch_ms == pytest.approx(row.launch_ms, rel=0.15)


def test_most_rows_had_no_part_in_setting_the_rates() -> None:
    ours = [row for row in MEASUREMENTS if row.ours]
    assert sum(row.fitted for row in ours) <= 4 < sum(not row.fitted for row in ours)
    assert {row.size for row in ours if not row.fitted} >= {"XL", "L", "B"}
    assert {row.sharding for row in ours if row.gpus > 1 and not row.fitted} >= {"ddp", "fsdp"}


def test_the_documentation_shows_the_table_of_today() -> None:
    lines = [
        "| | GPUs | measured, ms | predicted | | measured, GiB | predicted | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in MEASUREMENTS:
        found = predict(row)
        name = row.name + (" (rates were set by it)" if row.fitted else "")
        time = f"{row.measured_ms:.0f} | {found.ms:.0f} | {found.ms / row.measured_ms - 1:+.1%}"
        memory = " | | "
        if row.gib is not None:
            memory = f"{row.gib:.1f} | {found.gib:.1f} | {found.gib / row.gib - 1:+.1%}"
        lines.append(f"| {name} | {row.gpus} {row.gpu.upper()} | {time} | {memory} |")
    documented(lines)


def documented(lines: list[str]) -> None:
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "budget.md").read_text(), f"put this into docs/budget.md:\n{table}"


@pytest.mark.parametrize("row", EXCHANGES, ids=lambda row: f"{row.name} of a {row.unit}, {row.gpus}")
def test_the_model_meets_exchanges_by_themselves(row: ExchangeMeasurement) -> None:
    assert row.predicted_ms == pytest.approx(row.ms, rel=0.03 if row.fitted else 0.15)


def test_the_documentation_shows_exchanges_of_today() -> None:
    lines = ["| | measured, ms | predicted | |", "|---|---:|---:|---:|"]
    for row in EXCHANGES:
        name = f"{row.name}, {'bf16' if row.element_bytes == 2 else 'fp32'}, {row.unit}"
        name += f", {row.gpus} GPUs" if row.gpus > 2 else ""
        name += " (rates were set by it)" if row.fitted else ""
        lines.append(f"| {name} | {row.ms:.3f} | {row.predicted_ms:.3f} | {row.predicted_ms / row.ms - 1:+.1%} |")
    documented(lines)


def test_the_documentation_shows_the_scaling_of_today() -> None:
    lines = [
        "| GPUs | sharding | tokens a step | passes of a GPU | GiB of a GPU | tokens/s | a GPU, of one alone "
        "| exchange, ms a step | exposed, ms | lost beside it, ms | days | dollars |",
        "|" + "---:|" * 12,
    ]
    found = budget(config("XL"), Question(gpus=(1, 2, 8, 16, 64), gpu="h200", tokens=56e9)).estimates
    for one in found:
        share = one.tokens_per_second / one.gpus / found[0].tokens_per_second
        sharding = "-" if one.gpus == 1 else one.sharding.partition(",")[0]
        lines.append(
            f"| {one.gpus} | {sharding} | {one.micro_batches * one.tokens_per_batch:,} | {one.passes} | {one.gib:.1f} "
            f"| {one.tokens_per_second:,.0f} | {share:.1%} | {one.exchange_ms:.0f} | {one.exposed_ms:.1f} "
            f"| {one.ms_by_part.get('exchange, contention', 0):.0f} | {one.days:.3g} | {one.dollars:,.0f} |"
        )
    documented(lines)


# ------------------------------------------------------------------------------------------------------- parameters ---


@pytest.mark.parametrize("architecture", RECURRENCE)
def test_parameters_are_those_of_a_built_model(architecture: Any) -> None:
    model = preset("tiny", architecture=architecture, vocab_size=300)
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in RecurrentLM(model).parameters())
    assert sum(parameters_by_part(model).values()) == built


def test_operations_are_those_of_the_plan_and_of_the_visible_pairs() -> None:
    found = estimate("XL", gpus=(16,))
    assert [cost.k for cost in found.costs] == [2, 3, 4, 5]
    work = synthetic_work("anchor", 12_288).times(16)
    for cost in found.costs:
        flops = training_flops(XL, cost.k, round(work.tokens), round(work.supervised))
        assert cost.gflop_per_token == pytest.approx(flops / work.tokens / 1e9)
    # One layer called once: 4 operations a pair and number forward, 8 backward.
    model = preset("tiny", architecture="transformer", num_layers=1)
    assert attention_flops(model, 1, Work(10, 5, 7, 0, 0, 0, 0)) == 12 * 64 * 7


@pytest.mark.parametrize("steps", [7, 1000])
def test_shares_of_k_are_those_of_the_trainer(steps: int) -> None:
    settings = config("XL")
    counted = Counter(settings.credit.at(step, steps, 5) for step in range(steps))
    assert shares_of_k(settings, XL, steps) == {k: counted[k] / steps for k in sorted(counted)}
    assert shares_of_k(config("B_trm"), preset("B", architecture="trm"), steps) == {2: 1.0}
    long = shares_of_k(settings, XL, 300_000)
    assert sum(long.values()) == pytest.approx(1) and long[5] == pytest.approx(0.8, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- work ---


def test_pairs_and_tiles_by_hand() -> None:
    lengths, prefixes = np.array([3, 2]), np.array([2, 0])
    # Two prefix tokens see both, the third sees three; then one sees one and one two.
    work = Work.of(lengths, prefixes, 4)
    assert (work.tokens, work.supervised, work.pairs) == (5, 4, 4 + 3 + 1 + 2)
    assert work.forward_tiles == 2 * 64 * 32 and work.key_tiles == 2 * 64 * 64
    # 100 tokens without a prefix: rows 0 to 63 see 64 keys, the others 100, which is 4 tiles of 32.
    assert tile_pairs(np.array([100]), np.array([0]), 64, 32) == 64 * 64 + 64 * 128
    assert tile_pairs(np.array([100]), np.array([0]), 64, 64, keys=True) == 64 * 128 + 64 * 64
    assert tile_pairs(np.array([100]), np.array([100]), 64, 64, keys=True) == 2 * 64 * 128


def test_tiles_hold_what_the_kernels_walk_over() -> None:
    from hrm_text.model.kernels.tiles import PackedTiles

    spans = synthetic_spans("anchor", 4096, seed=3)
    lengths, prefixes = spans.lengths.numpy(), spans.prefix_lengths.numpy()
    assert Work.of(lengths, prefixes, 0).pairs == visible_pairs(spans)
    work = PackedTiles(spans, 4096, torch.device("cpu")).of(64, keys=False).numpy().astype(np.int64)
    _, length, prefix, first = work.T
    seen = np.minimum(length, np.maximum(prefix, first + 64))
    assert tile_pairs(lengths, prefixes, 64, 32) == 64 * 32 * int(np.ceil(seen / 32).sum())


# ----------------------------------------------------------------------------------------------------------- memory ---


@pytest.mark.skipif(bool(why_not_triton()), reason="needs Triton")
@pytest.mark.parametrize("recompute", ["none", "some", "full"])
def test_a_block_keeps_what_is_counted(recompute: Recompute) -> None:
    from hrm_text.model.block import rotary_table
    from hrm_text.model.kernels.fused import fuse
    from hrm_text.model.kernels.triton_attention import TritonAttention

    model = ModelConfig(
        architecture="transformer", hidden_size=32, num_layers=4, num_heads=2, head_dim=16, inner_multiple=8,
        vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = build(model, device=device)
    fuse(lm, recompute=recompute)
    spans = Spans.of_samples(torch.tensor([5, 3]), torch.tensor([2, 0]))
    attention = TritonAttention(spans, 8, torch.device(device))
    rotary = rotary_table(torch.arange(8, device=device), 16, 1e4)
    for layer, block in enumerate(lm.model.stack("S").layers):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):  # type: ignore[misc]
            block(torch.randn(8, 32, device=device, requires_grad=True), rotary, attention, layer)
        tables = {table.data_ptr() for table in rotary}
        found = sum(x.numel() * x.element_size() for x in kept if x.data_ptr() not in tables) / 8
        counted = kept_bytes(Setup(model, recompute=recompute), layer)
        small = 0 if recompute == "full" else 2 * 4 + 4 * 2  # fp32 on a GPU as well
        assert found == 2 * (counted - small) + small, layer  # the test is in fp32


def test_memory_by_hand() -> None:
    # No activations, no sums: two bytes of weight, fourteen of remainder, moments and average.
    model = preset("tiny", architecture="transformer", num_layers=1, vocab_size=256)
    *_, last = moments(Setup(model), 1, Work(0, 0, 0, 0, 0, 0, 0))
    P = model.num_parameters
    assert last == {"weights": 2 * P, "moments and averages": 14 * P, "gradients": 2 * P}
    *_, last = moments(Setup(model, ranks=4, local_ranks=4, shards=4), 1, Work(0, 0, 0, 0, 0, 0, 0))
    assert last == {"weights": P, "moments and averages": 3 * P, "gradients": P}
    *_, last = moments(Setup(model, ranks=4, local_ranks=4, shards=1), 1, Work(0, 0, 0, 0, 0, 0, 0))
    assert sum(last.values()) == 20 * P
    *_, last = moments(Setup(model, passes=2), 1, Work(0, 0, 0, 0, 0, 0, 0))
    assert last["gradients"] == 4 * P


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_are_all_there_in_the_end(shards: int, passes: int) -> None:
    # Followed unit by unit along the backward pass, they have to come to the count of all parameters.
    work = synthetic_work("anchor", 12_288)
    *_, end, _ = moments(Setup(XL, passes=passes, ranks=4, local_ranks=4, shards=shards), 5, work)
    table = XL.vocab_size * XL.hidden_size
    waiting = 2 * table + (4 * table if passes > 1 else 0)  # the embedding's leaves last
    assert end["gradients"] == pytest.approx(4 / shards * (XL.num_parameters - table) + waiting)


def total(setup: Setup, k: int = 5) -> float:
    return sum(peak_memory(setup, k, synthetic_work("anchor", 12_288)).values())


def test_memory_grows_with_what_is_kept_and_shrinks_with_what_is_shared() -> None:
    full, some, none = (total(Setup(XL, recompute=name)) for name in ("full", "some", "none"))
    assert full < some < none < total(Setup(XL, "compiled", "none"))
    assert total(Setup(XL, "compiled", "full")) < total(Setup(XL, "compiled", "none"))
    by_ranks = [total(Setup(XL, ranks=n, local_ranks=n, shards=n)) for n in (2, 4, 8)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    assert by_ranks[0] < total(Setup(XL, ranks=2, local_ranks=2, shards=1))
    assert total(Setup(XL, passes=2)) - some == pytest.approx(4 * XL.num_parameters, rel=0.02)
    by_k = [total(Setup(XL), k) for k in (2, 3, 4, 5)]
    assert by_k == sorted(by_k)


# ------------------------------------------------------------------------------------------------------------ speed ---


def test_bytes_of_the_passes_of_a_block_by_hand() -> None:
    # Width 1,536 on both sides, inner width 4,096: 5 D + 4 A + 3 I forward, 8 D + 5 A + 6 I backward, 2 bytes each.
    assert forward_bytes(Setup(XL)) == 2 * (9 * 1536 + 3 * 4096)
    assert backward_bytes(Setup(XL)) == 2 * (13 * 1536 + 6 * 4096)
    assert backward_bytes(Setup(XL, recompute="none")) == 2 * (13 * 1536 + 5 * 4096)


def test_a_product_is_bound_by_its_operations_or_by_its_bytes() -> None:
    gpu = find_gpu("h200")
    deep = product(8192, 8192, 8192, gpu.product_flops, gpu)
    assert deep == pytest.approx(2 * 8192**3 / (0.745 * 989e12) * (1 + 80 / 8192))
    thin = product(1, 8192, 8192, gpu.product_flops, gpu)
    assert thin == pytest.approx(2 * 8192 * 8194 / (0.833 * 4.8e12), rel=1e-3)


def test_small_batches_wait_for_the_host() -> None:
    gpu = find_gpu("h200")
    small, large = (
        step_time(Setup(XL), 5, synthetic_work("anchor", tokens), gpu, NEVER_SLOW, host_load=1.0)
        for tokens in (1024, 12_288)
    )
    assert small.waits_for_host and small.seconds == small.host == pytest.approx(large.host, rel=0.02)
    assert not large.waits_for_host and large.seconds == sum(large.parts.values())


def test_each_part_of_the_time_follows_its_own_count() -> None:
    gpu, work = find_gpu("h200"), synthetic_work("anchor", 12_288)
    by_k = {k: step_time(Setup(XL), k, work, gpu, NEVER_SLOW).parts for k in (4, 5)}
    assert by_k[4]["optimizer, averages"] == by_k[5]["optimizer, averages"]
    assert by_k[4]["matrix products"] < by_k[5]["matrix products"]
    fp8 = step_time(Setup(XL, fp8=True), 5, work, gpu, NEVER_SLOW).parts
    assert (
        fp8["matrix products"] < 0.6 * by_k[5]["matrix products"] and fp8["passes between"] > by_k[5]["passes between"]
    )
    shared = step_time(Setup(XL, ranks=8, local_ranks=8, shards=8), 5, work, gpu, NEVER_SLOW).parts
    assert shared["optimizer, averages"] < by_k[5]["optimizer, averages"] / 6
    full = step_time(Setup(XL, recompute="full"), 5, work, gpu, NEVER_SLOW).parts
    assert full["attention"] / by_k[5]["attention"] == pytest.approx(1.2, abs=0.05)  # 80 more forward calls beside 128


# ---------------------------------------------------------------------------------------------------------- network ---


def test_a_ring_by_hand() -> None:
    network = Network(link=400e9, between=50e9)
    latency = rates.COLLECTIVE_SECONDS
    assert Group(1, 1).seconds(1e9, network) == 0
    assert Group(2, 2).seconds(8e9, network) == pytest.approx(4e9 / (0.565 * 400e9) + latency)
    # Four machines of two: two adapters each, seven eighths of the bytes, six more hops.
    expected = 7e9 / (0.8 * 100e9) + latency + 6 * rates.HOP_SECONDS
    assert Group(8, 2).seconds(8e9, network) == pytest.approx(expected)
    assert Group(8, 2).seconds(8e9, network, times=2) == pytest.approx(2 * expected)


def test_an_all_to_all_by_hand() -> None:
    network = Network(link=400e9, between=50e9)
    latency = rates.COLLECTIVE_SECONDS
    assert Group(1, 1).all_to_all_seconds(1e9, network) == 0
    assert Group(2, 2).all_to_all_seconds(8e9, network) == pytest.approx(4e9 / (0.565 * 400e9) + latency)
    # Four machines of two: six eighths of a rank's bytes leave by its own adapter.
    expected = 6e9 / (0.8 * 50e9) + latency + 6 * rates.HOP_SECONDS
    assert Group(8, 2).all_to_all_seconds(8e9, network) == pytest.approx(expected)
    # Adapters as fast as need be leave the links as the bound.
    fast = Network(link=400e9, between=4e12)
    expected = 7e9 / (0.565 * 400e9) + latency + 6 * rates.HOP_SECONDS
    assert Group(8, 2).all_to_all_seconds(8e9, fast) == pytest.approx(expected)


def test_gradients_travel_in_bf16_where_shards_of_one_pass_do() -> None:
    network, unit = Network(450e9, 50e9), 10**8
    pair: dict[str, Any] = {"ranks": 2, "local_ranks": 2}
    in_fp32 = Group(2, 2).seconds(4 * unit, network)
    assert unit_seconds(Setup(XL, **pair, shards=2), unit, network)[1] < 0.55 * in_fp32
    assert unit_seconds(Setup(XL, **pair, shards=2, passes=2), unit, network)[1] == in_fp32
    assert unit_seconds(Setup(XL, **pair, shards=2, bf16_gradients=False), unit, network)[1] == in_fp32
    assert unit_seconds(Setup(XL, **pair), unit, network) == (0, 2 * in_fp32)  # ddp: an all-reduce
    # Two machines of two: the shard of each travels in bf16, its sum in fp32.
    machines = Setup(XL, ranks=4, local_ranks=2, shards=2)
    expected = Group(2, 2).all_to_all_seconds(2 * unit, network) + Group(2, 1).seconds(2 * unit, network, times=2)
    assert unit_seconds(machines, unit, network)[1] == pytest.approx(expected)
    gpu, work = find_gpu("h200"), synthetic_work("anchor", 12_288)
    for passes, summed in ((1, True), (2, False)):
        parts = step_time(Setup(XL, **pair, shards=2, passes=passes), 5, work, gpu, network).parts
        assert ("sums over ranks" in parts) == summed
    parts = step_time(Setup(XL, **pair, shards=2), 5, work, gpu, network).parts
    assert parts["sums over ranks"] == pytest.approx((2 + 4 / 2) * XL.num_parameters / (0.2 * 4.8e12))


def test_computing_is_slower_beside_what_it_hides() -> None:
    blocks: dict[str, float] = {"forward": 2e-3, "backward": 3e-3, "head": 8e-3}
    near = exchange(Setup(XL, ranks=2, local_ranks=2, shards=2), 5, Network(450e9, 50e9), **blocks)
    assert near.on_links == pytest.approx(near.total)
    assert near.lost == pytest.approx(1.6 * (near.total - near.exposed))
    # By adapters one waits longer, and each second of that costs less; the more of them, the more it costs.
    far = [
        exchange(Setup(XL, ranks=2, local_ranks=1, shards=2), 5, Network(450e9, between), **blocks)
        for between in (50e9, 25e9)
    ]
    in_fp32 = Setup(XL, ranks=2, local_ranks=2, shards=2, bf16_gradients=False)
    for found in far:  # between machines gradients are fp32
        assert found.on_links == pytest.approx(exchange(in_fp32, 5, Network(450e9, 50e9), **blocks).on_links)
        assert 0.5 < found.lost / (found.total - found.exposed) < 0.8
    assert near.lost < far[0].lost < far[1].lost
    assert exchange(Setup(XL), 5, Network(450e9, 50e9), **blocks).lost == 0


def test_the_groups_of_a_mesh() -> None:
    assert groups(Setup(XL, ranks=16, local_ranks=8, shards=16)) == (Group(16, 8), Group(1, 1))
    assert groups(Setup(XL, ranks=16, local_ranks=8, shards=8)) == (Group(8, 8), Group(2, 1))
    assert groups(Setup(XL, ranks=16, local_ranks=8, shards=4)) == (Group(4, 4), Group(4, 2))
    assert groups(Setup(XL, ranks=8, local_ranks=8, shards=1)) == (Group(1, 1), Group(8, 8))


def exposed(network: Network, **setup: Any) -> float:
    return exchange(Setup(XL, **setup), 5, network, forward=2e-3, backward=3e-3, head=8e-3).exposed


def test_what_is_exposed_is_what_nothing_is_left_to_hide() -> None:
    pair: dict[str, Any] = {"ranks": 2, "local_ranks": 2, "shards": 2}
    fast, slow = Network(450e9, 50e9), Network(10e9, 50e9)
    # The embedding comes first in the forward pass and last in the backward pass, and one block beside it.
    table, block = XL.vocab_size * XL.hidden_size, XL.block_parameters

    def sent(parameters: int) -> float:
        return Group(2, 2).seconds(2 * parameters, fast)

    least = 2 * (sent(table) + sent(block))
    assert exposed(fast, **pair) == pytest.approx(least)
    found = exchange(Setup(XL, **pair), 5, slow, forward=2e-3, backward=3e-3, head=8e-3)
    assert exposed(fast, **pair) < found.exposed < found.total
    # A rank keeps its half, and sends of the rest each weight and each gradient in 2 bytes, a sum of passes in 4.
    assert found.sent_bytes == pytest.approx((2 + 2) * XL.num_parameters / 2)
    summed = exchange(Setup(XL, **pair, passes=2), 5, slow, forward=2e-3, backward=3e-3, head=8e-3)
    assert summed.sent_bytes == pytest.approx((2 + 4) * XL.num_parameters / 2)
    assert exchange(Setup(XL), 5, slow, forward=1, backward=1, head=1).total == 0


def test_with_two_calls_nothing_of_the_embedding_is_sent_back() -> None:
    pair = Setup(XL, ranks=2, local_ranks=2, shards=2)
    network = Network(450e9, 50e9)
    two, five = (exchange(pair, k, network, forward=2e-3, backward=3e-3, head=8e-3) for k in (2, 5))
    assert five.sent_bytes - two.sent_bytes == pytest.approx(2 * XL.vocab_size * XL.hidden_size / 2)


# --------------------------------------------------------------------------------------------------------- estimate ---


def test_more_gpus_are_faster_and_hold_less() -> None:
    found = budget(config("XL"), Question(gpus=(1, 2, 8, 16, 64), gpu="h200"))
    one, *more = found.estimates
    for fewer, many in zip(found.estimates, more, strict=False):
        assert many.gib <= fewer.gib and many.days < fewer.days and many.tokens_per_second > fewer.tokens_per_second
        assert 0.8 < many.tokens_per_second / many.gpus / (one.tokens_per_second / one.gpus) < 1.1
    assert [e.micro_batches for e in found.estimates] == [16, 16, 16, 16, 64]
    assert [e.passes for e in found.estimates] == [16, 8, 2, 1, 1]
    assert any("More than 16 GPUs" in note for note in found.assumptions)
    slow = budget(config("XL"), Question(gpus=(16,), gpu="h200", network_gbps=10)).estimates[0]
    assert slow.tokens_per_second < 0.9 * found.estimates[3].tokens_per_second
    assert slow.exposed_ms > 10 * found.estimates[3].exposed_ms


def test_days_dollars_and_checkpoints_follow_from_speed_and_size() -> None:
    found = estimate("XL", gpus=(16,), tokens=56e9, price=3.0)
    tokens_per_step = synthetic_work("anchor", 12_288).tokens * 16
    assert found.steps == -(-56e9 // tokens_per_step)
    assert found.days * 86_400 * found.tokens_per_second == pytest.approx(56e9, rel=1e-3)
    assert found.dollars == pytest.approx(found.days * 24 * 16 * 3.0)
    assert found.checkpoints.gib == pytest.approx(16 * XL.num_parameters / 2**30)
    assert found.checkpoints.count == -(-found.steps // 1000)
    two = estimate("XL", gpus=(2,), gpu="h200").checkpoints  # as measured
    assert two.copy_seconds == pytest.approx(0.2, rel=0.15)
    assert two.first_copy_seconds == pytest.approx(4.9, rel=0.15)
    assert found.checkpoints.kept_gib == pytest.approx(3 * found.checkpoints.gib)
    assert 0.2 < found.mfu < 0.6
    short = estimate("XL", "--max_steps", "100", gpus=(16,))
    assert short.steps == 100 and short.tokens == pytest.approx(100 * tokens_per_step)
    often = estimate("XL", "--checkpoint.every_minutes", "1", gpus=(16,))
    assert often.checkpoints.count > 5 * found.checkpoints.count


def test_passes_and_batches_of_a_rank() -> None:
    found = estimate("XL", "--data.at_once", "4", gpus=(2,), gpu="b200")
    assert (found.passes, found.at_once) == (2, 4)
    assert found.gib > 2 * estimate("XL", gpus=(2,), gpu="b200").gib
    assert estimate("XL", "--data.at_once", "64", gpus=(8,), gpu="b200").at_once == 2
    # 16 micro-batches over 3 ranks: the slowest has 6.
    assert estimate("XL", gpus=(3,), gpu="h200").passes == 6


def test_what_is_offered_is_computed_and_fits() -> None:
    tight = budget(config("XL"), Question(gpus=(4,), gpu="rtx-4090"))
    assert not tight.estimates[0].fits and tight.options
    for option in tight.options:
        assert option.estimate.fits
        given = [word for change in option.changes for word in change.split()]
        gpus = int(given.pop(given.index("--gpus") + 1)) if "--gpus" in given else 4
        again = estimate("XL", *(word for word in given if word != "--gpus"), gpus=(gpus,), gpu="rtx-4090")
        assert again.gib == pytest.approx(option.estimate.gib, rel=0.02)
        assert again.tokens_per_second == pytest.approx(option.estimate.tokens_per_second, rel=0.05)
    roomy = budget(config("XL"), Question(gpus=(16,), gpu="h200"))
    assert roomy.estimates[0].fits and roomy.options
    assert all(o.estimate.fits and o.estimate.days < roomy.estimates[0].days for o in roomy.options)
    hopeless = budget(config("XL", "--data.micro_batches", "1"), Question(gpus=(1,), gpu="rtx-3090"))
    assert not hopeless.estimates[0].fits


def test_the_data_is_read_where_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, (500, 2))
    starts = (lengths.ravel().cumsum() - lengths.ravel()).reshape(500, 2)
    for epoch in range(2):
        (tmp_path / f"epoch_{epoch}").mkdir()
        for column, part in enumerate(("inst", "resp")):
            np.save(tmp_path / f"epoch_{epoch}" / f"{part}_start.npy", starts[:, column])
            np.save(tmp_path / f"epoch_{epoch}" / f"{part}_len.npy", lengths[:, column])
    metadata: dict[str, Any] = {"tokenizer_info": {"vocab_size": 200}, "vocab_size": None, "max_seq_len": 501}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    settings = config(
        "B", "--data.sampled", str(tmp_path), "--data.tokens_per_batch", "4096", "--data.micro_batches", "2"
    )
    found = budget(settings, Question(gpus=(2,)))
    tokens = 2 * (lengths.sum() - 500)  # the last token of a response is no input
    assert found.estimates[0].tokens == tokens
    assert found.estimates[0].steps == -(-tokens // (2 * 4096 * 0.99))
    assert found.parameters["head"] == 256 * 1024
    prefix, length = lengths[:, 0], lengths.sum(1) - 1
    pairs = (prefix**2 + (length * (length + 1) - prefix * (prefix + 1)) // 2).sum()
    costs = found.estimates[0].costs[-1]
    model = preset("B", vocab_size=256)
    expected = attention_flops(model, 5, Work(1, 1, pairs / length.sum(), 0, 0, 0, 0)) / 1e9
    assert costs.attention_gflop_per_token == pytest.approx(expected)
    assert not any("not looked at" in note for note in found.assumptions)


def test_records_for_fine_tuning_are_weighed(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(b"x" * 4_000_000)
    found = estimate("sft", "--data.records", str(tmp_path / "my.jsonl"))
    assert found.tokens == pytest.approx(5 * 1e6)


# ---------------------------------------------------------------------------------------------------------- command ---


def test_what_is_said_again_here_is_what_the_kernels_say() -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from hrm_text.model.kernels import float8, fused

    assert budget_run.FLOAT8_MULTIPLE == float8.MULTIPLE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (XL, preset("XL", norm="post"), preset("XL", head_dim=96), preset("XL", head_dim=512)):
        fusible = fused.why_not_fused(model, device) is None
        assert (budget_run.blocks_of(config("XL"), model) == "fused") == fusible


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_budget(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)  # where none of its data is
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(path)
    assert code == 0, err
    assert re.search(r"It (fits|does not fit): [\d,.]+ of 79.1 GiB", out)
    assert max(map(len, out.splitlines())) <= 80 or str(path) in out.splitlines()[0]
    assert all(word in out for word in ("parameters", "GFLOP/token", "memory of a GPU", "tokens/s", "MFU", "GPU-hours"))
    code, out, err = command(path, "--json")
    assert code == 0, err
    [estimates] = json.loads(out)["estimates"]
    assert estimates["gib"] == pytest.approx(sum(estimates["gib_by_part"].values()))
    assert estimates["fits"] == (estimates["gib"] <= estimates["gpu_gib"])


def shown(found: Budget) -> list[str]:
    console = Console(width=80, file=io.StringIO(), record=True)
    show(found, console)
    return console.export_text().splitlines()


def test_tables_are_whole_at_80_columns() -> None:
    wide = budget(config("XL"), Question(gpus=(1, 2, 8, 16, 64, 1024), gpu="h200"), "title")
    tight = budget(config("XL"), Question(gpus=(4,), gpu="rtx-4090"), "title")
    for lines in (shown(wide), shown(tight)):
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
    assert sum(line.split()[:1] == ["1024"] for line in shown(wide)) == 1


def test_settings_and_options_go_together() -> None:
    code, out, err = command(
        ROOT / "configs/B.yaml",
        "--data.micro_batches",
        "32",
        "--gpus",
        "32",
        "--json",
        "--recompute",
        "full",
        "--price=1",
    )
    assert code == 0, err
    [found] = json.loads(out)["estimates"]
    assert (found["gpus"], found["micro_batches"], found["recompute"]) == (32, 32, "full")
    assert found["dollars"] == pytest.approx(found["days"] * 24 * 32)


def test_the_help_names_the_options() -> None:
    for arguments in (["--help"], [ROOT / "configs/B.yaml", "--help"]):
        code, out, _ = command(*arguments)
        assert code == 0 and "--network-gbps" in out and "--gpus-per-node" in out and "--overrides" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "unknown GPU 'h300'; did you mean 'h200'? choose from " + ", ".join(GPUS)),
        (["--gpus", "0"], "--gpus: expected numbers of at least 1"),
        (["--gpus", "many"], "--gpus: expected a number such as 16"),
        (["--gpus", "64"], "64 GPUs cannot share 16 micro-batches of 12,288 tokens; take at most 16, or add "
         "--data.micro_batches 64 (with --data.tokens_per_batch 3072 the global batch of 196,608 tokens stays"),
        (["--gpus", "12"], "12 GPUs are no whole machines of 8"),
        (["--price", "0"], "--price: expected more than 0, found 0.0"),
        (["--tokens", "0"], "--tokens: expected at least 1"),
        (["--lengths", "longest"], "unknown distribution 'longest'; choose from anchor"),
        (["--fp8", "true", "--gpu", "a100"], "A100 does not multiply in FP8"),
        (["--fp8", "true", "--model.norm", "post"], "products in FP8 need fused blocks"),
        (["--fp8", "true", "--model.hidden_size", "1000"], "multiples of 64, and the model has 1000"),
        (["--device", "cpu"], "a budget is of GPUs"),
        (["--dtype", "float32"], "training in bfloat16"),
        (["--blocks", "plain"], "fused and compiled blocks, found 'plain'"),
        (["--blocks", "fused", "--model.norm", "post"], "cannot be fused"),
        (["--blocks", "compiled", "--recompute", "some"], "'some' needs fused blocks"),
        (["--data.micro_batch", "3"], "unknown key 'data.micro_batch'; did you mean 'micro_batches'?"),
        (["--gpus", "16", "--distributed.sharding", "hsdp", "--distributed.shard_ranks", "3"], "be shared out by 3"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    assert message in fails(ROOT / "configs/XL.yaml", *arguments)


def test_numbers_of_a_table_that_cannot_be_had_are_named() -> None:
    found = budget(config("XL"), Question(gpus=(8, 12)))
    assert [e.gpus for e in found.estimates] == [8] and list(found.errors) == [12]
    assert any("12 GPUs are no whole machines" in " ".join(line.split()) for line in shown(found))
    with pytest.raises(UserError, match="no whole machines"):
        budget(config("XL"), Question(gpus=(12, 20)))
