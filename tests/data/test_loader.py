from __future__ import annotations

import json
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.contracts import IGNORE_INDEX, PackedBatch, UserError
from hrm_text.data.loader import Loader, LoaderState, LoaderStep
from hrm_text.data.packing_plan import plan_epoch

VOCAB = 200
MAX_SEQ_LEN = 33


@dataclass(frozen=True)
class Sample:
    prefix: list[int]
    response: list[int]


def write_sampled(
    folder: Path,
    epochs: list[list[Sample]],
    dtype: npt.DTypeLike = np.uint16,
    index_dtype: npt.DTypeLike = np.int64,
    first_epoch: int = 0,
    gap: int = 3,
) -> Path:
    """A sampled folder with the samples scattered over the token file, unused tokens between them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens: list[int] = [VOCAB - 1] * gap
    for number, samples in enumerate(epochs, first_epoch):
        columns: dict[str, list[int]] = {"inst_start": [], "inst_len": [], "resp_start": [], "resp_len": []}
        for sample in reversed(samples):
            for name, ids in (("resp", sample.response), ("inst", sample.prefix)):
                columns[f"{name}_start"].append(len(tokens))
                columns[f"{name}_len"].append(len(ids))
                tokens += ids + [VOCAB - 1] * gap
        (folder / f"epoch_{number}").mkdir()
        for name, column in columns.items():
            np.save(folder / f"epoch_{number}" / f"{name}.npy", np.array(column[::-1], index_dtype))
    np.save(folder / "tokens.npy", np.array(tokens, dtype))
    metadata = {
        "tokenizer_info": {"vocab_size": VOCAB, "eoa": "<|box_end|>"},
        "vocab_size": None,
        "max_seq_len": MAX_SEQ_LEN,
        "total_length": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def random_samples(seed: int, n: int) -> list[Sample]:
    """Prefixes of one token, responses of one token and prefixes alone are among them."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            rng.integers(0, VOCAB - 1, rng.integers(1, 16)).tolist(),
            rng.integers(0, VOCAB - 1, rng.integers(0, 16)).tolist(),
        )
        for _ in range(n)
    ]


def naive_batch(samples: list[Sample], mask: str, supervise: str, size: int | None) -> dict[str, list[int]]:
    """What a packed batch of these samples is, token by token."""
    batch: dict[str, list[int]] = {
        "input_ids": [], "labels": [], "position_ids": [], "sample_starts": [0], "prefix_lengths": []
    }  # fmt: skip
    for sample in samples:
        sequence = sample.prefix + sample.response
        inputs = sample.prefix + sample.response[:-1]
        for i, token in enumerate(inputs):
            batch["input_ids"].append(token)
            batch["position_ids"].append(i)
            is_last_of_all = i + 1 == len(sequence)
            predicts_response = i + 1 >= len(sample.prefix)
            supervised = not is_last_of_all and (predicts_response or supervise == "all")
            batch["labels"].append(sequence[i + 1] if supervised else -100)
        batch["sample_starts"].append(len(batch["input_ids"]))
        batch["prefix_lengths"].append(len(sample.prefix) if mask == "prefix" else 0)
    while size is not None and len(batch["input_ids"]) < size:
        batch["input_ids"].append(0)
        batch["position_ids"].append(0)
        batch["labels"].append(-100)
    return batch


def assert_is(batch: PackedBatch, expected: dict[str, list[int]]) -> None:
    for field in fields(PackedBatch):
        found = getattr(batch, field.name)
        assert found.dtype == np.int64, field.name
        assert found.tolist() == expected[field.name], field.name


def assert_same(one: LoaderStep, other: LoaderStep) -> None:
    assert (one.supervised, one.samples, one.tokens) == (other.supervised, other.samples, other.tokens)
    assert len(one.batches) == len(other.batches)
    for a, b in zip(one.batches, other.batches, strict=True):
        assert_is(a, {field.name: getattr(b, field.name).tolist() for field in fields(PackedBatch)})


def samples_in(batch: PackedBatch) -> list[list[int]]:
    bounds = zip(batch.sample_starts[:-1], batch.sample_starts[1:], strict=True)
    return [batch.input_ids[start:end].tolist() for start, end in bounds]


