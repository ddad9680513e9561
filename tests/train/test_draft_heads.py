"""A draft head learns what its model chooses, and is asked only where decoding comes to."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from hrm_text.contracts import IGNORE_INDEX, PackedBatch
from hrm_text.model.config import preset
from hrm_text.model.draft import DraftHead
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.train.draft_heads import acceptance, draft_examples, train_head

CONFIG = preset("tiny", vocab_size=32, max_position_embeddings=64)


def greedy(model: RecurrentLM, prefix: list[int], length: int) -> list[int]:
    ids = list(prefix)
    for _ in range(length):
        ids.append(int(model.logits(torch.tensor([ids]), torch.tensor([len(prefix)]))[0, -1].argmax()))
    return ids


def batch_of(texts: list[list[int]], prefix: int) -> PackedBatch:
    ids = [text[:-1] for text in texts]
    labels = [[IGNORE_INDEX] * (prefix - 1) + text[prefix:] for text in texts]
    lengths = [len(each) for each in ids]
    return PackedBatch(
        input_ids=np.array(list(itertools.chain(*ids))),
        labels=np.array(list(itertools.chain(*labels))),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        sample_starts=np.cumsum([0, *lengths]),
        prefix_lengths=np.full(len(texts), prefix),
    )


def texts_of(model: RecurrentLM, count: int, length: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [greedy(model, torch.randint(32, (4,), generator=generator).tolist(), length) for _ in range(count)]


def test_every_choice_of_a_models_own_text_is_asked_for() -> None:
    model = build(CONFIG, seed=0)
    texts = texts_of(model, 2, 5)
    examples = draft_examples(model, batch_of(texts, 4), 2)
    # Of a response of five tokens, the last is no input: behind the first to fourth there are 4, then 3 choices.
    assert len(examples.states_SD) == 8
    expected = [(text[4 + n], text[5 + n]) for text in texts for n in range(4)]
    assert list(zip(examples.tokens_SG[:, 0].tolist(), examples.choices_SG[:, 0].tolist(), strict=True)) == expected
    assert (examples.choices_SG[:, 1] == IGNORE_INDEX).tolist() == [False, False, False, True] * 2


def test_nothing_is_asked_where_the_text_is_not_the_models_own() -> None:
    model = build(CONFIG, seed=0)
    (text,) = texts_of(model, 1, 6)
    own = text[6]
    text[6] = (own + 1) % 32
    examples = draft_examples(model, batch_of([text], 4), 3)
    # The response's third token is wrong: what the model would have said is asked for, and nothing behind it.
    assert examples.tokens_SG[:2, 0].tolist() == text[4:6]
    assert examples.choices_SG[:2].tolist() == [[text[5], own, IGNORE_INDEX], [own, IGNORE_INDEX, IGNORE_INDEX]]
    assert text[6] not in examples.tokens_SG[:, 0].tolist() or text[6] in text[7:]


def test_a_head_learns_its_models_choices_and_leaves_the_model_alone() -> None:
    model = build(CONFIG, seed=0).requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batch = batch_of(texts_of(model, 24), 4)
    head = DraftHead(CONFIG)
    head.initialise(0)
    untrained = acceptance(model, head, [batch], 2)
    steps = train_head(model, head, itertools.repeat(batch), guesses=2, seconds=60, max_steps=150)
    trained = acceptance(model, head, [batch], 2)
    assert steps == 150 and untrained[0] < 0.5 < 0.9 < trained[0] and trained[1] > 0.8
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
