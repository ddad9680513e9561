"""Guesses change how long a text takes, and nothing else: in company, at every end, and however late they are known."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.requests import Cycles, Decode, KeyValues, Piece, Request, Sampling, Turn
from hrm_text.model.config import ModelConfig
from hrm_text.model.draft import DraftHead
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import RecurrentLM, build

CONTEXT = 48
VOCABULARY = 70
END = VOCABULARY - 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass
class Letters:
    """Every token is a character, so a text says all that its tokens do."""

    eoa_id: int = END

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)


@dataclasses.dataclass
class Model:
    module: RecurrentLM
    draft_head: DraftHead | None = None
    drafts: int = 0
    prompt_format: Letters = dataclasses.field(default_factory=Letters)
    vocab_size: int = VOCABULARY

    @property
    def config(self) -> ModelConfig:
        return self.module.config


class Reader(DraftHead):
    """Has read the model's texts, and guesses what followed a token there most often: often right, often wrong."""

    def __init__(self, module: RecurrentLM, texts: Sequence[str]) -> None:
        super().__init__(module.config)
        follows: dict[int, Counter[int]] = {}
        for text in texts:
            ids = [ord(letter) - 0x4E00 for letter in text]
            for token, after in itertools.pairwise(ids):
                follows.setdefault(token, Counter())[after] += 1
        self.follows = {token: after.most_common(1)[0][0] for token, after in follows.items()}
        self.embedding, self.lm_head = module.model.embed_tokens, module.lm_head.weight

    def forward(self, state_TD: Tensor, embedding_TD: Tensor) -> Tensor:
        token = int((self.embedding.weight == embedding_TD).all(1).nonzero()[0])
        return self.lm_head[self.follows.get(token, 0)][None]


class Knowing(DraftHead):
    """Guesses one text right, whatever it is asked: the guesses behind the first token, the second, and so on."""

    def __init__(self, module: RecurrentLM, text: str, guesses: int) -> None:
        super().__init__(module.config)
        self.ids, self.guesses, self.lm_head = [ord(letter) - 0x4E00 for letter in text], guesses, module.lm_head.weight
        self.asked = 0

    def forward(self, state_TD: Tensor, embedding_TD: Tensor) -> Tensor:
        number = self.asked // self.guesses * (self.guesses + 1) + self.asked % self.guesses + 1
        self.asked += 1
        return self.lm_head[self.ids[number % len(self.ids)]][None]


def config_of(architecture: str = "hrm") -> ModelConfig:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 8}
    cycles = {"H_cycles": 2, "L_cycles": 1} if architecture == "hrm" else {}
    values = shape | cycles | {"vocab_size": 80, "max_position_embeddings": CONTEXT}
    return ModelConfig(architecture=architecture, **values)  # type: ignore[arg-type]


@functools.cache
def module_of(architecture: str = "hrm", seed: int = 1) -> RecurrentLM:
    module = build(config_of(architecture), seed=seed, device=DEVICE).requires_grad_(False)
    # Unit rows: then a row is what its own token likes best, as the heads above count on.
    module.lm_head.weight /= module.lm_head.weight.norm(dim=1, keepdim=True)
    return module


def words(chance: random.Random, length: int) -> tuple[int, ...]:
    return tuple(chance.randrange(END) for _ in range(length))


def request_of(seed: int, length: int = 9, most: int = 30) -> Request:
    return Request((Turn(words(random.Random(seed), length)),), most)


def engine_of(model: Model, pending: int = 0, *, decode: Decode = "plain", **options: object) -> DecodingEngine:
    """``pending``: launches that the host does not look at yet, as on a GPU."""
    engine = DecodingEngine(model, **({"page_size": 4, "max_batch": 4, "decode": decode} | options))  # type: ignore[arg-type]
    engine._most_pending = pending
    return engine


def run(engine: DecodingEngine, asked: Sequence[Request]) -> list[tuple[str, Piece]]:
    """The text of each and its last piece."""
    numbers = [engine.submit(request) for request in asked]
    texts: dict[int, str] = dict.fromkeys(numbers, "")
    last: dict[int, Piece] = {}
    while engine.has_work:
        for piece in engine.step():
            texts[piece.request] += piece.text
            last[piece.request] = piece
    return [(texts[number], last[number]) for number in numbers]


