"""Choosing the next token of each row of a batch from its logits.

Everything happens on the device of the logits, and the host never waits for it: a step can be launched before it is
known what the last one chose. What a row gets depends on nothing but its logits and its own state, to the bit: sums
over the vocabulary are of whole numbers, which come out alike in any order and in any company.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hrm_text.infer.requests import Sampling

LARGEST = 1e30
"""Logits are kept within this, so that no arithmetic on them ends in infinity; NaN counts as this."""

LEAST_LOGPROB = -9999.0
"""Log-probabilities are no less, so that each is a finite number that can be sent as JSON."""

ROWS_ON_A_CPU = 8
"""Rows that are handled at once on a CPU."""


class RowState:
    """What choosing for one request needs: made once, used at every step, in whatever batch the request is.

    It goes on from choice to choice, so each must become a token of the response, or none may follow it.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        """``prompt_ids`` are all tokens before the first to be chosen."""
        self.sampling = sampling
        self.bias_ids: npt.NDArray[np.int64] = np.fromiter(sampling.logit_bias.keys(), np.int64)
        values = np.fromiter(sampling.logit_bias.values(), np.float64)
        self.bias: npt.NDArray[np.float32] = values.clip(-LARGEST, LARGEST).astype(np.float32)
        self._prompt_ids = np.unique(np.asarray(prompt_ids, np.int64)) if self.penalised else np.empty(0, np.int64)
        self._stream = None if self.greedy else np.random.Generator(np.random.Philox(key=sampling.seed % (1 << 128)))
        self._seen_V: Tensor | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether tokens that are there already count for less."""
        return self.sampling.repetition_penalty != 1

    def draw(self) -> float:
        """The next number of its random stream, from 0 to below 1."""
        assert self._stream is not None, "a greedy row draws nothing"
        return self._stream.random()

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """bool [V]: the tokens of the prompt and those chosen so far, kept on the device: it knows them first."""
        if self._seen_V is None:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V.index_fill_(0, _upload(self._prompt_ids, device), True)
        return self._seen_V

    def move_seen(self, seen_V: Tensor) -> None:
        """Keep the same in another place."""
        self._seen_V = seen_V


_Members = tuple[tuple[int, RowState], ...]
"""Rows of a batch by their numbers."""


@dataclass(frozen=True)
class Chosen:
    """The tokens of one step."""

    token_ids: Tensor
    """LongTensor [B], on the device of the logits."""
    _scored: tuple[tuple[_Members, Tensor], ...]
    """Rows that want scores, and what they are made of, fp64 [R, 3 + 2n], on the host once the device is done."""

    def scores(self) -> list[tuple[int, int, float, list[tuple[int, float]]]]:
        """(row, token id, log-probability, the likeliest as (id, log-probability)) of the rows that asked for it.

        The probabilities are the model's own: before bias, penalty, temperature and cuts. On a GPU this is there to be
        read when the work that was queued up to ``choose`` is done.
        """
        found = []
        for members, scores_RK in self._scored:
            for (row, state), (total, *values) in zip(members, scores_RK.tolist(), strict=True):
                middle, log_total = len(values) // 2, math.log(total)
                logprobs = [max(-behind - log_total, LEAST_LOGPROB) for behind in values[middle:]]
                (token, logprob), *top = zip(map(int, values[:middle]), logprobs, strict=True)
                found.append((row, token, logprob, top[: state.sampling.logprobs]))
        return found


class Sampler:
    """The next tokens of a batch whose rows come and go."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """``vocab_size`` is the tokenizer's: ids beyond it, to which a model's may be rounded up, are never chosen."""
        self.vocab_size, self.device = vocab_size, device
        self._batch = _Batch((), vocab_size, device)

    @torch.inference_mode()
    def choose(self, logits_BV: Tensor, rows: Sequence[RowState]) -> Chosen:
        """The next token of each row; logits in any floating type, at least ``vocab_size`` of them.

        Of tokens that are equally likely the lower id is taken, or kept, first. NaN counts as the largest logit, so
        that a model that has gone wrong goes on to give tokens of the vocabulary.
        """
        assert len(logits_BV) == len(rows) and logits_BV.shape[1] >= self.vocab_size
        logits_BV = logits_BV[:, : self.vocab_size]
        # Who is in the batch changes rarely; what follows from it is kept on the device till then.
        if self._batch.rows != (rows := tuple(rows)):
            self._batch = _Batch(rows, self.vocab_size, self.device)
        batch = self._batch
        token_ids_B = _argmax(logits_BV) if batch.plain else logits_BV.new_empty(len(rows), dtype=torch.long)
        for group in batch.groups:
            token_ids_R = group.choose(logits_BV)
            if group.places is None:
                token_ids_B = token_ids_R
            else:
                token_ids_B.index_copy_(0, group.places, token_ids_R)
        scored = [
            (group.members, group.scores(logits_BV, token_ids_B).to("cpu", non_blocking=True)) for group in batch.scored
        ]
        return Chosen(token_ids_B, tuple(scored))


AnyPart = TypeVar("AnyPart", bound="_Part")


class _Batch:
    """The rows of a step, in groups of those that are handled alike."""

    def __init__(self, rows: tuple[RowState, ...], vocab_size: int, device: torch.device) -> None:
        self.rows = rows
        # On a CPU few at a time, whose numbers stay in its caches: 64 rows with top_p take 80 ms, all at once 200.
        most = ROWS_ON_A_CPU if device.type == "cpu" else max(len(rows), 1)

        def parts(kind: type[AnyPart], wanted: Callable[[RowState], bool]) -> list[AnyPart]:
            members = tuple((number, row) for number, row in enumerate(rows) if wanted(row))
            portions = [members[start : start + most] for start in range(0, len(members), most)]
            return [kind(portion, len(portion) == len(rows), vocab_size, device) for portion in portions]

        def plain(row: RowState) -> bool:
            return row.greedy and not row.penalised and not len(row.bias)

        def cut(row: RowState) -> bool:
            return 0 < row.sampling.top_k < vocab_size or row.sampling.top_p < 1

        self.plain = any(plain(row) for row in rows)
        self.groups = [
            *parts(_Group, lambda row: row.greedy and not plain(row)),
            *parts(_Group, lambda row: not row.greedy and not cut(row)),
            *parts(_Group, lambda row: not row.greedy and cut(row)),
        ]
        self.scored = parts(_Scored, lambda row: row.sampling.logprobs is not None)


class _Part:
    """Some rows of a batch."""

    def __init__(self, members: _Members, whole: bool, vocab_size: int, device: torch.device) -> None:
        self.members, self.vocab_size, self.device = members, vocab_size, device
        self.places = None if whole else _upload(np.array([number for number, _ in members]), device)
        # A weight is a share of the likeliest token's, as a whole number; those of all tokens add up to 2^52 at most,
        # which fp64 holds exactly. A share below 2^-36 (of 65,536 tokens) is none.
        self.scale = float(1 << 52 - (vocab_size - 1).bit_length())

    def _pick(self, logits_BV: Tensor) -> Tensor:
        """A copy of its rows in fp32 [R, V], contiguous."""
        if self.places is None:
            return logits_BV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return logits_BV.index_select(0, self.places).float()


class _Scored(_Part):
    """Rows that want log-probabilities."""

    def scores(self, logits_BV: Tensor, token_ids_B: Tensor) -> Tensor:
        """fp64 [R, 3 + 2n]: the total of the weights, the chosen id and the n likeliest, how far these are behind."""
        most = min(max(row.sampling.logprobs or 0 for _, row in self.members), self.vocab_size)
        token_ids_R = token_ids_B if self.places is None else token_ids_B.index_select(0, self.places)
        behind_RV = _behind(_tame(self._pick(logits_BV)))
        total_R1 = behind_RV.neg().exp_().mul_(self.scale).long().sum(-1, keepdim=True)
        ids_RN = token_ids_R[:, None]
        if most:
            ids_RN = torch.cat([ids_RN, _id_of_key(_likeliest(behind_RV, most))], 1)
        behind_RN = behind_RV.gather(1, ids_RN)
        return torch.cat([total_R1.double() / self.scale, ids_RN, behind_RN], 1)


class _Group(_Part):
    """Rows that are all greedy, or all drawn from the whole vocabulary, or all from the likeliest tokens."""

    def __init__(self, members: _Members, whole: bool, vocab_size: int, device: torch.device) -> None:
        super().__init__(members, whole, vocab_size, device)
        rows = [row for _, row in members]
        self.greedy = rows[0].greedy

        sizes = [len(row.bias) for row in rows]
        self.bias_places: Tensor | None = None
        if any(sizes):
            starts = np.repeat(np.arange(len(rows)) * vocab_size, sizes)
            self.bias_places = _upload(starts + np.concatenate([row.bias_ids for row in rows]), device)
            self.bias = _upload(np.concatenate([row.bias for row in rows]), device)

        penalised = [number for number, row in enumerate(rows) if row.penalised]
        self.seen_PV: Tensor | None = None
        if penalised:
            self.penalised = _upload(np.array(penalised), device)
            penalties = [[min(max(rows[number].sampling.repetition_penalty, 1e-6), 1e6)] for number in penalised]
            self.penalty_P1 = _upload(np.array(penalties, np.float32), device)
            # One table to write to at once; each row's part of it is that row's own, and goes with it.
            self.seen_PV = torch.stack([rows[number].seen(vocab_size, device) for number in penalised])
            for number, seen_V in zip(penalised, self.seen_PV, strict=True):
                rows[number].move_seen(seen_V)

        asked = [row.sampling for row in rows]
        # Further off than this a temperature makes no difference any more, but for the end of fp32.
        self.minus_temperature_R1 = self._column([-min(max(one.temperature, 1e-6), 1e6) for one in asked], np.float32)
        top_k = [min(one.top_k or vocab_size, vocab_size) for one in asked]
        self.most = max(top_k)
        self.last_of_k_R1 = self._column([number - 1 for number in top_k], np.int64)
        self.cuts = min(top_k) < vocab_size or min(one.top_p for one in asked) < 1
        top_p = [one.top_p for one in asked]
        self.top_p_R1 = self._column(top_p, np.float64) if min(top_p) < 1 else None
        min_p = [one.min_p for one in asked]
        self.least_R1 = self._column([share * self.scale for share in min_p], np.float64) if max(min_p) > 0 else None

    def _column(self, values: list[float] | list[int], dtype: type[np.generic]) -> Tensor:
        return _upload(np.array(values, dtype)[:, None], self.device)

    def choose(self, logits_BV: Tensor) -> Tensor:
        """The next token ids [R] of the group's rows."""
        x_RV = self._pick(logits_BV)
        if self.bias_places is not None:
            x_RV.view(-1).scatter_add_(0, self.bias_places, self.bias)
        if self.seen_PV is not None:
            x_PV = x_RV[self.penalised]
            less_PV = torch.where(x_PV > 0, x_PV / self.penalty_P1, x_PV * self.penalty_P1)
            x_RV[self.penalised] = torch.where(self.seen_PV, less_PV, x_PV)
        _tame(x_RV)
        token_ids_R = _argmax(x_RV) if self.greedy else self._draw(x_RV)
        if self.seen_PV is not None:
            self.seen_PV.scatter_(1, token_ids_R[self.penalised, None], True)
        return token_ids_R

    def _draw(self, x_RV: Tensor) -> Tensor:
        uniform_R1 = self._column([row.draw() for _, row in self.members], np.float64)
        behind_RV = _behind(x_RV)
        if not self.cuts:
            weight_RV = self._weights(behind_RV)
            if self.least_R1 is not None:
                weight_RV.masked_fill_(weight_RV < self.least_R1, 0)
            sum_RV = weight_RV.cumsum(-1)
            return _invert(sum_RV, sum_RV[:, -1:], uniform_R1)[:, 0]

        # The likeliest first: then every cut keeps a beginning, and it is enough to know where the shortest ends.
        key_RK = _likeliest(behind_RV, self.most)
        weight_RK = self._weights(_of_key(key_RK))
        sum_RK = weight_RK.cumsum(-1)
        last_R1 = self.last_of_k_R1
        if self.top_p_R1 is not None:
            enough_R1 = (self.top_p_R1 * sum_RK.gather(1, last_R1)).ceil_().long()
            last_R1 = torch.searchsorted(sum_RK, enough_R1)
        if self.least_R1 is not None:
            last_R1 = last_R1.minimum((weight_RK >= self.least_R1).sum(-1, keepdim=True).sub_(1))
        place_R1 = _invert(sum_RK, sum_RK.gather(1, last_R1), uniform_R1)
        return _id_of_key(key_RK.gather(1, place_R1))[:, 0]

    def _weights(self, behind_RK: Tensor) -> Tensor:
        """int64 weights of logits that are so far behind the greatest of their row."""
        return behind_RK.div_(self.minus_temperature_R1).exp_().mul_(self.scale).long()


