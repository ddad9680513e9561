"""The engine says what the whole forward pass says: on a CPU, and on a GPU in every way there is to take a step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info
from hrm_text.infer import engine as engine_module
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.lane import with_cycles
from hrm_text.infer.requests import Cycles, Decode, Piece, Request, Sampling, Turn
from hrm_text.infer.text_model import TextModel
from hrm_text.model.config import preset
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM, build

CONTEXT = 96

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS: tuple[Decode, ...] = ("plain", "fused") if DEVICE == "cuda" else ("auto",)


class Decoding(TextModel):
    """A model whose engines take their steps in one way, if not told otherwise."""

    way: Decode = "auto"

    def engine(self, **options: Any) -> DecodingEngine:
        return super().engine(**({"decode": self.way} | options))


def make(tokenizer_dir: Path, way: Decode = "auto", seed: int = 3, **changes: Any) -> TextModel:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    values = {"vocab_size": 512, "max_position_embeddings": CONTEXT} | changes
    model = Decoding(build(preset("tiny", **values), seed=seed, device=DEVICE), prompt_format)
    model.way = way
    return model


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Decode:
    return cast(Decode, request.param)


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, way: Decode) -> TextModel:
    return make(tokenizer_dir, way)


# ------------------------------------------------------------------------------------------------- the definition ---


class MaskedAttention:
    """softmax(q k^T / sqrt(H) + mask) v with any mask at all."""

    def __init__(self, mask_TT: Tensor) -> None:
        self.mask_TT = mask_TT

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) * q_TNH.shape[-1] ** -0.5
        return torch.einsum("nqk,knh->qnh", scores_NTT.masked_fill(~self.mask_TT, -torch.inf).softmax(-1), v_TNH)


def next_logits(module: RecurrentLM, turns: Sequence[Turn], cycles: Cycles | None = None) -> Tensor:
    """After a conversation, by one pass over all of it: messages both ways, all else causal."""
    ids: list[int] = []
    segment: list[int] = []
    for number, turn in enumerate(turns):
        ids += [*turn.prefix_ids, *turn.response_ids]
        segment += [number] * len(turn.prefix_ids) + [-1] * len(turn.response_ids)
    place = torch.arange(len(ids), device=DEVICE)
    of = torch.tensor(segment, device=DEVICE)
    mask_TT = (place[None] <= place[:, None]) | ((of[None] == of[:, None]) & (of[:, None] >= 0))
    steps = None if cycles is None else plan(with_cycles(module.config, cycles.h_cycles, cycles.l_cycles))
    with torch.no_grad():
        hidden_TD = module(torch.tensor(ids, device=DEVICE), place, MaskedAttention(mask_TT), steps=steps)
        return module.lm_head(hidden_TD[-1]).cpu()


def greedy(model: TextModel, request: Request) -> list[int]:
    """The definition of greedy decoding: the whole conversation again for every token."""
    *before, last = request.turns
    made: list[int] = []
    room = CONTEXT - request.num_prompt_tokens
    while len(made) < min(request.max_new_tokens, room):
        turns = (*before, Turn(last.prefix_ids, (*last.response_ids, *made)))
        token = int(next_logits(model.module, turns, request.cycles)[: model.vocab_size].argmax())
        if token == model.prompt_format.eoa_id:
            break
        made.append(token)
    return made


# --------------------------------------------------------------------------------------------------------- helpers ---


def words(chance: random.Random, length: int) -> tuple[int, ...]:
    return tuple(chance.randrange(40, 300) for _ in range(length))


def requests(count: int, seed: int = 1, most: int = 24) -> list[Request]:
    """Prompts and responses of mixed lengths."""
    chance = random.Random(seed)
    lengths = [1, 2, CONTEXT - 1, CONTEXT - 5, *(chance.randrange(1, 60) for _ in range(count))][:count]
    return [Request((Turn(words(chance, length)),), chance.randrange(1, most)) for length in lengths]


def run(engine: DecodingEngine, asked: Sequence[Request], at_once: int | None = None) -> dict[int, list[Piece]]:
    """Hand requests in, some at a time, and step to the end: the pieces of each, by its place in ``asked``."""
    pieces: dict[int, list[Piece]] = {index: [] for index in range(len(asked))}
    numbers: dict[int, int] = {}
    left = list(enumerate(asked))
    while left or engine.has_work:
        for index, request in left[: at_once or len(left)]:
            numbers[engine.submit(request)] = index
        left = left[at_once or len(left) :]
        for piece in engine.step():
            pieces[numbers[piece.request]].append(piece)
    return pieces


def tokens_of(model: TextModel, asked: Sequence[Request], **options: Any) -> list[list[int]]:
    """The token ids of each response: asked with log-probabilities, which come for every token."""
    at_once = options.pop("at_once", None)
    scored = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, logprobs=0)) for request in asked
    ]
    pieces = run(model.engine(**options), scored, at_once)
    return [[score.token_id for piece in pieces[index] for score in piece.scores] for index in range(len(asked))]


# ------------------------------------------------------------------------------------------------------- greedily ---


@pytest.mark.parametrize("architecture", ["hrm", "trm", "rins", "looped", "transformer"])
def test_a_mixed_batch_says_what_the_whole_forward_pass_says(
    architecture: str, way: Decode, tokenizer_dir: Path
) -> None:
    model = make(tokenizer_dir, way, architecture=architecture)
    asked = requests(9)
    expected = [greedy(model, request) for request in asked]
    assert tokens_of(model, asked, page_size=4, max_batch=5, at_once=2) == expected
    assert any(len(made) == request.max_new_tokens for made, request in zip(expected, asked, strict=True))


def test_nobody_hears_their_neighbours(model: TextModel) -> None:
    asked = requests(20, seed=2)
    alone = [tokens_of(model, [request])[0] for request in asked]
    for at_once, max_batch in ((None, 64), (3, 4), (1, 20)):
        assert tokens_of(model, asked, at_once=at_once, max_batch=max_batch) == alone


def test_a_conversation_equals_its_mask_and_is_computed_once(model: TextModel) -> None:
    chance = random.Random(5)
    engine = model.engine(page_size=4)
    turns: tuple[Turn, ...] = ()
    for number, length in enumerate((9, 6, 1)):
        request = Request((*turns, Turn(words(chance, length))), 7, Sampling(logprobs=0))
        pieces = run(engine, [request])[0]
        made = [score.token_id for piece in pieces for score in piece.scores]
        assert made == greedy(model, request)
        known = sum(turn.num_tokens for turn in turns)
        # Of the last answer nobody has read the last token yet, nor the end.
        assert pieces[-1].num_cached_tokens == (known - 2 if number else 0)
        assert made == tokens_of(model, [request], page_size=4)[0], "from the beginning, in one pass, it is the same"
        turns = (*request.turns[:-1], Turn(request.turns[-1].prefix_ids, (*made, model.prompt_format.eoa_id)))


def test_a_response_goes_on_from_its_beginning(model: TextModel) -> None:
    request = Request((Turn(words(random.Random(6), 11)),), 12)
    whole = greedy(model, request)
    begun = Request((Turn(request.turns[0].prefix_ids, tuple(whole[:5])),), 7)
    assert tokens_of(model, [begun]) == [whole[5:]]


# --------------------------------------------------------------------------------------------------------- memory ---


def test_too_little_memory_costs_time_and_nothing_else(model: TextModel) -> None:
    asked = requests(12, seed=7, most=40)
    expected = tokens_of(model, asked)
    engine = model.engine(page_size=4, cache_tokens=CONTEXT + 8)
    scored = [dataclasses.replace(request, sampling=Sampling(logprobs=0)) for request in asked]
    pieces = run(engine, scored)
    found = [[score.token_id for piece in pieces[index] for score in piece.scores] for index in range(len(asked))]
    assert found == expected
    assert engine.status.preemptions_total > 0, "or this tests nothing"
    assert all(mine[-1].finish_reason in ("stop", "length") for mine in pieces.values())


def test_a_sampled_text_survives_giving_its_memory_up(model: TextModel) -> None:
    asked = [
        dataclasses.replace(request, sampling=Sampling(temperature=1.0, seed=index, repetition_penalty=1.2))
        for index, request in enumerate(requests(12, seed=8, most=40))
    ]
    texts = []
    for memory in (None, CONTEXT + 8):
        engine = model.engine(page_size=4, cache_tokens=memory)
        texts.append(["".join(piece.text for piece in pieces) for pieces in run(engine, asked).values()])
        assert (engine.status.preemptions_total > 0) == (memory is not None)
    assert texts[0] == texts[1]


def test_a_prompt_asked_often_is_computed_once(model: TextModel) -> None:
    turn = Turn(words(random.Random(9), 30))
    asked = [Request((turn,), 6, Sampling(temperature=2.0, seed=seed, logprobs=0)) for seed in range(5)]
    engine = model.engine(page_size=8)
    pieces = run(engine, asked)
    assert [mine[-1].num_cached_tokens for mine in pieces.values()] == [0, 29, 29, 29, 29]
    assert (engine.status.prompt_tokens_total, engine.status.cached_prompt_tokens_total) == (150, 116)
    found = [[score.token_id for piece in mine for score in piece.scores] for mine in pieces.values()]
    assert found == [tokens_of(model, [request])[0] for request in asked]
    assert len({tuple(made) for made in found}) == 5


def test_the_memory_is_free_when_all_is_said(model: TextModel) -> None:
    engine = model.engine(page_size=4, cache_tokens=400)
    run(engine, requests(15, seed=10))
    status = engine.status
    assert (status.running, status.waiting, engine.has_work) == (0, 0, False)
    engine.pages.forget_all()
    assert engine.status.cache_tokens_used == 0
    assert all(len(lane) == 0 and not lane.rows.table.any() for lane in engine._lanes.values())


def test_eight_bit_keys_and_values_change_little(model: TextModel) -> None:
    asked = [Request((Turn(words(random.Random(seed), 20)),), 1, Sampling(logprobs=5)) for seed in range(10)]
    exact, rounded = (
        [pieces[0].scores[0].logprob for pieces in run(model.engine(kv_cache=kind), asked + asked).values()]
        for kind in ("auto", "int8")
    )
    # The first of each prompt is computed whole, the second reads the cache.
    assert exact == pytest.approx(rounded, abs=0.05)
    assert exact[10:] == pytest.approx(exact[:10], abs=1e-5)
    assert exact[10:] != pytest.approx(rounded[10:], abs=1e-6)


# ------------------------------------------------------------------------------------------------------- the dial ---


def test_every_request_has_cycles_of_its_own(model: TextModel) -> None:
    turn = Turn(words(random.Random(11), 14))
    settings = [None, Cycles(1, 3), Cycles(2, 1), Cycles(1, 7), Cycles(2, 3)]
    asked = [Request((turn,), 8, cycles=cycles) for cycles in settings]
    found = tokens_of(model, asked)
    assert found == [greedy(model, request) for request in asked]
    assert found[0] == found[4] and len({tuple(made) for made in found}) > 2


def test_more_cycles_than_the_cache_has_slots_for(model: TextModel, tokenizer_dir: Path) -> None:
    engine, turn = model.engine(), Turn((50, 51))
    with pytest.raises(UserError, match="make 9 module calls, and the cache has slots for 8"):
        engine.submit(Request((turn,), cycles=Cycles(3, 2)))
    with pytest.raises(UserError, match="at least 1, found 0 and 3"):
        engine.submit(Request((turn,), cycles=Cycles(0, 3)))
    plain = make(tokenizer_dir, architecture="transformer").engine()
    with pytest.raises(UserError, match="mean nothing to architecture 'transformer'"):
        plain.submit(Request((turn,), cycles=Cycles(2, 3)))


# -------------------------------------------------------------------------------------------------- coming, going ---


def test_a_request_that_could_never_run_is_refused_at_once(model: TextModel) -> None:
    engine = model.engine(cache_tokens=64, page_size=8)
    for request, error in (
        (Request((Turn((50,) * CONTEXT),)), "the prompt has 96 tokens with its condition and the context is 96"),
        (Request((Turn((50,) * 50),), 40), "50 tokens and may get 40 more, and the cache has room for 64"),
        (Request((Turn((50, 512)),), 4), f"token id 512 is not one of the tokenizer's {model.vocab_size}"),
        (Request((Turn((50,)),), 4, Sampling(logit_bias={-1: 1.0})), "token id -1"),
    ):
        with pytest.raises(UserError, match=error):
            engine.submit(request)
    assert not engine.has_work


def test_a_cancelled_request_ends_and_frees_what_it_has(model: TextModel) -> None:
    engine = model.engine(max_batch=2, page_size=4)
    asked = [Request((Turn(words(random.Random(seed), 9)),), 30) for seed in range(3)]
    numbers = [engine.submit(request) for request in asked]
    for _ in range(3):
        engine.step()
    assert (engine.status.running, engine.status.waiting) == (2, 1)
    engine.cancel(numbers[0])
    engine.cancel(numbers[2])
    engine.cancel(12345)
    ended = {piece.request: piece.finish_reason for piece in engine.step() if piece.finish_reason}
    assert ended == {numbers[0]: "cancelled", numbers[2]: "cancelled"}
    assert (engine.status.running, engine.status.waiting) == (1, 0)
    engine.cancel(numbers[0])
    rest = "".join(piece.text for _ in iter(lambda: engine.has_work, False) for piece in engine.step())
    assert rest and model.prompt_format.decode(greedy(model, asked[1])).endswith(rest)


def test_stop_texts_end_a_response_before_them(model: TextModel) -> None:
    request = Request((Turn(words(random.Random(12), 9)),), 20)
    whole = model.prompt_format.decode(greedy(model, request))
    stop = whole[7:9]
    (pieces,) = run(model.engine(), [dataclasses.replace(request, stop=(stop, "never"))]).values()
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_what_is_told_of_tokens(model: TextModel) -> None:
    request = Request((Turn(words(random.Random(13), 9)),), 5, Sampling(logprobs=3))
    (pieces,) = run(model.engine(), [request]).values()
    turns, made = request.turns, greedy(model, request)
    for number, score in enumerate(score for piece in pieces for score in piece.scores):
        expected = next_logits(model.module, (Turn(turns[0].prefix_ids, tuple(made[:number])),))
        expected = expected[: model.vocab_size].log_softmax(-1)
        assert score.token_id == made[number]
        assert score.logprob == pytest.approx(float(expected[score.token_id]), abs=1e-4)
        best = expected.topk(3)
        assert [token for token, _, _ in score.top] == best.indices.tolist()
        assert [value for _, _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert pieces[-1].num_tokens == len(made)


@pytest.mark.parametrize(("name", "value"), [("max_batch", 0), ("cache_tokens", 0)])
def test_an_engine_of_nothing(name: str, value: int, model: TextModel) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, found 0"):
        model.engine(**{name: value})


def test_filled_steps_are_fewer_and_say_the_same(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts that need several passes to fill the batch."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    found = {}
    for fill in (False, True):
        engine = model.engine(max_batch=8)
        asked = [engine.submit(each) for each in requests(24, most=6)]
        pieces: dict[int, list[Piece]] = {number: [] for number in asked}
        while engine.has_work:
            for piece in engine.step(fill):
                pieces[piece.request].append(piece)
        texts = [("".join(each.text for each in pieces[number]), pieces[number][-1].num_tokens) for number in asked]
        found[fill] = texts, engine.status.steps_total, engine.status.rows_total
    assert found[True][0] == found[False][0]
    assert found[True][2] == found[False][2] > 0
    assert found[True][1] < found[False][1]
