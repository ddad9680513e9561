from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data import packing_plan
from hrm_text.data.pack import Packing, pack_epoch
from hrm_text.data.packing_plan import attention_work, balance_packing, packing_report, plan_epoch

Lengths = npt.NDArray[np.int64]


def anchor(n: int, seed: int = 0) -> tuple[Lengths, Lengths]:
    """Lengths and prefix lengths like those of the published mixture, responses cut at 4,096 tokens."""
    rng = np.random.default_rng(seed)
    prefixes = np.clip(rng.lognormal(4.6, 1.0, n), 8, 3000).astype(np.int64)
    responses = np.clip(rng.lognormal(4.8, 1.2, n), 1, 4096 - prefixes).astype(np.int64)
    return prefixes + responses - 1, prefixes


def columns_of(plan: Packing) -> list[object]:
    return [plan.step_starts.tolist(), plan.bin_of_sample.tolist(), None if plan.order is None else plan.order.tolist()]


def sums(plan: Packing, step: int, values: Lengths) -> Lengths:
    return np.array([values[samples].sum() for samples in plan[step]])


@given(st.integers(1, 30), st.integers(0, 30))
def test_work_counts_the_pairs_that_see_each_other(length: int, prefix: int) -> None:
    prefix = min(prefix, length)
    pairs = sum(j < prefix if i < prefix else j <= i for i in range(length) for j in range(length))
    assert attention_work(np.array([length]), np.array([prefix])).tolist() == [pairs]


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(40, 90), st.integers(2, 9), st.floats(0.5, 3))
def test_samples_change_steps_within_a_window_alone_and_no_bin_overflows(
    seed: int, n: int, capacity: int, bins: int, skew: float
) -> None:
    rng = np.random.default_rng(seed)
    lengths = 1 + (rng.random(n) ** skew * capacity).astype(np.int64)
    prefixes = (lengths * rng.random(n)).astype(np.int64)
    work = attention_work(lengths, prefixes)
    plain, plan = pack_epoch(lengths, capacity, bins), plan_epoch(lengths, prefixes, capacity, bins)
    assert len(plan) == len(plain)
    placed = [members for step in plan for members in step]
    assert sorted(np.concatenate(placed).tolist()) == list(range(len(lengths)))
    assert all((np.diff(members) > 0).all() for members in placed)
    whole = (len(plan) - 1) // packing_plan._WINDOW * packing_plan._WINDOW
    for step in range(len(plan)):
        tokens, worked = sums(plan, step, lengths), sums(plan, step, work)
        assert tokens.max() <= capacity
        # By falling work: what lies together in a turn is alike, and empty bins come last.
        assert (np.diff(worked) <= 0).all()
        if step >= whole or step % packing_plan._WINDOW == 0:
            before = plain.step_starts[step]
            assert plan.step_starts[step] == before
            assert plan.order is None or (plan.order[:before] < before).all()
        if step >= whole:
            assert worked.max() <= sums(plain, step, work).max()
    assert plan.sums(lengths).tolist() == [sums(plan, step, lengths).tolist() for step in range(len(plan))]


@pytest.fixture(scope="module")
def large() -> tuple[Lengths, Lengths, Packing, Packing]:
    """Lengths, prefix lengths, the packing by tokens alone and the plan."""
    lengths, prefixes = anchor(100_000)
    return lengths, prefixes, pack_epoch(lengths, 12_288, 16), plan_epoch(lengths, prefixes, 12_288, 16)


def test_the_slowest_rank_is_far_less_than_half_as_far_above_the_mean(
    large: tuple[Lengths, Lengths, Packing, Packing],
) -> None:
    lengths, prefixes, plain, plan = large
    report = packing_report(lengths, prefixes, 12_288, 16)
    tokens, balanced = report["tokens"], report["balanced"]
    assert tokens.steps == balanced.steps == len(plain) - 1 > 150
    assert balanced.full == pytest.approx(tokens.full, abs=1e-4)
    assert balanced.full > 0.99
    assert balanced.work_excess <= 0.1 * tokens.work_excess  # promised is a half
    assert balanced.least_excess <= balanced.work_excess
    of_bins = plan.sums(lengths)[:-1]
    assert ((of_bins.max(axis=1) - of_bins.min(axis=1)) / of_bins.mean(axis=1)).max() <= 0.01
    placed = np.concatenate([np.concatenate(step) for step in plan])
    assert np.array_equal(np.sort(placed), np.arange(len(lengths)))


