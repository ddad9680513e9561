from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data.pack import Packing, pack_epoch, read_epoch
from hrm_text.data.storage import read_integers

CAPACITY = 24
lengths_of_an_epoch = st.lists(st.integers(1, CAPACITY), max_size=60).map(lambda lengths: np.array(lengths, np.int64))


def lpt_loads(lengths: npt.NDArray[np.int64], bins: int) -> tuple[int, ...]:
    """LPT written plainly: the longest first, to the first of the least filled bins."""
    loads = [0] * bins
    for length in sorted(lengths.tolist(), reverse=True):
        loads[loads.index(min(loads))] += length
    return tuple(loads)


def best_largest_load(lengths: npt.NDArray[np.int64], bins: int) -> int:
    """The smallest largest load that any assignment reaches, by trying all."""
    return min(
        max(sum(length for length, b in zip(lengths.tolist(), choice, strict=True) if b == i) for i in range(bins))
        for choice in itertools.product(range(bins), repeat=len(lengths))
    )


def loads_of(packing: Packing, step: int, lengths: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(lengths[samples].sum()) for samples in packing[step])


@given(lengths_of_an_epoch, st.integers(1, 5))
def test_every_sample_is_in_one_bin_and_no_bin_overflows(lengths: npt.NDArray[np.int64], bins: int) -> None:
    packing = pack_epoch(lengths, CAPACITY, bins)
    for step, of_step in enumerate(packing):
        assert len(of_step) == bins
        assert max(loads_of(packing, step, lengths)) <= CAPACITY
    placed = [samples for of_step in packing for samples in of_step]
    np.testing.assert_array_equal(np.sort(np.concatenate([*placed, np.empty(0, np.int64)])), np.arange(len(lengths)))


@given(lengths_of_an_epoch, st.integers(1, 5))
def test_steps_are_runs_in_epoch_order_and_bins_keep_that_order(lengths: npt.NDArray[np.int64], bins: int) -> None:
    packing = pack_epoch(lengths, CAPACITY, bins)
    next_sample = 0
    for step, of_step in enumerate(packing):
        run = packing.run(step)
        assert run.start == next_sample
        next_sample = run.stop
        np.testing.assert_array_equal(np.sort(np.concatenate(of_step)), np.arange(run.start, run.stop))
        assert all((np.diff(samples) > 0).all() for samples in of_step)
    assert next_sample == len(lengths)


@given(lengths_of_an_epoch, st.integers(1, 5))
def test_each_step_is_the_run_that_plain_lpt_cannot_extend(lengths: npt.NDArray[np.int64], bins: int) -> None:
    packing = pack_epoch(lengths, CAPACITY, bins)
    for step in range(len(packing)):
        run = packing.run(step)
        assert loads_of(packing, step, lengths) == lpt_loads(lengths[run], bins)
        rest = lengths[run.start :]
        fits = [max(lpt_loads(rest[:n], bins)) <= CAPACITY for n in range(len(rest) + 1)]
        size = run.stop - run.start
        assert size == len(rest) or not fits[size + 1]
        if fits == sorted(fits, reverse=True):  # nearly always; else "largest" is one of several boundaries
            assert size == sum(fits) - 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6).map(np.array), st.integers(1, 3))
def test_a_step_is_within_grahams_bound_of_the_best_assignment(lengths: npt.NDArray[np.int64], bins: int) -> None:
    """LPT's largest load is at most 4/3 - 1/(3 bins) of the optimum (Graham 1969), found here by trying all."""
    best = best_largest_load(lengths, bins)
    roomy = pack_epoch(lengths, int(lengths.sum()), bins)
    assert len(roomy) == 1
    assert max(loads_of(roomy, 0, lengths)) <= best * (4 / 3 - 1 / (3 * bins))


@pytest.mark.parametrize(
    ("lengths", "bins", "expected"),
    [
        ([5, 5, 5, 5], 2, [[[0, 2], [1, 3]]]),
        ([4, 7, 3, 6], 2, [[[1, 2], [0, 3]]]),
        ([10, 1, 10, 9], 1, [[[0]], [[1]], [[2]], [[3]]]),
        ([10, 10, 10], 2, [[[0], [1]], [[2], []]]),
        ([1, 2, 3], 5, [[[2], [1], [0], [], []]]),
        ([], 3, []),
    ],
)
def test_worked_examples(lengths: list[int], bins: int, expected: list[list[list[int]]]) -> None:
    packing = pack_epoch(np.array(lengths, np.int64), 10, bins)
    assert [[samples.tolist() for samples in of_step] for of_step in packing] == expected