SAID: dict[tuple[str, int, str], tuple[str, str | None, int]] = {}


def said(request: Request, eoa_id: int = END, architecture: str = "hrm") -> tuple[str, str | None, int]:
    """What the model says without guesses, alone: text, reason of its end, tokens."""
    key = (repr(request), eoa_id, architecture)
    if key not in SAID:
        engine = engine_of(Model(module_of(architecture), prompt_format=Letters(eoa_id)))
        SAID[key] = outcome(run(engine, [request])[0])
    return SAID[key]


def reading(module: RecurrentLM, guesses: int) -> Model:
    read = [said(request_of(seed))[0] for seed in range(4)]
    return Model(module, Reader(module, read), guesses)


def outcome(pair: tuple[str, Piece]) -> tuple[str, str | None, int]:
    text, last = pair
    return text, last.finish_reason, last.num_tokens


# ------------------------------------------------------------------------------------------------------- one text ---


@pytest.mark.parametrize(
    ("guesses", "pending", "architecture"),
    [(1, 0, "hrm"), (3, 1, "hrm"), (2, 3, "hrm"), (3, 0, "transformer")],
)
def test_whatever_is_guessed_the_text_is_the_same(guesses: int, pending: int, architecture: str) -> None:
    module, asked = module_of(architecture), [request_of(seed) for seed in range(5)]
    untrained = DraftHead(module.config).to(DEVICE).requires_grad_(False)
    untrained.initialise(0)
    reader = Reader(module, [said(request, architecture=architecture)[0] for request in asked[:3]])
    for head in (untrained, reader):
        engine = engine_of(Model(module, head, guesses), pending)
        for request in asked:
            assert [outcome(pair) for pair in run(engine, [request])] == [said(request, architecture=architecture)]
        assert engine.status.drafted_tokens_total > 0
    assert 0 < engine.status.accepted_tokens_total < engine.status.drafted_tokens_total


@pytest.mark.parametrize(("pending", "most"), [(0, 21), (1, 18)])
def test_right_guesses_save_passes(pending: int, most: int) -> None:
    module, request = module_of(), request_of(1, most=most)
    model = Model(module, Knowing(module, said(request_of(1))[0], 3), 3)
    engine = engine_of(model, pending)
    assert [outcome(pair) for pair in run(engine, [request])] == [said(request)]
    # The prompt gives one token, and every pass four; no pass follows one that is sure to give the last.
    status = engine.status
    assert (status.steps_total, status.drafted_tokens_total, status.accepted_tokens_total) == (5, 15, 15)
    assert status.generated_tokens_total == most


@pytest.mark.parametrize("pending", [0, 1])
def test_it_ends_where_it_would_end_without(pending: int) -> None:
    module, request = module_of(), request_of(2, most=14)
    whole = said(request)[0]
    model = Model(module, Knowing(module, whole, 3), 3)
    head = model.draft_head
    assert isinstance(head, Knowing)
    shorter = [dataclasses.replace(request, max_new_tokens=most) for most in range(1, 14)]
    stopping = [dataclasses.replace(request, stop=(whole[place : place + 2],)) for place in range(12)]
    for asked, end in [(each, END) for each in (*shorter, *stopping)] + [
        (request, ord(letter) - 0x4E00) for letter in set(whole)
    ]:
        head.asked = 0
        model.prompt_format = Letters(end)
        (found,) = run(engine_of(model, pending), [asked])
        assert outcome(found) == said(asked, end)


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_the_end_of_the_context_and_of_the_memory(pending: int) -> None:
    model = reading(module_of(), 3)
    for length in range(CONTEXT - 8, CONTEXT):
        request = request_of(3, length, most=40)
        for memory in (None, CONTEXT):
            engine = engine_of(model, pending, max_batch=1, cache_tokens=memory)
            assert [outcome(pair) for pair in run(engine, [request])] == [said(request)]
    request = request_of(3, 9, most=15)
    engine = engine_of(model, pending, cache_tokens=24)  # no page for what may be right behind the last token
    assert [outcome(pair) for pair in run(engine, [request])] == [said(request)]