def test_many_bins_that_are_nearly_full_are_regrouped_too() -> None:
    """LPT alone overfills a bin by a few tokens in most windows of so large steps; exchanges mend it."""
    lengths, prefixes = anchor(50_000)
    report = packing_report(lengths, prefixes, 12_288, 64)
    assert report["balanced"].full > 0.997
    assert report["balanced"].work_excess <= 0.2 * report["tokens"].work_excess


def test_steps_stay_alike(large: tuple[Lengths, Lengths, Packing, Packing]) -> None:
    """Few samples change their step, and neither the tokens of a step nor its supervised ones scatter much more."""
    lengths, prefixes, plain, plan = large

    def scatter(packing: Packing, values: Lengths) -> float:
        totals = packing.sums(values)[:-1].sum(axis=1)
        return float(totals.std() / totals.mean())

    step_of = np.empty((2, len(lengths)), np.int64)
    for of_plan, packing in zip(step_of, (plain, plan), strict=True):
        for step in range(len(packing)):
            of_plan[packing.samples(step)] = step
    moved = step_of[0] != step_of[1]
    assert 0 < moved.mean() < 0.3
    assert (step_of[0] // packing_plan._WINDOW == step_of[1] // packing_plan._WINDOW)[: plain.step_starts[-2]].all()
    assert scatter(plan, lengths) <= scatter(plain, lengths)
    assert scatter(plan, lengths - prefixes + 1) <= 1.3 * scatter(plain, lengths - prefixes + 1)
    assert scatter(plan, np.ones_like(lengths)) <= 2 * scatter(plain, np.ones_like(lengths))


def test_the_longest_samples_meet_in_one_step() -> None:
    """Worked by hand: four steps of two bins, one long sample in each of two steps."""
    long, short = [8], [1] * 12
    lengths = np.array(2 * (long + short + [1] * 20) + [1] * 7)
    plan = plan_epoch(lengths, np.zeros_like(lengths), 10, 2)
    steps_of_long = [sum(8 in lengths[members] for members in step) for step in plan]
    assert sorted(steps_of_long) == [0] * (len(plan) - 1) + [2]
    assert [sorted(lengths[members].tolist()) for members in plan[steps_of_long.index(2)]] == [[1, 1, 8], [1, 1, 8]]


def test_where_exchanges_can_do_it_the_order_is_the_epochs() -> None:
    lengths = np.random.default_rng(0).integers(20, 60, 3_000)
    assert plan_epoch(lengths, np.zeros_like(lengths), 1_000, 4).order is None


def test_pieces_of_an_epoch_are_planned_as_the_whole(
    large: tuple[Lengths, Lengths, Packing, Packing], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, prefixes, _, plan = large
    monkeypatch.setattr(packing_plan, "_STEPS_AT_ONCE", 3 * packing_plan._WINDOW)
    assert columns_of(plan_epoch(lengths, prefixes, 12_288, 16)) == columns_of(plan)


def test_a_million_samples_take_well_under_a_minute(large: tuple[Lengths, Lengths, Packing, Packing]) -> None:
    lengths, prefixes, *_ = large
    began = time.process_time()
    plan_epoch(lengths, prefixes, 12_288, 16)  # compiled by now
    assert time.process_time() - began < 3  # a tenth of the samples; 0.3 s on an idle core


def test_nothing_is_cached_where_nothing_can_be_written() -> None:
    """A file that cannot exist stands for a read-only package: root may write to any folder."""
    script = """
        import pathlib, sys
        import numpy as np

        source = pathlib.Path(sys.argv[1]).read_text()
        # One kernel is enough to see that it compiles; all of them are decorated.
        kernels = {"__name__": "kernels"}
        exec(compile(source, "/dev/null/packing_kernels.py", "exec"), kernels)
        assert type(kernels["next_that_fits"]._cache).__name__ == "NullCache"
        lengths = np.array([5, 3, 4])
        print(kernels["next_that_fits"](lengths, np.arange(3), np.ones(3, bool), 4))
    """
    kernels = Path(packing_plan.__file__).with_name("packing_kernels.py")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(kernels)],
        env={"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_the_measures_are_those_of_a_plan_written_out() -> None:
    # Two steps of two bins, and a last one that does not count: 10 | 6 4, 10 | 10, 3.
    lengths = np.array([10, 6, 4, 10, 10, 3])
    report = packing_report(lengths, np.zeros(6, np.int64), 10, 2)["tokens"]
    assert (report.steps, report.full, report.token_spread) == (2, 1.0, 0.0) or report.steps == 1
    plan = pack_epoch(lengths, 10, 2)
    work = attention_work(lengths, np.zeros(6, np.int64))
    excess = [sums(plan, step, work).max() / sums(plan, step, work).mean() - 1 for step in range(len(plan) - 1)]
    assert report.work_excess == pytest.approx(np.mean(excess))


def test_turns_are_measured_one_by_one() -> None:
    lengths, prefixes = anchor(10_000)
    by_turn = packing_report(lengths, prefixes, 12_288, 16, num_ranks=4)
    by_step = packing_report(lengths, prefixes, 12_288, 16)
    assert by_turn["balanced"].work_excess < by_step["balanced"].work_excess
    with pytest.raises(UserError, match="less than one step"):
        packing_report(lengths[:3], prefixes[:3], 12_288, 16)


def test_one_bin_is_left_as_it_is() -> None:
    lengths, prefixes = anchor(500)
    plan = plan_epoch(lengths, prefixes, 12_288, 1)
    assert plan.step_starts.tolist() == pack_epoch(lengths, 12_288, 1).step_starts.tolist()
    assert set(plan.bin_of_sample) == {0}
    assert plan.order is None


class TestCache:
    @pytest.fixture(autouse=True)
    def keep_small_plans(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing_plan, "_WORTH_KEEPING", 10)

    def test_a_plan_is_found_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths, prefixes = anchor(2_000)
        made = plan_epoch(lengths, prefixes, 12_288, 4, tmp_path / "plans")
        (file,) = (tmp_path / "plans").iterdir()
        monkeypatch.setattr(packing_plan, "pack_epoch", lambda *_: pytest.fail("made again"))
        found = plan_epoch(lengths, prefixes, 12_288, 4, tmp_path / "plans")
        assert made.order is not None
        assert made.order.dtype == np.int32
        assert columns_of(found) == columns_of(made)
        monkeypatch.undo()
        file.write_bytes(file.read_bytes()[:-20])
        monkeypatch.setattr(packing_plan, "_WORTH_KEEPING", 10)
        again = plan_epoch(lengths, prefixes, 12_288, 4, tmp_path / "plans")
        assert columns_of(again) == columns_of(made)

    def test_a_plan_in_the_epochs_order_is_found_again_as_one(self, tmp_path: Path) -> None:
        lengths, none = np.full(100, 10), np.zeros(100, np.int64)
        made = plan_epoch(lengths, none, 40, 4, tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        assert made.order is None
        assert columns_of(plan_epoch(lengths, none, 40, 4, tmp_path)) == columns_of(made)

    @pytest.mark.parametrize("damage", ["twice", "beyond", "negative", "short", "type"])
    def test_an_order_that_is_none_is_made_again(self, tmp_path: Path, damage: str) -> None:
        lengths, prefixes = anchor(2_000)
        made = plan_epoch(lengths, prefixes, 12_288, 4, tmp_path)
        (file,) = tmp_path.iterdir()
        with np.load(file) as arrays:
            columns = dict(arrays)
        order = columns["order"]
        if damage == "short":
            columns["order"] = order[:-1]
        elif damage == "type":
            columns["order"] = order.astype(np.float64)
        else:
            order[5] = {"twice": order[6], "beyond": len(order), "negative": -1}[damage]
        np.savez(file, **columns)
        assert columns_of(plan_epoch(lengths, prefixes, 12_288, 4, tmp_path)) == columns_of(made)

    @pytest.mark.parametrize("change", ["length", "prefix", "capacity", "bins", "version"])
    def test_a_plan_of_something_else_is_not(
        self, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths, prefixes = anchor(200)
        plan_epoch(lengths, prefixes, 12_288, 4, tmp_path)
        capacity, bins = 12_288 + (change == "capacity"), 4 + (change == "bins")
        lengths[7] += change == "length"
        prefixes[7] -= change == "prefix"
        if change == "version":
            monkeypatch.setattr(packing_plan, "PLAN_VERSION", 99)
        plan_epoch(lengths, prefixes, capacity, bins, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_folder_that_cannot_hold_it_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        lengths, prefixes = anchor(200)
        plan = plan_epoch(lengths, prefixes, 12_288, 4, tmp_path / "file" / "plans")
        assert columns_of(plan) == columns_of(plan_epoch(lengths, prefixes, 12_288, 4))

    def test_the_same_lengths_give_the_same_plan(self) -> None:
        lengths, prefixes = anchor(3_000)
        packed = pack_epoch(lengths, 12_288, 8)
        before = columns_of(packed)
        one, other = (balance_packing(packed, lengths, prefixes, 12_288) for _ in range(2))
        assert columns_of(one) == columns_of(other) != before
        assert columns_of(packed) == before