@pytest.mark.parametrize(("bins", "capacity"), [(1, 12_288), (16, 12_288), (4, 4_096)])
def test_lognormal_lengths_fill_more_than_99_percent(bins: int, capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(3.8, 0.8, 40_000).astype(np.int64), 2, 4_096)
    packing = pack_epoch(lengths, capacity, bins)
    full_steps = len(packing) - 1
    filled = lengths[: packing.step_starts[full_steps]].sum() / (full_steps * bins * capacity)
    assert full_steps > 5
    assert filled > 0.99, f"{filled:.2%}"


def test_the_bins_of_a_step_hold_nearly_the_same_number_of_tokens() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(3.8, 0.8, 40_000).astype(np.int64), 2, 4_096)
    packing = pack_epoch(lengths, 12_288, 16)
    for step in range(len(packing) - 1):
        loads = loads_of(packing, step, lengths)
        assert max(loads) - min(loads) <= 12_288 / 1000


def test_a_step_can_be_counted_from_the_end_but_not_beyond_either() -> None:
    packing = pack_epoch(np.full(5, 10), 10, 2)
    assert [samples.tolist() for samples in packing[-1]] == [[4], []]
    assert [[samples.tolist() for samples in of_step] for of_step in packing[1:]] == [[[2], [3]], [[4], []]]
    for step in (3, -4):
        with pytest.raises(IndexError):
            packing[step]


def test_a_sample_longer_than_a_bin_is_named() -> None:
    with pytest.raises(UserError, match=r"sample 2 has 1,025 tokens, a micro-batch holds 1,024"):
        pack_epoch(np.array([3, 1024, 1025]), 1024, 4)


def write_index(folder: Path, **columns: npt.NDArray[np.generic]) -> None:
    folder.mkdir()
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint16])
def test_the_index_reads_any_integer_type_as_int64(tmp_path: Path, dtype: type) -> None:
    write_index(
        tmp_path / "epoch_3",
        inst_start=np.array([0, 9, 4], dtype),
        inst_len=np.array([2, 1, 3], dtype),
        resp_start=np.array([2, 10, 7], dtype),
        resp_len=np.array([2, 1, 0], dtype),
    )
    index = read_epoch(tmp_path, 3)
    assert index.resp_start.dtype == np.int64
    assert index.resp_start.tolist() == [2, 10, 7]
    assert index.sample_lengths.tolist() == [3, 1, 3]


def test_index_files_of_different_lengths_are_named(tmp_path: Path) -> None:
    write_index(
        tmp_path / "epoch_0",
        **{
            name: np.zeros(2 + (name == "resp_len"), np.int64)
            for name in ("inst_start", "inst_len", "resp_start", "resp_len")
        },
    )
    with pytest.raises(UserError, match=r"epoch_0: .*inst_start 2, inst_len 2, resp_start 2, resp_len 3 rows"):
        read_epoch(tmp_path, 0)


def test_an_empty_array_reads_as_empty(tmp_path: Path) -> None:
    np.save(tmp_path / "empty.npy", np.empty(0, np.int64))
    assert read_integers(tmp_path / "empty.npy").shape == (0,)


def test_unusable_arrays_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "square.npy", np.zeros((3, 3), np.int64))
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "cut.npy", np.zeros(1000, np.int64))
    with (tmp_path / "cut.npy").open("r+b") as file:
        file.truncate(900)
    for name, message in (
        ("floats", "expected a row of integers, found float64"),
        ("square", r"shape \(3, 3\)"),
        ("text", "not a readable .npy file"),
        ("cut", "not a readable .npy file"),
        ("absent", "no such file"),
    ):
        with pytest.raises(UserError, match=rf"{name}.npy: .*{message}"):
            read_integers(tmp_path / f"{name}.npy")