def labelled_samples(batch: PackedBatch) -> list[tuple[list[int], list[int], list[int], int]]:
    """All that a batch says of each sample: ids, labels, positions, prefix length."""
    bounds = zip(batch.sample_starts[:-1], batch.sample_starts[1:], batch.prefix_lengths, strict=True)
    columns = (batch.input_ids, batch.labels, batch.position_ids)
    found = [(*(column[start:end].tolist() for column in columns), int(prefix)) for start, end, prefix in bounds]
    return [(ids, labels, positions, prefix) for ids, labels, positions, prefix in found]


class TestBatches:
    @pytest.mark.parametrize("mask", ["prefix", "causal"])
    @pytest.mark.parametrize("supervise", ["response", "all"])
    @pytest.mark.parametrize("pad", [False, True])
    def test_equal_a_naive_loop(self, tmp_path: Path, mask: Any, supervise: Any, pad: bool) -> None:
        epochs = [random_samples(seed, 60) for seed in (0, 1)]
        sampled = write_sampled(tmp_path, epochs)
        loader = Loader(sampled, tokens_per_batch=64, bins=1, mask=mask, supervise=supervise, pad=pad)
        left = [list(samples) for samples in epochs]
        for step, _ in loader:
            epoch = 0 if left[0] else 1
            (batch,) = step.batches
            # One bin keeps the epoch's order, so the next samples are the ones that the batch must hold.
            taken = [left[epoch].pop(0) for _ in range(batch.num_samples)]
            expected = naive_batch(taken, mask, supervise, 64 if pad else None)
            assert_is(batch, expected)
            assert step.supervised == batch.num_supervised
            assert (step.samples, step.tokens) == (batch.num_samples, batch.num_tokens)
            assert step.tokens == sum(len(s.prefix) + max(len(s.response) - 1, 0) for s in taken)
        assert left == [[], []]

    def test_micro_batches_hold_the_samples_that_packing_gave_them(self, tmp_path: Path) -> None:
        samples = random_samples(4, 150)
        lengths = np.array([len(s.prefix) + max(len(s.response) - 1, 0) for s in samples])
        packing = plan_epoch(lengths, np.array([len(s.prefix) for s in samples]), 40, 3)
        assert packing.order is not None  # steps are no longer runs of the epoch
        loader = Loader(write_sampled(tmp_path, [samples]), tokens_per_batch=40, bins=3)
        assert loader.total_steps == len(packing) > 5
        for (step, _), bins in zip(loader, packing, strict=True):
            for batch, members in zip(step.batches, bins, strict=False):
                assert_is(batch, naive_batch([samples[i] for i in members], "prefix", "response", None))
            assert all(len(members) == 0 for members in bins[len(step.batches) :])
            assert step.supervised == sum(len(samples[i].response) for members in bins for i in members)
            assert step.supervised == sum(batch.num_supervised for batch in step.batches)
            assert step.samples == sum(batch.num_samples for batch in step.batches)
            assert step.tokens == sum(batch.num_tokens for batch in step.batches)

    @settings(max_examples=25, deadline=None)
    @given(
        dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]),
        index_dtype=st.sampled_from([np.int64, np.uint64, np.int32, np.uint16]),
        seed=st.integers(0, 2**32),
        n=st.integers(1, 30),
        gap=st.integers(0, 2),
    )
    def test_read_stores_of_any_integer_type(
        self, tmp_path_factory: pytest.TempPathFactory, dtype: type, index_dtype: type, seed: int, n: int, gap: int
    ) -> None:
        samples = random_samples(seed, n)
        sampled = write_sampled(tmp_path_factory.mktemp("sampled"), [samples], dtype, index_dtype, gap=gap)
        ((step, _),) = Loader(sampled, tokens_per_batch=2000, bins=1)
        assert_is(step.batches[0], naive_batch(samples, "prefix", "response", None))

    def test_worked_example_of_the_short_cases(self, tmp_path: Path) -> None:
        samples = [
            Sample([6, 8, 50, 7], [51, 52, 11]),
            Sample([6, 8, 60, 7], [11]),  # nothing but the end token
            Sample([6, 8, 7], []),  # a prefix alone
            Sample([6], [53, 11]),  # a prefix of one token
            Sample([6], [11]),
            Sample([7], []),
        ]
        ((step, _),) = Loader(write_sampled(tmp_path, [samples]), tokens_per_batch=32, bins=1)
        (batch,) = step.batches
        ignored = IGNORE_INDEX
        assert batch.input_ids.tolist() == [6, 8, 50, 7, 51, 52, 6, 8, 60, 7, 6, 8, 7, 6, 53, 6, 7]
        assert batch.labels.tolist() == [
            *(ignored, ignored, ignored, 51, 52, 11),
            *(ignored, ignored, ignored, 11),
            *(ignored, ignored, ignored),
            *(53, 11),
            11,
            ignored,
        ]
        assert batch.sample_starts.tolist() == [0, 6, 10, 13, 15, 16, 17]
        assert batch.prefix_lengths.tolist() == [4, 4, 3, 1, 1, 1]
        assert step.supervised == 3 + 1 + 2 + 1

    def test_supervising_everything_labels_all_but_what_follows_a_lone_prefix(self, tmp_path: Path) -> None:
        samples = [Sample([6, 8, 7], [51, 11]), Sample([6, 8, 7], []), Sample([6], [])]
        loader = Loader(write_sampled(tmp_path, [samples]), tokens_per_batch=32, bins=1, supervise="all")
        ((step, _),) = loader
        assert step.batches[0].labels.tolist() == [8, 7, 51, 11, 8, 7, IGNORE_INDEX, IGNORE_INDEX]
        assert step.supervised == 6

    def test_padding_is_inert_and_belongs_to_no_sample(self, tmp_path: Path) -> None:
        samples = random_samples(3, 40)
        for step, _ in Loader(write_sampled(tmp_path, [samples]), tokens_per_batch=50, bins=2, pad=True):
            for batch in step.batches:
                assert len(batch.input_ids) == len(batch.labels) == len(batch.position_ids) == 50
                tail = slice(batch.num_tokens, None)
                assert set(batch.input_ids[tail]) | set(batch.position_ids[tail]) <= {0}
                assert (batch.labels[tail] == IGNORE_INDEX).all()

    @pytest.mark.parametrize("first_epoch", [0, 1])
    def test_epochs_are_read_in_numeric_order(self, tmp_path: Path, first_epoch: int) -> None:
        epochs = [[Sample([number], [number, 0])] for number in range(12)]
        sampled = write_sampled(tmp_path, epochs, first_epoch=first_epoch)
        loader = Loader(sampled, tokens_per_batch=4)
        assert [int(step.batches[0].input_ids[0]) for step, _ in loader] == list(range(12))
        assert [int(s.batches[0].input_ids[0]) for s, _ in Loader(sampled, tokens_per_batch=4, epochs=3)] == [0, 1, 2]