@pytest.mark.parametrize("pending", [0, 1])
def test_a_conversation_goes_on_from_what_was_guessed(pending: int) -> None:
    model, chance = reading(module_of(), 3), random.Random(5)
    engine, plain = engine_of(model, pending), engine_of(Model(module_of()))
    turns: tuple[Turn, ...] = ()
    for length in (9, 6, 5):
        request = Request((*turns, Turn(words(chance, length))), 9)
        (found,), (expected,) = run(engine, [request]), run(plain, [request])
        assert outcome(found) == outcome(expected)
        # Of an answer nobody has read the last token yet, but where it was guessed.
        assert 0 <= found[1].num_cached_tokens - expected[1].num_cached_tokens <= 1
        answer = tuple(ord(letter) - 0x4E00 for letter in found[0])
        turns = (*turns, Turn(request.turns[-1].prefix_ids, (*answer, END)))
    assert engine.status.accepted_tokens_total > 0
    engine.pages.forget_all()
    assert engine.status.cache_tokens_used == 0


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize("bits", [8, 32])
def test_eight_bits(bits: int, kv_cache: KeyValues) -> None:
    module = build(config_of(), seed=1, device=DEVICE).requires_grad_(False)
    if bits == 8:
        quantize_weights(module)
    asked = [request_of(seed) for seed in range(3)]
    expected = [run(engine_of(Model(module), kv_cache=kv_cache), [request])[0] for request in asked]
    engine = engine_of(Model(module, Reader(module, [text for text, _ in expected]), 3), 1, kv_cache=kv_cache)
    found = [run(engine, [request])[0] for request in asked]
    assert [outcome(pair) for pair in found] == [outcome(pair) for pair in expected]
    assert engine.status.drafted_tokens_total > 0


# -------------------------------------------------------------------------------------------------------- company ---


def test_only_greedy_texts_as_they_are_have_guesses() -> None:
    model, request = reading(module_of(), 3), request_of(1)
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(repetition_penalty=1.2),
        Sampling(logit_bias={3: 1.0}),
        Sampling(logprobs=0),
    ):
        engine = engine_of(model)
        run(engine, [dataclasses.replace(request, sampling=sampling)])
        assert engine.status.drafted_tokens_total == 0
    engine = engine_of(model)
    run(engine, [dataclasses.replace(request, cycles=Cycles(1, 2))])
    assert engine.status.drafted_tokens_total == 0, "the head knows the states of the model's own cycles"
    run(engine, [dataclasses.replace(request, cycles=Cycles(2, 1))])
    assert engine.status.drafted_tokens_total > 0


def traffic(seed: int) -> list[Request]:
    """Requests of every kind."""
    chance = random.Random(seed)
    asked: list[Request] = []
    for number in range(14):
        request = Request((Turn(words(chance, chance.randrange(1, 20))),), chance.randrange(1, 30))
        match chance.randrange(8):
            case 0:
                request = dataclasses.replace(request, sampling=Sampling(temperature=1.0, seed=number))
            case 1:
                request = dataclasses.replace(request, cycles=Cycles(1, chance.randrange(1, 4)))
            case 2:
                request = dataclasses.replace(request, stop=(said(request)[0][-3:-1] or "never",))
            case 3:
                request = dataclasses.replace(request, sampling=Sampling(repetition_penalty=1.3))
            case 4 if asked:
                before = asked[-1].turns[0]
                turns = (Turn(before.prefix_ids, (*words(chance, 3), END)), Turn(words(chance, 4)))
                request = dataclasses.replace(request, turns=turns, max_new_tokens=min(request.max_new_tokens, 20))
            case _:
                pass
        asked.append(request)
    return asked


