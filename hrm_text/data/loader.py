"""Loading: packed batches of a sampled folder, each a pure function of (epoch, step)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import IGNORE_INDEX, PackedBatch, UserError
from hrm_text.data.pack import EpochIndex, Packing, read_epoch
from hrm_text.data.packing_plan import plan_epoch
from hrm_text.data.storage import Location, location, names_in, read_json_at, under
from hrm_text.data.token_files import Tokens, open_tokens

Mask = Literal["prefix", "causal"]
Supervise = Literal["response", "all"]

_CHECKED_ROWS = 1 << 20
"""Rows of an index that are checked at a time: a whole epoch's would take gigabytes."""

PAD_ID = 0
"""Input id of padding. No sample attends to it and no loss falls on it, so any id that every vocabulary has will do."""


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The next step to be yielded: all it takes to resume."""

    epoch: int = 0
    """Counted from 0 over the epochs trained on."""
    step: int = 0
    """Counted from 0 within the epoch."""

    def to_dict(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderState:
        """The state that ``to_dict`` wrote.

        Raises:
            UserError: other keys, or values that are not whole numbers from 0.
        """
        if set(values) != {"epoch", "step"} or not all(type(v) is int and v >= 0 for v in values.values()):
            raise UserError(f"loader state: expected whole numbers from 0 under epoch and step, found {dict(values)}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class LoaderStep:
    """One global batch, as one rank sees it."""

    batches: list[PackedBatch]
    """What this rank computes, one forward pass each; the same number on every rank."""
    supervised: int
    """Supervised positions of the global batch, over all ranks: what the loss is divided by."""
    samples: int
    """Samples of the global batch."""
    tokens: int
    """Input tokens of the global batch, padding not counted."""


class Loader:
    """Iterates over the global batches of a sampled folder and yields this rank's share of each.

    A global batch is ``bins`` micro-batches of at most ``tokens_per_batch`` tokens, balanced by tokens and by the work
    of attention (``packing_plan``, which moves samples by a few steps for it); rank r gets the micro-batches r,
    r + num_ranks, r + 2 * num_ranks, ..., and lays ``at_once`` of them end to end for one forward pass. Which samples a
    step holds depends on ``tokens_per_batch`` and ``bins`` alone, never on the ranks or the passes.

    Where ``bins`` is no multiple of the ranks, and in the last step of an epoch, which holds what is left, some ranks
    have fewer micro-batches than others: their last pass holds fewer, or no sample at all, so that the ranks stay in
    step. Passes in which no rank has a sample are left out: one rank alone never sees an empty batch.

    Iterating yields (step, state after it). Every iteration begins at ``state``.

    Args:
        sampled: a sampled folder, as a path or a URL: ``tokens.npy`` or ``token_files.json``, ``metadata.json``,
            ``epoch_<n>/``.
        tokens_per_batch: token budget of a micro-batch.
        bins: micro-batches of a global batch over all ranks, at least one for each; a multiple of ``num_ranks`` leaves
            no rank idle.
        at_once: micro-batches of this rank that make one batch; no more are taken than a rank has in a step.
        rank: of this process, from 0.
        num_ranks: processes that share each global batch.
        epochs: how many of the epochs to train on; None is all there are.
        mask: "prefix" lets a prefix attend to itself in both directions, "causal" makes every prefix length 0.
        supervise: "response" labels the tokens of the response alone, "all" every token after the first.
        pad: whether every batch is padded to ``tokens_per_pass``, for a compiled model that wants one shape.
        workers: threads that assemble batches ahead; the batches do not depend on it.
        state: where to begin.
        plans: folder to keep the plans of large epochs in; by default ``packing`` in a sampled folder on this machine.

    Raises:
        UserError: a setting out of range, a file that is missing or damaged, rows that point outside the tokens, a
            sample longer than a micro-batch, a state beyond the end of its epoch.
    """

    def __init__(
        self,
        sampled: Location,
        *,
        tokens_per_batch: int,
        bins: int = 1,
        at_once: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        epochs: int | None = None,
        mask: Mask = "prefix",
        supervise: Supervise = "response",
        pad: bool = False,
        workers: int = 0,
        state: LoaderState | None = None,
        plans: Path | None = None,
    ) -> None:
        for name, value, least in (
            ("tokens_per_batch", tokens_per_batch, 1),
            ("bins", bins, 1),
            ("at_once", at_once, 1),
            ("num_ranks", num_ranks, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise UserError(f"{name}: expected at least {least}, found {value}")
        if bins < num_ranks:
            raise UserError(
                f"bins: a step of {bins} micro-batches leaves some of {num_ranks} ranks without any; "
                f"raise data.micro_batches to a multiple of {num_ranks}, or take fewer ranks"
            )
        if not 0 <= rank < num_ranks:
            raise UserError(f"rank: expected 0 to {num_ranks - 1}, found {rank}")
        _check_choice("mask", mask, get_args(Mask))
        _check_choice("supervise", supervise, get_args(Supervise))

        self.sampled = sampled = location(sampled)
        self.at_once = min(at_once, -(-bins // num_ranks))
        self.tokens_per_pass = self.at_once * tokens_per_batch
        """Most tokens of a batch that is yielded, and the size of all of them where they are padded."""
        self.rank, self.num_ranks = rank, num_ranks
        self.mask, self.supervise, self.pad, self.workers = mask, supervise, pad, workers

        metadata = read_metadata(under(sampled, "metadata.json"))
        self.tokenizer_info: dict[str, Any] = metadata["tokenizer_info"]
        self.vocab_size: int = metadata["vocab_size"]
        """Entries of the tokenizer; every token id is below it."""
        self.max_seq_len: int = metadata["max_seq_len"]
        """Most tokens of a prefix and its response together; the model's context is one less: the last is no input."""

        self._tokens = open_tokens(sampled)
        if plans is None and isinstance(sampled, Path):
            plans = sampled / "packing"
        self._indices: list[EpochIndex] = []
        self._packings: list[Packing] = []
        for epoch in _choose_epochs(sampled, epochs):
            folder = under(sampled, f"epoch_{epoch}")
            index = read_epoch(sampled, epoch)
            _check_index(index, folder, self._tokens, self.max_seq_len)
            lengths = index.sample_lengths
            prefixes = np.zeros_like(lengths) if mask == "causal" else index.inst_len
            try:
                packing = plan_epoch(lengths, prefixes, tokens_per_batch, bins, plans)
            except UserError as error:
                raise UserError(f"{folder}: {error}") from None
            self._indices.append(index)
            self._packings.append(packing)
        self.state = self._normalised(state or LoaderState())

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Steps of each epoch: they differ a little, since every epoch draws its own samples."""
        return tuple(len(packing) for packing in self._packings)

    @property
    def total_steps(self) -> int:
        """Steps of all epochs together, from the beginning."""
        return sum(self.steps_per_epoch)

    def __iter__(self) -> Iterator[tuple[LoaderStep, LoaderState]]:
        positions = self._positions_from(self.state)
        if self.workers == 0:
            for epoch, step in positions:
                yield self.load(epoch, step), self._normalised(LoaderState(epoch, step + 1))
            return
        ahead: deque[tuple[LoaderState, Future[LoaderStep]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        try:
            for epoch, step in positions:
                ahead.append((self._normalised(LoaderState(epoch, step + 1)), pool.submit(self.load, epoch, step)))
                if len(ahead) > self.workers:
                    state, loaded = ahead.popleft()
                    yield loaded.result(), state
            while ahead:
                state, loaded = ahead.popleft()
                yield loaded.result(), state
        finally:
            # Also reached when the consumer stops early: what has not begun is dropped and no thread stays behind.
            pool.shutdown(wait=True, cancel_futures=True)

    def load(self, epoch: int, step: int) -> LoaderStep:
        """Assemble one step."""
        index, packing = self._indices[epoch], self._packings[epoch]
        rows = packing[step]
        last_filled = max(b for b, samples in enumerate(rows) if len(samples))
        bins_at_once = self.at_once * self.num_ranks  # of one pass of all ranks; the last may find fewer
        passes = [
            rows[first + self.rank : first + bins_at_once : self.num_ranks]
            for first in range(0, last_filled + 1, bins_at_once)
        ]
        nothing = np.empty(0, np.int64)
        of_step = index[packing.samples(step)]
        labelled = of_step.resp_len if self.supervise == "response" else of_step.inst_len + of_step.resp_len - 1
        return LoaderStep(
            batches=[self._assemble(index[np.concatenate([nothing, *of_pass])]) for of_pass in passes],
            supervised=int(labelled.sum()),
            samples=len(of_step),
            tokens=int(of_step.sample_lengths.sum()),
        )

    def _assemble(self, samples: EpochIndex) -> PackedBatch:
        """Lay samples end to end; whole-array operations alone, since a loop over samples is several times slower."""
        lengths = samples.sample_lengths
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        filled = int(starts[-1])
        size = self.tokens_per_pass if self.pad else filled
        input_ids = np.full(size, PAD_ID, np.int64)
        labels = np.full(size, IGNORE_INDEX, np.int64)
        positions = np.zeros(size, np.int64)

        # What is read is a sequence of whole samples: prefix, response, prefix, ...; the end of a response is no input.
        answered = samples.resp_len > 0
        whole_lengths = lengths + answered
        whole_starts = np.cumsum(whole_lengths) - whole_lengths
        whole = self._tokens.take(
            np.stack([samples.inst_start, samples.resp_start], axis=1).ravel(),
            np.stack([samples.inst_len, samples.resp_len], axis=1).ravel(),
        )
        batch_positions = np.arange(filled)
        source = batch_positions + np.repeat(whole_starts - starts[:-1], lengths)
        input_ids[:filled] = whole[source]
        positions[:filled] = batch_positions - np.repeat(starts[:-1], lengths)

        # A label is the next token, except after a prefix alone: there is none.
        labels[:filled] = whole[np.minimum(source + 1, len(whole) - 1)]
        labels[starts[1:][~answered] - 1] = IGNORE_INDEX
        if self.supervise == "response":
            # The last token of a prefix predicts the first of its response; those before it predict nothing.
            labels[:filled][positions[:filled] < np.repeat(samples.inst_len - 1, lengths)] = IGNORE_INDEX
        self._check_ids(input_ids[:filled], labels)
        return PackedBatch(
            input_ids=input_ids,
            labels=labels,
            position_ids=positions,
            sample_starts=starts,
            prefix_lengths=np.zeros_like(lengths) if self.mask == "causal" else np.array(samples.inst_len),
        )

    def _check_ids(self, input_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
        """An id outside the vocabulary would crash a GPU far from here, with no word on the cause."""
        if len(input_ids) and (input_ids.min() < 0 or max(input_ids.max(), labels.max()) >= self.vocab_size):
            worst = max(input_ids.max(), labels.max()) if input_ids.min() >= 0 else input_ids.min()
            raise UserError(
                f"{self._tokens.name}: token id {worst}, but the vocabulary of metadata.json has "
                f"{self.vocab_size:,} entries; was the folder sampled with another tokenizer?"
            )

    def _normalised(self, state: LoaderState) -> LoaderState:
        """The same position with the end of an epoch written as the beginning of the next."""
        steps = self.steps_per_epoch
        if state == LoaderState(len(steps), 0):
            return state
        if state.epoch >= len(steps) or state.step > steps[state.epoch]:
            raise UserError(
                f"loader state epoch {state.epoch}, step {state.step}: {self.sampled} has {len(steps)} epochs of "
                f"{', '.join(map(str, steps))} steps at this batch size; resume with the data and batch size of before"
            )
        return LoaderState(state.epoch + 1, 0) if state.step == steps[state.epoch] else state

    def _positions_from(self, state: LoaderState) -> Iterator[tuple[int, int]]:
        for epoch in range(state.epoch, len(self._packings)):
            for step in range(state.step if epoch == state.epoch else 0, len(self._packings[epoch])):
                yield epoch, step


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}; found {value!r}")


def read_metadata(path: Location) -> dict[str, Any]:
    """The metadata.json of a sampled folder, its ``tokenizer_info``, ``max_seq_len`` and ``vocab_size`` checked."""
    metadata = read_json_at(location(path))
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: expected keys and values, found {type(metadata).__name__}")
    for key, kind in (("tokenizer_info", dict), ("max_seq_len", int)):
        if not isinstance(metadata.get(key), kind):
            found = repr(metadata[key]) if key in metadata else "no such key"
            raise UserError(f"{path}: {key}: expected {kind.__name__}, found {found}; sample the data again")
    # The published pipeline leaves vocab_size null: the tokenizer's own count stands.
    vocab_size = metadata.get("vocab_size") or metadata["tokenizer_info"].get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(
            f"{path}: expected a number under vocab_size or tokenizer_info.vocab_size, found {vocab_size!r}"
        )
    return {**metadata, "vocab_size": vocab_size}


def _choose_epochs(sampled: Location, epochs: int | None) -> list[int]:
    """The numbers of the first ``epochs`` epoch folders."""
    names = [re.fullmatch(r"epoch_(\d+)", name) for name in names_in(sampled)]
    there = sorted(int(name[1]) for name in names if name)
    if not there:
        raise UserError(f"{sampled}: no folder epoch_<n>; a sampled folder is made by `hrm-text data sample`")
    missing = set(range(there[0], there[-1])) - set(there)
    if missing:
        raise UserError(f"{sampled}: epoch_{min(missing)} is missing between epoch_{there[0]} and epoch_{there[-1]}")
    if epochs is not None and not 1 <= epochs <= len(there):
        raise UserError(
            f"epochs: {sampled} holds {len(there)}, found {epochs}; sample more epochs or train on 1 to {len(there)}"
        )
    return there[:epochs]


def _check_index(index: EpochIndex, folder: Location, tokens: Tokens, max_seq_len: int) -> None:
    """Every row must lie within the token file and the context."""
    if len(index) == 0:
        raise UserError(f"{folder}: no samples; were all rows filtered out when the data was sampled?")
    for first in range(0, len(index), _CHECKED_ROWS):
        _check_rows(index[slice(first, first + _CHECKED_ROWS)], first, folder, tokens, max_seq_len)


def _check_rows(index: EpochIndex, first: int, folder: Location, tokens: Tokens, max_seq_len: int) -> None:
    for name, starts, lengths, least in (
        ("inst", index.inst_start, index.inst_len, 1),
        ("resp", index.resp_start, index.resp_len, 0),
    ):
        if lengths.min() < least:
            row = int(lengths.argmin())
            file = under(folder, f"{name}_len.npy")
            raise UserError(f"{file}: row {first + row}: expected at least {least}, found {lengths[row]}")
        file = under(folder, f"{name}_start.npy")
        outside = np.flatnonzero((starts < 0) | (lengths > len(tokens) - starts))
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"{file}: row {first + row}: tokens {starts[row]:,} to {starts[row] + lengths[row]:,} lie "
                f"outside the {len(tokens):,} of {tokens.name}; the files are not of one sampling, "
                "sample the data again"
            )
        filled = np.flatnonzero(lengths > 0)
        crossing = filled[tokens.crossing(starts[filled], lengths[filled])]
        if len(crossing):
            raise UserError(
                f"{file}: row {first + int(crossing[0])}: begins in one file of {tokens.name} and ends in another; "
                "the files are not of one sampling, sample the data again"
            )
    if (longest := index.inst_len + index.resp_len).max() > max_seq_len:
        row = int(longest.argmax())
        raise UserError(
            f"{folder}: row {first + row}: {longest[row]:,} tokens, but metadata.json has max_seq_len {max_seq_len:,}; "
            "sample the data again"
        )