class TestRanks:
    @pytest.mark.parametrize(("bins", "num_ranks"), [(4, 1), (4, 2), (4, 4), (6, 3)])
    def test_share_every_sample_of_the_global_batch(self, tmp_path: Path, bins: int, num_ranks: int) -> None:
        sampled = write_sampled(tmp_path, [random_samples(5, 101)])
        alone = Loader(sampled, tokens_per_batch=40, bins=bins)
        ranks = [
            Loader(sampled, tokens_per_batch=40, bins=bins, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
        ]
        assert {loader.total_steps for loader in ranks} == {alone.total_steps}
        for (whole, state), *shares in zip(alone, *ranks, strict=True):
            assert {after for _, after in shares} == {state}
            assert len({len(share.batches) for share, _ in shares}) == 1
            for share, _ in shares:
                assert (share.supervised, share.samples, share.tokens) == (
                    whole.supervised,
                    whole.samples,
                    whole.tokens,
                )
            # Rank r holds the micro-batches r, r + num_ranks, ...: taken in turn they are the global batch again.
            dealt = [batch for turn in zip(*(share.batches for share, _ in shares), strict=True) for batch in turn]
            filled = [batch for batch in dealt if batch.num_samples]
            assert [samples_in(batch) for batch in filled] == [samples_in(batch) for batch in whole.batches]
            assert sum(batch.num_supervised for batch in dealt) == whole.supervised
            assert sum(batch.num_samples for batch in dealt) == whole.samples

    @pytest.mark.parametrize("bins", [4, 5, 12])
    @pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
    @pytest.mark.parametrize("at_once", [1, 2, 4])
    @pytest.mark.parametrize("pad", [False, True])
    def test_and_passes_change_nothing_of_what_a_step_holds(
        self, tmp_path: Path, bins: int, num_ranks: int, at_once: int, pad: bool
    ) -> None:
        sampled = write_sampled(tmp_path, [random_samples(7, 203), random_samples(8, 31)])
        one_by_one = Loader(sampled, tokens_per_batch=40, bins=bins)
        ranks = [
            Loader(sampled, tokens_per_batch=40, bins=bins, at_once=at_once, pad=pad, rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]
        turns = -(-bins // num_ranks)
        assert {loader.tokens_per_pass for loader in ranks} == {40 * min(at_once, turns)}
        for (whole, state), *shares in zip(one_by_one, *ranks, strict=True):
            assert {(after, s.supervised, s.samples, s.tokens) for s, after in shares} == {
                (state, whole.supervised, whole.samples, whole.tokens)
            }
            filled_turns = -(-len(whole.batches) // num_ranks)
            assert {len(share.batches) for share, _ in shares} == {-(-filled_turns // min(at_once, turns))}
            expected = sorted(sample for batch in whole.batches for sample in labelled_samples(batch))
            batches = [batch for share, _ in shares for batch in share.batches]
            assert sorted(sample for batch in batches for sample in labelled_samples(batch)) == expected
            for batch in batches:
                assert len(batch.input_ids) == (40 * min(at_once, turns) if pad else batch.num_tokens)
                assert batch.num_tokens <= 40 * at_once

    def test_consecutive_micro_batches_of_a_rank_share_a_pass(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [random_samples(9, 120)])
        alone = next(iter(Loader(sampled, tokens_per_batch=40, bins=7)))[0].batches
        assert len(alone) == 7
        for rank, passes in ((0, [[0, 2], [4, 6]]), (1, [[1, 3], [5]])):
            step, _ = next(iter(Loader(sampled, tokens_per_batch=40, bins=7, at_once=2, rank=rank, num_ranks=2)))
            for batch, parts in zip(step.batches, passes, strict=True):
                assert labelled_samples(batch) == [sample for b in parts for sample in labelled_samples(alone[b])]

    @pytest.mark.parametrize(("at_once", "batches"), [(1, [8, 1]), (3, [3, 1])])
    def test_no_batch_is_empty_for_one_rank_alone(self, tmp_path: Path, at_once: int, batches: list[int]) -> None:
        sampled = write_sampled(tmp_path, [[Sample([1], [2, 3])] * 9])
        steps = [step for step, _ in Loader(sampled, tokens_per_batch=2, bins=8, at_once=at_once)]
        assert [len(step.batches) for step in steps] == batches
        assert all(batch.num_samples for step in steps for batch in step.batches)

    def test_a_rank_without_a_micro_batch_of_its_own_in_a_turn_gets_an_empty_one(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [[Sample([1], [2, 3])] * 10])
        for rank, filled in ((0, [1, 1, 1]), (1, [1, 1, 0])):
            steps = [step for step, _ in Loader(sampled, tokens_per_batch=2, bins=5, rank=rank, num_ranks=2)]
            assert [[batch.num_samples for batch in step.batches] for step in steps] == [filled, filled]

    def test_a_rank_with_nothing_left_keeps_step_with_an_empty_batch(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [[Sample([1], [2, 3])] * 9])
        for pad, size in ((False, 0), (True, 2)):
            loader = Loader(sampled, tokens_per_batch=2, bins=8, rank=1, num_ranks=2, pad=pad)
            last = [step for step, _ in loader][-1]
            assert [batch.num_samples for batch in last.batches] == [0]
            assert (last.samples, last.supervised) == (1, 2)
            assert_is(last.batches[0], naive_batch([], "prefix", "response", size))


class TestResuming:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_at_any_step_yields_exactly_what_would_have_come(self, tmp_path: Path, workers: int) -> None:
        sampled = write_sampled(tmp_path, [random_samples(seed, 30) for seed in range(3)])
        shape: dict[str, Any] = {"tokens_per_batch": 40, "bins": 2, "workers": workers}
        whole = list(Loader(sampled, **shape))
        assert len(whole) == Loader(sampled, **shape).total_steps
        states = [LoaderState(), *(state for _, state in whole)]
        assert len(set(states)) == len(whole) + 1
        assert {state.epoch for state in states} == {0, 1, 2, 3}
        for done, state in enumerate(states):
            restored = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
            rest = list(Loader(sampled, **shape, state=restored))
            assert [after for _, after in rest] == states[done + 1 :]
            for (resumed, _), (uninterrupted, _) in zip(rest, whole[done:], strict=True):
                assert_same(resumed, uninterrupted)

    def test_the_end_of_an_epoch_is_the_beginning_of_the_next(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [random_samples(seed, 10) for seed in range(2)])
        loader = Loader(sampled, tokens_per_batch=40)
        at_end = Loader(sampled, tokens_per_batch=40, state=LoaderState(0, loader.steps_per_epoch[0]))
        assert at_end.state == LoaderState(1, 0)

    def test_steps_are_counted_per_epoch(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [random_samples(seed, n) for seed, n in ((0, 10), (1, 40))])
        loader = Loader(sampled, tokens_per_batch=40)
        after = [state for _, state in loader]
        assert loader.steps_per_epoch == (
            after.index(LoaderState(1, 0)) + 1,
            len(after) - after.index(LoaderState(1, 0)) - 1,
        )
        assert loader.total_steps == len(after)

    @pytest.mark.parametrize("state", [LoaderState(0, 9_999), LoaderState(2, 1), LoaderState(7, 0)])
    def test_beyond_the_data_is_refused(self, tmp_path: Path, state: LoaderState) -> None:
        sampled = write_sampled(tmp_path, [random_samples(seed, 10) for seed in range(2)])
        with pytest.raises(UserError, match=rf"loader state epoch {state.epoch}, step {state.step}: .*has 2 epochs of"):
            Loader(sampled, tokens_per_batch=40, state=state)

    @pytest.mark.parametrize("values", [{}, {"epoch": 0}, {"epoch": 0, "step": -1}, {"epoch": 0, "step": "3"}])
    def test_a_damaged_state_is_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="expected whole numbers from 0 under epoch and step"):
            LoaderState.from_dict(values)


class TestWorkers:
    def test_give_the_same_batches_whatever_their_number(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [random_samples(seed, 80) for seed in range(2)])
        alone, *others = (list(Loader(sampled, tokens_per_batch=48, bins=2, workers=workers)) for workers in (0, 1, 4))
        for other in others:
            assert [state for _, state in other] == [state for _, state in alone]
            for (a, _), (b, _) in zip(alone, other, strict=True):
                assert_same(a, b)

    def test_leave_no_thread_behind_when_stopped_early(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [random_samples(0, 80)])
        before = threading.active_count()
        steps = iter(Loader(sampled, tokens_per_batch=48, workers=3))
        next(steps)
        assert threading.active_count() > before
        del steps
        assert threading.active_count() == before

    def test_pass_errors_on(self, tmp_path: Path) -> None:
        sampled = write_sampled(tmp_path, [[Sample([1], [2, 3]), Sample([VOCAB], [3, 4])]])
        steps = iter(Loader(sampled, tokens_per_batch=2, workers=2))
        next(steps)
        with pytest.raises(UserError, match=rf"tokens.npy: token id {VOCAB}, .* has {VOCAB} entries"):
            next(steps)


class TestErrors:
    @pytest.fixture
    def sampled(self, tmp_path: Path) -> Path:
        return write_sampled(tmp_path / "sampled", [random_samples(seed, 10) for seed in range(2)])

    def test_metadata(self, sampled: Path) -> None:
        path = sampled / "metadata.json"
        metadata = json.loads(path.read_text())
        for change, message in (
            ({"max_seq_len": None}, "max_seq_len: expected int, found None"),
            ({"tokenizer_info": 3}, "tokenizer_info: expected dict, found 3"),
            ({"tokenizer_info": {}}, "expected a number under vocab_size"),
        ):
            path.write_text(json.dumps({**metadata, **change}))
            with pytest.raises(UserError, match=rf"metadata.json: .*{message}"):
                Loader(sampled, tokens_per_batch=64)
        path.write_text(json.dumps({key: value for key, value in metadata.items() if key != "max_seq_len"}))
        with pytest.raises(UserError, match=r"metadata.json: max_seq_len: .*found no such key"):
            Loader(sampled, tokens_per_batch=64)

    def test_what_the_metadata_says_is_known(self, sampled: Path) -> None:
        loader = Loader(sampled, tokens_per_batch=64)
        assert (loader.vocab_size, loader.max_seq_len) == (VOCAB, MAX_SEQ_LEN)
        assert loader.tokenizer_info["eoa"] == "<|box_end|>"
        path = sampled / "metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 512}))
        assert Loader(sampled, tokens_per_batch=64).vocab_size == 512

    @pytest.mark.parametrize("name", ["metadata.json", "tokens.npy", "epoch_0/inst_start.npy", "epoch_1/resp_len.npy"])
    def test_missing_files(self, sampled: Path, name: str) -> None:
        (sampled / name).unlink()
        with pytest.raises(UserError, match=rf"{name}: no such file"):
            Loader(sampled, tokens_per_batch=64)

    def test_missing_epochs(self, sampled: Path) -> None:
        with pytest.raises(UserError, match=r"epochs: .* holds 2, found 3"):
            Loader(sampled, tokens_per_batch=64, epochs=3)
        (sampled / "epoch_1").rename(sampled / "epoch_2")
        with pytest.raises(UserError, match="epoch_1 is missing between epoch_0 and epoch_2"):
            Loader(sampled, tokens_per_batch=64)
        for number in (0, 2):
            (sampled / f"epoch_{number}").rename(sampled / f"part_{number}")
        with pytest.raises(UserError, match="no folder epoch_<n>"):
            Loader(sampled, tokens_per_batch=64)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("inst_start", 10**6, r"inst_start.npy: row 4: tokens 1,000,000 to .* outside the"),
            ("resp_start", -1, r"resp_start.npy: row 4: tokens -1 to"),
            ("inst_len", 0, r"inst_len.npy: row 4: expected at least 1, found 0"),
            ("resp_len", -2, r"resp_len.npy: row 4: expected at least 0, found -2"),
            ("resp_len", MAX_SEQ_LEN, r"epoch_1: row 4: .* max_seq_len 33"),
        ],
    )
    def test_rows_that_cannot_be(self, sampled: Path, name: str, value: int, message: str) -> None:
        path = sampled / "epoch_1" / f"{name}.npy"
        column = np.load(path)
        column[4] = value
        np.save(path, column)
        with pytest.raises(UserError, match=message):
            Loader(sampled, tokens_per_batch=64)

    def test_index_files_of_different_lengths(self, sampled: Path) -> None:
        path = sampled / "epoch_0" / "inst_len.npy"
        np.save(path, np.load(path)[:-1])
        with pytest.raises(UserError, match=r"epoch_0: .*inst_len 9"):
            Loader(sampled, tokens_per_batch=64)

    def test_an_epoch_without_samples(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"epoch_0: no samples"):
            Loader(write_sampled(tmp_path, [[]]), tokens_per_batch=64)

    def test_a_sample_longer_than_a_batch(self, sampled: Path) -> None:
        with pytest.raises(UserError, match=r"epoch_0: sample \d has .* a micro-batch holds 12"):
            Loader(sampled, tokens_per_batch=12)

    @pytest.mark.parametrize(
        ("settings_", "message"),
        [
            ({"mask": "both"}, "mask: expected one of prefix, causal; found 'both'"),
            ({"supervise": "prompt"}, "supervise: expected one of response, all; found 'prompt'"),
            (
                {"bins": 3, "num_ranks": 4},
                "bins: a step of 3 micro-batches .* raise data.micro_batches to a multiple of 4",
            ),
            ({"at_once": 0}, "at_once: expected at least 1, found 0"),
            ({"rank": 2, "bins": 2, "num_ranks": 2}, "rank: expected 0 to 1, found 2"),
            ({"bins": 0}, "bins: expected at least 1, found 0"),
            ({"workers": -1}, "workers: expected at least 0, found -1"),
            ({"epochs": 0}, "epochs: .* found 0"),
        ],
    )
    def test_settings_out_of_range(self, sampled: Path, settings_: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Loader(sampled, **{"tokens_per_batch": 64, **settings_})