@pytest.mark.parametrize(
    ("seed", "pending", "memory"), [(1, 0, None), (1, 1, CONTEXT), (2, 1, None), (2, 2, CONTEXT), (3, 0, CONTEXT)]
)
def test_texts_come_and_go_while_one_has_guesses(seed: int, pending: int, memory: int | None) -> None:
    model, asked, chance = reading(module_of(), 3), traffic(seed), random.Random(seed)
    engine = engine_of(model, pending, cache_tokens=memory)
    waiting, numbers, cancelled = list(enumerate(asked)), {}, set()
    texts = [""] * len(asked)
    last: dict[int, Piece] = {}
    while waiting or engine.has_work:
        if waiting and (not engine.has_work or chance.random() < 0.12):
            for _ in range(chance.choice((1, 1, 1, 3))):
                if waiting:
                    index, request = waiting.pop(0)
                    numbers[engine.submit(request)] = index
        if numbers and chance.random() < 0.02:
            number = chance.choice(list(numbers))
            cancelled.add(numbers[number])
            engine.cancel(number)
        for piece in engine.step():
            index = numbers[piece.request]
            assert index not in last or last[index].finish_reason is None
            texts[index] += piece.text
            last[index] = piece
    for index, request in enumerate(asked):
        expected = said(request)
        if last[index].finish_reason == "cancelled":
            assert index in cancelled and expected[0].startswith(texts[index])
        else:
            assert (texts[index], last[index].finish_reason, last[index].num_tokens) == expected, index
    status = engine.status
    assert 0 < status.accepted_tokens_total < status.drafted_tokens_total
    assert status.preemptions_total > 0 or memory is None, "or this tests nothing"
    engine.pages.forget_all()
    assert (status.running, engine.status.cache_tokens_used) == (0, 0)
    assert all(len(lane) == 0 and not lane.rows.table.any() for lane in engine._lanes.values())


def test_the_host_knows_how_long_texts_are_once_it_has_looked() -> None:
    model = reading(module_of(), 3)
    engine = engine_of(model, pending=1)
    engine.submit(request_of(1))
    for _ in range(4):
        engine.step()
    engine.submit(request_of(2))
    engine.step()
    (lane,) = engine._lanes.values()
    assert len(lane) == 2 and not any(launch.drafted for launch in engine._pending)
    lengths = lane.rows.lengths[:2].tolist()
    assert lengths == lane._lengths == [text.length for text in engine._texts_of(lane)]
    while engine.has_work:
        engine.step()


# -------------------------------------------------------------------------------------------------------- kernels ---


def test_the_kernels_say_the_same() -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from hrm_text.infer.drafting_graphs import GraphedDrafting
    from hrm_text.model.kernels.decode import Attend, Settings, Vector

    vector = Vector(32, 32, 1, 1)
    config = dataclasses.replace(config_of("transformer"), num_layers=1)
    module, request = build(config, seed=3, device=DEVICE).requires_grad_(False), request_of(1, 4, most=4)
    (expected,) = run(engine_of(Model(module)), [request])
    head = DraftHead(config).to(DEVICE).requires_grad_(False)
    head.initialise(0)
    found = []
    for kernels in (False, True):
        engine = engine_of(Model(module, head, 2), pending=1)
        if kernels:
            settings = Settings(vector, vector, vector, vector, Attend(8, 1, 2, 4))
            engine._drafting = GraphedDrafting(module, head, 2, engine.cache, VOCABULARY, settings)
        (pair,) = run(engine, [request])
        assert outcome(pair) == outcome(expected)
        found.append((engine.status.drafted_tokens_total, engine.status.accepted_tokens_total))
    assert found[0] == found[1] and found[0][0] > 0, "the same guesses too"


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("guesses", [1, 3, 5])
def test_recorded_passes_say_the_same(guesses: int) -> None:
    module, asked = module_of(), [request_of(seed) for seed in range(4)]
    expected = [said(request) for request in asked]
    head = DraftHead(module.config).to(DEVICE).requires_grad_(False)
    head.initialise(0)
    engine = engine_of(Model(module, head, guesses), 1, decode="fused", page_size=16)
    assert [outcome(run(engine, [request])[0]) for request in asked] == expected
    assert [outcome(pair) for pair in run(engine, asked)] == expected
    assert engine.status.drafted_tokens_total > 0