def _tame(x_RV: Tensor) -> Tensor:
    """Put numbers within ``LARGEST`` in place of all others."""
    return x_RV.nan_to_num_(nan=LARGEST).clamp_(-LARGEST, LARGEST)


def _behind(x_RV: Tensor) -> Tensor:
    """How far each logit is behind the greatest of its row."""
    return x_RV.amax(-1, keepdim=True) - x_RV


def _likeliest(behind_RV: Tensor, most: int) -> Tensor:
    """Keys [R, K] of the ``most`` tokens that are the least behind, least first; of equals the lower id first.

    A key is the distance above the id. The bits of a float that is not negative, read as a whole number, are in the
    order of the floats; so no two keys are the same, and any way to sort them gives the same.
    """
    key_RV = behind_RV.view(torch.int32).long().bitwise_left_shift_(32)
    key_RV += torch.arange(key_RV.shape[1], device=key_RV.device)
    if most < key_RV.shape[1]:
        return key_RV.topk(most, largest=False, sorted=True).values
    if key_RV.device.type == "cpu":  # 65,536 numbers: 0.9 ms, where torch.sort takes 4.4
        key_RV.numpy().sort()
        return key_RV
    return key_RV.sort(dim=-1).values


def _of_key(key_RK: Tensor) -> Tensor:
    return key_RK.bitwise_right_shift(32).int().view(torch.float32)


def _id_of_key(key_RK: Tensor) -> Tensor:
    return key_RK.bitwise_and(0xFFFFFFFF)


def _invert(sum_RK: Tensor, total_R1: Tensor, uniform_R1: Tensor) -> Tensor:
    """Places [R, 1] drawn by weight: the first at which the sum of the weights exceeds that share of the total."""
    # A number below 1 times the total is below it also when rounded to fp64; so there is always such a place.
    return torch.searchsorted(sum_RK, (uniform_R1 * total_R1).long(), right=True)


def _argmax(x_BV: Tensor) -> Tensor:
    """The lowest of the ids with the largest logit; NaN is the largest."""
    if x_BV.device.type == "cpu":  # of 64 rows 1.9 ms, where torch.argmax takes 10 (bf16: 7 for 37)
        return torch.from_numpy(x_BV.float().numpy(force=True).argmax(-1))
    return x_BV.argmax(-1)


def _upload(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing: for that the memory must be pinned."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
